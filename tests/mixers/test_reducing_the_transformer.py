"""Facts of attention with fewer projections (arXiv 2410.13732)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax.conformance import samples
from attnjax.conformance.subject import subject
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.mixers import reducing_the_transformer as reducing

C, H, D, T = 20, 6, 4, 13
VISIBLE = np.tril(np.ones((T, T), bool))
ONE = {"num_heads": 1, "positions": "none"}


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def layer(**options):
    return subject(reducing, options)


def forward(s, params, x, ctx, *hooks):
    y, out = s.forward((params, {}), x, ctx.replace(hooks=hooks))
    return np.asarray(y), {k: np.asarray(v) for k, v in out.records.items()}


def test_a_collapsed_similarity_is_the_product_of_two_maps():
    separate, collapsed = layer(qk="separate", **ONE), layer(qk="collapsed", **ONE)
    x, ctx = samples.sample(separate)
    params = dict(separate.arrays[0])
    expected = forward(separate, params, x, ctx)[0]
    own = {name: params[name] for name in ("value", "out")}
    product = params["query"]["kernel"] @ params["key"]["kernel"].T
    own["query"] = {"kernel": product}
    close(forward(collapsed, own, x, ctx)[0], expected, atol=1e-4)


def test_a_collapsed_output_is_the_product_of_two_maps():
    full, collapsed = layer(**ONE), layer(vo="collapsed", **ONE)
    x, ctx = samples.sample(full)
    params = full.arrays[0]
    product = params["value"]["kernel"] @ params["out"]["kernel"]
    own = {"query": params["query"], "out": {"kernel": product}}
    expected = forward(full, params, x, ctx)[0]
    close(forward(collapsed, own, x, ctx)[0], expected, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"qk": "symmetric_collapsed", "num_heads": 1}])
def test_a_symmetric_similarity_is_symmetric_and_positive(options):
    """Rotary positions turn equal queries and keys alike, so with them too."""
    s = layer(**options)
    x, ctx = samples.sample(s)
    hooks = (Hook("s", "scores"), Hook("w", "weights"))
    found = forward(s, s.arrays[0], x, ctx.replace(causal=False), *hooks)[1]
    scores = found["s"].astype(np.float64)
    close(scores, np.swapaxes(scores, 2, 3), atol=1e-4)
    assert np.linalg.eigvalsh(scores).min() > -1e-3
    assert np.diagonal(scores, axis1=2, axis2=3).min() >= 0
    # The map is normalised by rows: it is not symmetric.
    weights = found["w"]
    assert np.abs(weights - np.swapaxes(weights, 2, 3)).max() > 0.05


def test_a_triangle_is_a_similarity():
    s = layer(qk="symmetric_collapsed", **ONE)
    x, ctx = samples.sample(s)
    scores = forward(s, s.arrays[0], x, ctx, Hook("s", "scores"))[1]["s"][:, 0]
    matrix = np.zeros((C, C))
    matrix[np.tril_indices(C)] = s.arrays[0]["triangle"]
    expected = x @ (matrix @ matrix.T) @ np.swapaxes(x, 1, 2) / C**0.5
    close(scores[:, VISIBLE], expected[:, VISIBLE], atol=1e-4)


def test_without_value_and_output_map_outputs_are_averages_of_inputs():
    s = layer(qk="collapsed", vo="none", **ONE)
    x, ctx = samples.sample(s)
    params = s.arrays[0]
    y, found = forward(s, params, x, ctx, Hook("w", "weights"))
    close(found["w"].sum(-1), np.ones((2, 1, T)))
    close(y, found["w"][:, 0] @ x)
    close(y, reducing.reference(x, params["query"]["kernel"], VISIBLE))
    constant = np.broadcast_to(x[:, :1], x.shape)
    close(forward(s, params, constant, ctx)[0], constant)
    lower = np.minimum.accumulate(x, axis=1)
    upper = np.maximum.accumulate(x, axis=1)
    assert (y >= lower - 1e-5).all() and (y <= upper + 1e-5).all()


def test_the_outputs_of_a_bare_stack_are_one_product():
    """No residual, norm or MLP: A_3 A_2 A_1 X W_1 W_2 W_3."""
    s = layer(qk="collapsed", vo="collapsed", **ONE)
    x, ctx = samples.sample(s)
    params = s.arrays[0]
    y, maps, product = 0.3 * x, np.eye(T), np.eye(C)
    start = y
    for _ in range(3):
        y, found = forward(s, params, y, ctx, Hook("w", "weights"))
        maps = found["w"][:, 0] @ maps
        product = product @ params["out"]["kernel"]
    close(y, maps @ start @ product, atol=1e-4)


def test_the_cache_holds_the_input_once():
    s = layer(qk="collapsed", vo="none", num_heads=1)
    x, ctx = samples.sample(s)
    y, state = s.step(s.arrays, x, s.init_state(2, T), ctx)
    close(state.key[:, :, 0], x)
    assert state.value.size == 0
    close(y, s.y(x, ctx))


def test_parameters_are_those_of_the_table():
    n = 64
    one = MixerDims(embed_dim=n, num_heads=1, num_kv_heads=1, head_dim=n)
    four = MixerDims(embed_dim=n, num_heads=4, num_kv_heads=4, head_dim=n // 4)

    def count(dims, qk, vo="full"):
        config = reducing.Config(qk=qk, vo=vo)
        built = nnx.eval_shape(lambda: reducing.Mixer(config, dims, rngs=nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
        assert sum(leaf.size for leaf in leaves) == reducing.SPEC.parameter_count(
            config, dims
        )
        return sum(leaf.size for leaf in leaves)

    assert count(four, "separate") == 4 * n**2
    assert count(four, "symmetric") == 3 * n**2
    assert count(one, "collapsed") == 3 * n**2
    assert count(one, "collapsed", "none") == n**2
    assert count(four, "symmetric", "none") == n**2
    assert count(one, "symmetric_collapsed", "none") == n * (n + 1) // 2
    # Layers 7 to 12 of the paper's models: 16,105 a layer without MLP, 45,926 with.
    without, whole = (198_100 - 101_470) / 6, (563_242 - 287_686) / 6
    assert without == pytest.approx(count(one, "separate"), rel=0.02)
    assert whole - without == pytest.approx(8 * n**2, rel=0.1)


def test_overdetermination_counts_constraints_for_a_parameter():
    assert reducing.overdetermination(60_000, 10, 101_470) == pytest.approx(5.913, 1e-3)


@pytest.mark.parametrize(
    ("options", "dims", "text"),
    [
        ({"qk": "collapsed"}, {}, "qk=collapsed is for one head, .* got num_heads=6"),
        ({"vo": "collapsed"}, {}, "vo=collapsed is for one head, .* got num_heads=6"),
        ({"vo": "none"}, {}, "must divide the model's embed_dim; got num_heads=6, emb"),
        ({}, {"num_kv_heads": 3}, "each query head its own key; got num_kv_heads=3"),
        (
            {"qk": "separate", "vo": "none"},
            {"num_heads": 4, "num_kv_heads": 2},
            "each head its part of the input; got num_kv_heads=2",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(options, dims, text):
    sizes = {"embed_dim": C, "num_heads": H, "num_kv_heads": H, "head_dim": D} | dims
    with pytest.raises(UserError, match=text):
        reducing.layer_config(reducing.Config(**options), MixerDims(**sizes))


def test_gates_on_shared_maps_are_refused():
    dims = MixerDims(embed_dim=C, num_heads=H, num_kv_heads=H, head_dim=D)
    output = ({"type": "gated_attention", "position": "g3"},)
    with pytest.raises(
        UserError, match="qk=symmetric and vo=full maps are shared; got"
    ):
        reducing.Mixer(reducing.Config(output=output), dims, rngs=nnx.Rngs(0))


def test_hooks_on_keys_of_a_cache_of_inputs_are_refused():
    s = layer(qk="collapsed", vo="none", num_heads=1)
    x, ctx = samples.sample(s)
    hook = Hook("half", "key", action="scale")
    ctx = ctx.replace(hooks=(hook,), interventions={"half": jnp.float32(0.5)})
    with pytest.raises(UserError, match="the cache holds inputs, not keys and values"):
        s.call_step(s.arrays, x, s.init_state(2, T), ctx)
