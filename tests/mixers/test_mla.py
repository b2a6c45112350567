"""Facts of multi-head latent attention (arXiv 2405.04434)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.conformance import samples
from attnjax.conformance.checks import decoding
from attnjax.conformance.subject import subject
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.mixers import attention, mla

C, H, D, T = 20, 6, 4, 13
# The suite's layer: R = 16, dn = 4, dr = 2, E = 4.
R, DN, DR, E = 16, 4, 2, 4


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def forward(s, params, x, ctx, *hooks):
    y, out = s.forward((params, {}), x, ctx.replace(hooks=hooks))
    return np.asarray(y), {k: np.asarray(v) for k, v in out.records.items()}


def decoded(s, x, ctx, cuts):
    return decoding.decode(s, x, ctx, cuts, max_len=T + 2)


def test_the_expanded_form_equals_the_absorbed_form():
    absorbed = subject(mla, {"decode_form": "absorbed"})
    expanded = subject(mla, {"decode_form": "expanded"})
    x, ctx = samples.sample(absorbed, "packed")
    valid = ctx.segment_ids != 0
    full = absorbed.y(x, ctx)
    for s in (absorbed, expanded):
        close(decoded(s, x, ctx, (T - 1, 1))[valid], full[valid])
    config, sizes = mla.Config(), mla.sizes_of(mla.Config(), absorbed.dims)
    assert mla.is_absorbed(config, sizes, 1, 64)
    assert not mla.is_absorbed(config, sizes, 64, 64)


def test_the_layer_is_the_reference():
    s = subject(mla)
    x, ctx = samples.sample(s)
    params = s.arrays[0]
    hooks = (Hook("query", "query"), Hook("latent", "latent"), Hook("heads", "heads"))
    _, records = forward(s, params, x, ctx, *hooks)
    turn = lambda a: nn.apply_rope(a, ctx.positions, s.dims.rope)  # noqa: E731
    query = (
        jnp.asarray(records["query"]).at[..., DN:].set(turn(records["query"][..., DN:]))
    )
    expected = mla.reference(
        query,
        records["latent"][..., :R],
        turn(records["latent"][:, :, None, R:])[:, :, 0],
        params["key_up"]["kernel"].reshape(R, H, DN),
        params["value_up"]["kernel"].reshape(R, H, E),
        np.tril(np.ones((T, T), bool)),
    )
    close(records["heads"], expected)


def test_without_rope_norm_and_compression_it_is_multi_head_attention():
    """dr = 0, R = C, an identity down-projection: W_K = W_UK and W_V = W_UV."""
    options = {"rope_dim": 0, "kv_rank": C, "latent_norm": False}
    latent, plain = (
        subject(mla, options),
        subject(attention, {"num_kv_heads": H, "positions": "none"}),
    )
    x, ctx = samples.sample(latent, "packed")
    params = dict(plain.arrays[0])
    own = {
        "query": params["query"],
        "down": {"kernel": jnp.eye(C)},
        "key_up": params["key"],
        "value_up": params["value"],
        "out": params["out"],
    }
    close(forward(latent, own, x, ctx)[0], forward(plain, params, x, ctx)[0])


def test_the_rotary_key_is_the_same_for_all_heads():
    s = subject(mla)
    x, ctx = samples.sample(s)
    key = forward(s, s.arrays[0], x, ctx, Hook("key", "key"))[1]["key"]
    assert key.shape == (2, T, H, DN + DR)
    np.testing.assert_array_equal(key[..., DN:], key[:, :, :1, DN:].repeat(H, axis=2))
    assert np.abs(key[:, :, 0, :DN] - key[:, :, 1, :DN]).max() > 0.1


def test_permuting_heads_with_their_maps_leaves_the_output():
    s = subject(mla)
    x, ctx = samples.sample(s)
    order = np.asarray([3, 0, 5, 1, 4, 2])

    def permute(kernel, axis):
        split = kernel.reshape(*kernel.shape[:axis], H, -1, *kernel.shape[axis + 1 :])
        return jnp.take(split, order, axis=axis).reshape(kernel.shape)

    params = dict(s.arrays[0])
    for name, axis in [("query", 1), ("key_up", 1), ("value_up", 1), ("out", 0)]:
        params[name] = {"kernel": permute(params[name]["kernel"], axis)}
    close(forward(s, params, x, ctx)[0], forward(s, s.arrays[0], x, ctx)[0])


def test_the_keys_of_all_heads_have_at_most_the_rank_of_the_latent():
    s = subject(mla, {"kv_rank": 3, "rope_dim": 0})
    x, ctx = samples.sample(s)
    key = forward(s, s.arrays[0], x, ctx, Hook("key", "key"))[1]["key"]
    stacked = key.reshape(2 * T, H * DN).astype(np.float64)
    assert np.linalg.matrix_rank(stacked, tol=1e-4) == 3


def test_shifting_all_positions_leaves_the_scores():
    rope = {"scaling": "yarn", "factor": 8.0, "original_len": 8}
    s = subject(mla, {"rope": rope, "rope_dim": 8})
    x, ctx = samples.sample(s)
    probe = Hook("scores", "scores")
    before = forward(s, s.arrays[0], x, ctx, probe)[1]["scores"]
    moved = ctx.replace(positions=ctx.positions + 5)
    close(forward(s, s.arrays[0], x, moved, probe)[1]["scores"], before, atol=1e-4)
    apart = ctx.replace(positions=2 * ctx.positions)
    after = forward(s, s.arrays[0], x, apart, probe)[1]["scores"]
    seen = np.isfinite(before)
    assert np.abs(after[seen] - before[seen]).max() > 1e-2


def test_the_cache_holds_only_latents_and_the_shared_key():
    s = subject(mla)
    state = s.init_state(1, 50)
    assert state.key.size + state.value.size == 50 * (R + DR)
    v2 = MixerDims(embed_dim=5120, num_heads=128, num_kv_heads=128, head_dim=128)
    config = mla.Config(q_rank=1536)
    assert mla.sizes_of(config, v2) == mla.Sizes(128, 1536, 512, 128, 64, 128)
    per_token = mla.SPEC.state_size(config, v2, 2) - mla.SPEC.state_size(config, v2, 1)
    assert per_token == 512 + 64 + 2  # Its position and its document beside them.
    fewer = mla.Config(q_rank=1536, num_heads=16)
    assert mla.SPEC.state_size(fewer, v2, 9) == mla.SPEC.state_size(config, v2, 9)


def test_the_normed_latent_is_cached():
    s = subject(mla)
    x, ctx = samples.sample(s)
    _, state = s.step(s.arrays, x, s.init_state(2, T), ctx)
    latent = forward(s, s.arrays[0], x, ctx, Hook("c", "latent"))[1]["c"]
    close(state.key[:, :, 0, :R], latent[..., :R])
    scale = np.asarray(s.arrays[0]["latent_norm"]["scale"])
    close(np.mean((latent[..., :R] / scale) ** 2, axis=-1), np.ones((2, T)), atol=1e-3)


def test_parameters_are_those_of_the_formula():
    """C dq + dq H (dn + dr) + C (dc + dr) + dc H (dn + dv) + H dv C, and norms."""
    dims = MixerDims(embed_dim=5120, num_heads=128, num_kv_heads=128, head_dim=128)
    c, h, dq, dc, dn, dr, dv = 5120, 128, 1536, 512, 128, 64, 128
    expected = c * dq + dq * h * (dn + dr) + c * (dc + dr) + dc * h * (dn + dv)
    expected += h * dv * c + dq + dc
    assert mla.SPEC.parameter_count(mla.Config(q_rank=dq), dims) == expected


def test_the_scale_counts_both_parts_of_a_head_and_yarn():
    dims = MixerDims(embed_dim=C, num_heads=H, num_kv_heads=H, head_dim=D)
    plain = mla.layer_config(mla.Config(), dims)
    assert plain.scale == pytest.approx((DN + DR) ** -0.5)
    rope = nn.Rope(scaling="yarn", factor=40.0, original_len=64)
    for mscale, factor in [(0.707, 0.1 * 0.707 * math.log(40) + 1), (0.0, 1.0)]:
        config = mla.Config(rope=rope, yarn_mscale=mscale, rope_dim=8)
        own = mla.layer_config(config, dims)
        assert own.scale == pytest.approx((DN + 8) ** -0.5 * factor**2)


def test_rotation_keeps_lengths_under_yarn():
    """The temperature is in the scale alone."""
    rope = {"scaling": "yarn", "factor": 8.0, "original_len": 8}
    s = subject(mla, {"rope": rope, "rope_dim": 8})
    _, ctx = samples.sample(s)
    mixer = nnx.merge(s.graph, *s.arrays)
    values = jax.random.normal(jax.random.key(0), (2, T, 1, 12))
    turned = mixer.rotate(values, ctx.positions)
    close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(values, axis=-1))
    np.testing.assert_array_equal(turned[..., :4], values[..., :4])


def test_hooks_on_keys_are_refused_while_decoding():
    s = subject(mla)
    x, ctx = samples.sample(s)
    hook = Hook("half", "value", action="scale")
    ctx = ctx.replace(hooks=(hook,), interventions={"half": np.float32(0.5)})
    with pytest.raises(UserError, match="decoding keeps latents and no keys or values"):
        s.call_step(s.arrays, x, s.init_state(2, T), ctx)


def test_a_latent_intervention_decodes_like_the_full_pass():
    s = subject(mla)
    x, ctx = samples.sample(s)
    hook = Hook("half", "latent", action="scale")
    ctx = ctx.replace(hooks=(hook,), interventions={"half": np.float32(0.5)})
    full = np.asarray(s.forward(s.arrays, x, ctx)[0])
    y, _ = s.step(s.arrays, x, s.init_state(2, T), ctx)
    close(y, full)
    assert np.abs(full - s.y(x, ctx.replace(hooks=(), interventions={}))).max() > 1e-2


@pytest.mark.parametrize("position", ["g2", "g3"])
def test_gates_on_keys_and_values_are_refused_when_built(position):
    dims = MixerDims(embed_dim=C, num_heads=H, num_kv_heads=H, head_dim=D)
    output = ({"type": "gated_attention", "position": position},)
    with pytest.raises(UserError, match="made from the cached latent.*changes the"):
        nnx.eval_shape(
            lambda: mla.Mixer(mla.Config(output=output), dims, rngs=nnx.Rngs(0))
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kv_rank": 0}, "kv_rank must be at least 1; got 0"),
        ({"rope_dim": 3}, "rope_dim must be even and at least 0; got 3"),
        ({"rope": nn.Rope(), "rope_dim": 0}, "rope goes with positions=rope or inh"),
        ({"positions": "rope", "rope_dim": 0}, "positions=rope needs a rope_dim"),
        ({"yarn_mscale": -1.0}, "yarn_mscale must be at least 0; got -1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(mla.Config(), **options)
