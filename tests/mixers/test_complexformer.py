"""Facts of complex attention (arXiv 2505.10222 v1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.conformance import samples
from attnjax.conformance.subject import subject
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.mixers import attention, complexformer

C, H, K, D, T = 20, 6, 3, 4, 13
SCORES = Hook("scores", "scores")


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def layer(**options):
    return subject(complexformer, {"euler": "cartesian"} | options)


def forward(s, params, x, ctx, *hooks):
    y, out = s.forward((params, {}), x, ctx.replace(hooks=hooks))
    return np.asarray(y), {k: np.asarray(v) for k, v in out.records.items()}


def adapted(s, **values):
    """The layer's parameters with alpha, beta or gamma set throughout."""
    params = dict(s.arrays[0])
    return params | {
        name: jnp.full(params[name].shape, value, jnp.float32)
        for name, value in values.items()
    }


def plain(params):
    return {k: v for k, v in params.items() if k not in ("alpha", "beta", "gamma")}


def test_without_adaptation_it_is_rotary_attention():
    s, rotary = layer(), subject(attention, {})
    x, ctx = samples.sample(s, "packed")
    params = adapted(s, alpha=1, beta=0, gamma=1)
    expected = forward(rotary, plain(params), x, ctx)[0]
    close(forward(s, params, x, ctx)[0], expected)
    fixed = layer(adapt="none")
    close(forward(fixed, plain(params), x, ctx)[0], expected)


def test_gamma_zero_is_attention_without_positions():
    s, bare = layer(), subject(attention, {"positions": "none"})
    x, ctx = samples.sample(s)
    params = adapted(s, alpha=1, beta=0, gamma=0)
    close(forward(s, params, x, ctx)[0], forward(bare, plain(params), x, ctx)[0])


def test_alpha_zero_leaves_moduli_and_positions():
    """Turning the phase of a query and a key changes no score."""
    s = layer()
    x, ctx = samples.sample(s)
    params = adapted(s, alpha=0, gamma=1)
    before = forward(s, params, x, ctx, SCORES)[1]["scores"]
    kernel = params["query"]["kernel"].reshape(C, -1, 2, D // 2)
    turned = jnp.stack([-kernel[:, :, 1], kernel[:, :, 0]], axis=2)
    params["query"] = {"kernel": turned.reshape(C, -1)}
    close(forward(s, params, x, ctx, SCORES)[1]["scores"], before, atol=1e-4)


@pytest.mark.parametrize("euler", ["cartesian", "polar"])
def test_scores_by_products_are_scores_by_angles(euler):
    s = layer(euler=euler)
    x, ctx = samples.sample(s)
    params = s.arrays[0]
    scores = forward(s, params, x, ctx, SCORES)[1]["scores"]
    query, key = (
        complexformer.polar((x @ params[name]["kernel"]).reshape(2, T, -1, D), euler)
        for name in ("query", "key")
    )
    # Query heads 2k and 2k + 1 read key head k, and have its adaptation.
    spread = lambda a, axis: np.repeat(np.asarray(a), 2, axis)  # noqa: E731
    expected = complexformer.reference(
        query,
        tuple(spread(part, 2) for part in key),
        ctx.positions[:, :, None] - ctx.positions[:, None],
        nn.rope_frequencies(D, s.dims.rope)[0],
        **{name: spread(params[name], 0) for name in ("alpha", "beta", "gamma")},
    )
    seen = np.isfinite(scores)
    close(scores[seen], np.asarray(expected)[seen], atol=2e-4)
    assert seen.sum() == 2 * H * T * (T + 1) / 2
    # Never above the product of the moduli.
    moduli = np.einsum("bthi,bshi->bhts", query[0], spread(key[0], 2)) / D**0.5
    assert (scores[seen] <= moduli[seen] + 1e-4).all()


def test_scores_depend_on_distances_alone():
    s = layer()
    x, ctx = samples.sample(s)
    before = forward(s, s.arrays[0], x, ctx, SCORES)[1]["scores"]
    moved = ctx.replace(positions=ctx.positions + 9)
    after = forward(s, s.arrays[0], x, moved, SCORES)[1]["scores"]
    close(after, before, atol=2e-4)


def test_heads_of_other_gamma_turn_otherwise_and_equal_heads_agree():
    s = layer()
    x, ctx = samples.sample(s)
    params = adapted(s, alpha=1, beta=0)
    for name in ("query", "key"):
        kernel = params[name]["kernel"].reshape(C, -1, D)
        params[name] = {"kernel": jnp.tile(kernel[:, :1], (1, kernel.shape[1], 1))}
        params[name] = {"kernel": params[name]["kernel"].reshape(C, -1)}
    params["gamma"] = jnp.asarray([1.0, 1.0, 3.0])
    scores = forward(s, params, x, ctx, SCORES)[1]["scores"]
    seen = np.isfinite(scores[:, 0])
    close(scores[:, 0][seen], scores[:, 3][seen])
    assert np.abs(scores[:, 0][seen] - scores[:, 5][seen]).max() > 0.1


def test_the_angle_of_zero_has_no_gradient():
    def total(x):
        modulus, angle = complexformer.polar(x, "cartesian")
        return modulus.sum() + angle.sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(4)), np.zeros(4))
    x = jnp.asarray([3.0, -1.0, 4.0, 0.0])
    modulus, angle = complexformer.polar(x, "cartesian")
    close(modulus, [5.0, 1.0])
    close(complexformer.cartesian(modulus, angle), x)


def test_added_parameters_are_two_numbers_a_pair_and_one_a_head():
    dims = MixerDims(embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16)
    dims = dims.__class__(**{**vars(dims), "rope": nn.Rope()})
    count = lambda **o: complexformer.SPEC.parameter_count(  # noqa: E731
        complexformer.Config(**o), dims
    )
    assert count() - count(adapt="none") == 2 * 4 * 8 + 4
    assert count(adapt="shared") - count(adapt="none") == 2 * 8 + 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head_dim": 5, "positions": "none"}, "head_dim must be even, as its entries"),
        (
            {"rope": nn.Rope(fraction=0.5)},
            "every pair of entries is turned; got rope.f",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, text):
    dims = MixerDims(embed_dim=C, num_heads=H, num_kv_heads=K, head_dim=D)
    with pytest.raises(UserError, match=text):
        nnx.eval_shape(
            lambda: complexformer.Mixer(
                complexformer.Config(**options), dims, rngs=nnx.Rngs(0)
            )
        )
