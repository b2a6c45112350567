"""Facts of Sparsifiner (arXiv 2303.13755)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grid_layers import close, heads, made, out, tokens, wide

from attnjax import kernels
from attnjax.conformance.subject import jitted
from attnjax.core import schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.mixers import attention, sparsifiner
from attnjax.models import vit
from attnjax.models.layout import path_of
from attnjax.training import optimizers

GRID, N, H, D = (3, 4), 13, 6, 4
# 4 of 13 keys, 3 of 5 coefficients.
OPTIONS = {"keep": 0.3, "rank": 5, "coefficients": 3}
HEADS = {"head_dim": D, "num_kv_heads": 2}
PROBES = tuple(Hook(name, name) for name in ("weights", "estimate"))


def layer(extra=1, **options):
    return made(sparsifiner, GRID, OPTIONS | options, prefix_tokens=extra, **HEADS)


def forward(s, x, ctx, params=None, **operands):
    """y, its MixerOut, and the records as float64."""
    changes = tuple(Hook(name, name, action="replace") for name in operands)
    ctx = ctx.replace(hooks=PROBES + changes, interventions=operands)
    y, found = s.forward((params or s.arrays[0], {}), x, ctx)
    return np.asarray(y), found, wide(found.records)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def top(values, count):
    """True at the `count` largest of each row, one row at a time."""
    found = np.zeros(values.shape, bool)
    for place in np.ndindex(values.shape[:-1]):
        order = sorted(range(values.shape[-1]), key=lambda j: -values[place][j])
        found[place][order[:count]] = True
    return found


def scores_of(qkv):
    """q.k / sqrt(D) of all pairs, [B, H, T, S]."""
    query, key, _ = qkv
    key = np.repeat(key, H // key.shape[2], axis=2)
    return np.einsum("bthd,bshd->bhts", query, key) / D**0.5


def estimate_of(params, qkv, *, extra, sparse, scale=H**-0.5, coefficients=3):
    """A~ in float64 numpy."""
    query, key, _ = qkv
    key = np.repeat(key, H // key.shape[2], axis=2)
    p = params["predictor"]
    few_q, few_k = (
        a @ p[name] + p[f"{name}_bias"]
        for name, a in (("query", query[:, extra:]), ("key", key))
    )
    coef = softmax(np.einsum("bthc,bshc,sn->bhtn", few_q, few_k, p["down"]) * scale)
    basis = p["up"]
    if sparse:
        coef = coef * top(coef, coefficients)
        basis = np.abs(basis) * (np.abs(basis) > 0.02)
    return coef @ basis.T


@pytest.fixture(scope="module")
def masked():
    s = layer()
    x, ctx = tokens(s, extra=1)
    params = wide(s.arrays[0])
    return s, x, ctx, params, heads(params, x, D), forward(s, x, ctx)


@pytest.fixture(scope="module")
def dense():
    s = layer(phase="reconstruct")
    x, ctx = tokens(s, extra=1)
    params = wide(s.arrays[0])
    return s, x, ctx, params, heads(params, x, D), forward(s, x, ctx)


# ---- the masked phase


def test_the_masked_phase_is_the_formula_in_float64(masked):
    _, _, _, params, qkv, (y, found, records) = masked
    approx = estimate_of(params, qkv, extra=1, sparse=True)
    close(records["estimate"], approx)
    seen = np.concatenate([np.ones((2, H, 1, N), bool), top(approx, 4)], axis=2)
    weights = softmax(np.where(seen, scores_of(qkv), -np.inf))
    close(records["weights"], weights)
    value = np.repeat(qkv[2], H // 2, axis=2)
    by_hand = np.einsum("bhts,bshd->bthd", weights, value)
    close(y, out(params, by_hand), atol=1e-4)
    close(found.metrics["sparsifiner_kept"], 4 / N)
    assert not found.losses
    told = sparsifiner.Weights(**params["predictor"])
    key, value = (np.repeat(a, H // 2, axis=2) for a in qkv[1:])
    plain = sparsifiner.reference(qkv[0], key, value, told, kept=4, coefficients=3)
    close(plain, by_hand)


def test_keep_of_one_gives_exactly_dense_attention(masked, dense):
    """Mask all ones, whatever is predicted."""
    s, x, ctx, *_ = masked
    y, found = layer(keep=1.0).forward(s.arrays, x, ctx)
    close(y, dense[-1][0], atol=1e-5)
    assert found.metrics["sparsifiner_kept"] == 1


def test_rows_of_the_mask_sum_to_k_and_that_of_the_class_token_to_n(masked):
    """Rows of weights sum to 1, on the mask only."""
    records = masked[-1][-1]
    seen = records["weights"] > 0
    assert np.all(seen[:, :, 0].sum(-1) == N)
    assert np.all(seen[:, :, 1:].sum(-1) == 4)
    close(records["weights"].sum(-1), np.ones((2, H, N)))


def test_of_equal_estimates_the_first_keys_are_kept():
    """Exactly so many: a sparse estimate is 0 at many keys."""
    values = jnp.array([[0.0, 2.0, 0.0, 1.0, 0.0, 0.0], [3.0] * 6, [0.0] * 5 + [1.0]])
    expected = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1]]
    np.testing.assert_array_equal(sparsifiner.largest(values, 4), np.bool_(expected))
    assert np.all(sparsifiner.largest(values, 9))


def test_with_a_threshold_a_query_without_keys_gives_zero():
    s = layer(keep=None, threshold=0.0)
    x, ctx = tokens(s, extra=1)
    up = np.array(s.arrays[0]["predictor"]["up"])
    up[4:] = 0.01  # No estimate of these keys.
    params = s.arrays[0] | {"predictor": s.arrays[0]["predictor"] | {"up": up}}
    _, found, records = forward(s, x, ctx, params)
    seen = records["weights"] > 0
    np.testing.assert_array_equal(seen[:, :, 1:], records["estimate"] > 0)
    assert np.all(seen[:, :, 0]) and not np.any(seen[:, :, 1:, 4:])
    close(found.metrics["sparsifiner_kept"], seen[:, :, 1:].mean())
    params["predictor"]["up"] = 0 * up
    y, _, _ = forward(s, x, ctx, params)
    assert not np.any(y[:, 1:]) and np.abs(y[:, 0]).min() > 0


def test_what_takes_the_place_of_the_estimate_decides_which_keys_are_kept():
    """An oracle, a random mask or a fixed pattern in the predictor's place; behind
    registers, which attend to all keys as the class token does."""
    s = layer(3)
    x, ctx = tokens(s, extra=3)
    given = np.random.default_rng(3).normal(size=(1, 1, 12, 15)).astype(np.float32)
    _, _, records = forward(s, x, ctx, estimate=given)
    seen = records["weights"] > 0
    assert np.all(seen[:, :, :3])
    expected = np.broadcast_to(top(given, 5), seen[:, :, 3:].shape)
    np.testing.assert_array_equal(seen[:, :, 3:], expected)


def test_without_a_class_token_every_row_is_estimated():
    s = layer(0)
    x, ctx = tokens(s, extra=0)
    hooks = (Hook("estimate", "estimate"),)
    _, found, _ = jax.eval_shape(s.call, s.arrays, x, ctx.replace(hooks=hooks))
    assert found.records["estimate"].shape == (2, H, 12, 12)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_fused_kernels_take_the_mask(platform):
    """One that holds masks in numbers too."""
    kept = kernels.MaskFn(sparsifiner.kept_entry, ("kept",), ("tile",))
    spec = kernels.AttentionSpec(mask=kernels.Full() & kept)
    q = jax.ShapeDtypeStruct((2, 197, 6, 64), jnp.bfloat16)
    operands = {"kept": jax.ShapeDtypeStruct((2, 6, 197, 197), jnp.bool_)}
    kind = {"gpu": "NVIDIA H200", "tpu": "TPU v5p"}[platform]
    target = kernels.Target(platform, kind)
    lines = kernels.explain(q, q, q, spec, operands, target=target)
    assert any(line.startswith(f"mosaic_{platform}: supports it") for line in lines)


# ---- the predictor


def test_a_one_hot_coefficient_gives_the_chosen_vector_of_the_basis():
    """As it is in the phase that learns; its size, where above 0.02, in the other."""
    dims = MixerDims(20, H, H, D, grid=GRID, prefix_tokens=1)
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, N, 1, D))) for _ in range(2))
    for phase in ("reconstruct", "masked"):
        config = sparsifiner.Config(phase=phase, rank=5)
        p = sparsifiner.Predictor(config, dims, D, rngs=nnx.Rngs(0))
        p.query[...] *= 1e9
        up = np.float64(p.up[...])
        if phase == "masked":
            up = np.abs(up) * (np.abs(up) > 0.02)
        rows = np.asarray(jitted(p.__call__)(query, key))[0, 0]
        chosen = [np.flatnonzero((row == up.T).all(-1)) for row in rows]
        assert {len(found) for found in chosen} == {1}
        assert len({int(found[0]) for found in chosen}) > 1
        assert (up < 0).any() == (phase == "reconstruct")


def test_the_estimate_of_a_narrow_model_is_wide():
    """A rounded one would choose other keys."""
    dims = MixerDims(20, H, H, D, grid=GRID, prefix_tokens=1, dtype="bfloat16")

    def estimate(x):
        p = sparsifiner.Predictor(sparsifiner.Config(), dims, D, rngs=nnx.Rngs(0))
        return p(x, x)

    narrow = jax.ShapeDtypeStruct((1, N, H, D), jnp.bfloat16)
    assert jax.eval_shape(estimate, narrow).dtype == jnp.float32


def test_the_estimate_has_rank_n_and_the_masked_attention_more(masked, dense):
    def ranks(arrays):
        return [np.linalg.matrix_rank(a, tol=1e-5) for a in arrays.reshape(-1, *shape)]

    shape = (N - 1, N)
    assert max(ranks(dense[-1][-1]["estimate"])) <= 5
    assert min(ranks(masked[-1][-1]["weights"][:, :, 1:])) > 5


def test_sizes_are_those_of_the_card():
    """N = 197: n = 32, k = 50, and the parameters of a predictor."""
    config = sparsifiner.Config()
    dims = MixerDims(384, 6, 6, 64, grid=(14, 14), prefix_tokens=1)
    assert sparsifiner.tokens_of(dims) == 197
    assert sparsifiner.rank_of(config, 197) == 32
    assert sparsifiner.budget(config, 197) == 50
    count = sparsifiner.SPEC.parameter_count(config, dims)
    plain = attention.SPEC.parameter_count(attention.Config(), dims)
    assert count - plain == 4160 + 12608 == 16768
    built = nnx.eval_shape(
        lambda: sparsifiner.Predictor(config, dims, 64, rngs=nnx.Rngs(0))
    )
    shapes = [p.shape for p in jax.tree.leaves(nnx.state(built, nnx.Param))]
    assert sum(map(np.prod, shapes)) == 16768
    one = sparsifiner.Config(shared_basis=True)
    assert count - sparsifiner.SPEC.parameter_count(one, dims) == 197 * 32


# ---- the phase that learns


def test_the_loss_is_a_sum_of_squares_over_all_pairs(dense):
    s, x, ctx, params, qkv, (y, found, records) = dense
    approx = estimate_of(params, qkv, extra=1, sparse=False)
    close(records["estimate"], approx)
    whole = softmax(scores_of(qkv))
    close(records["weights"], whole)
    squares = np.sum((approx - whole[:, :, 1:]) ** 2)
    close(found.losses["sparsifiner_loss"], 0.01 * squares, atol=1e-4)
    close(found.metrics["sparsifiner_error"], squares / np.sum(whole[:, :, 1:] ** 2))
    value = np.repeat(qkv[2], H // 2, axis=2)
    attended = np.einsum("bhts,bshd->bthd", whole, value)
    close(y, out(params, attended), atol=1e-4)
    options = {"loss_over": "image", "loss_weight": 0.1, "predictor_scale": "width"}
    options["scale"] = 0.3
    whole = softmax(0.3 * D**0.5 * scores_of(qkv))
    other = layer(phase="reconstruct", **options)
    _, found, records = forward(other, x, ctx, s.arrays[0])
    approx = estimate_of(params, qkv, extra=1, sparse=False, scale=2**-0.5)
    close(records["estimate"], approx)
    squares = np.sum((approx - whole[:, :, 1:]) ** 2)
    close(found.losses["sparsifiner_loss"], 0.1 * squares / 2, atol=1e-4)


def gradients(s, x, ctx, params):
    """Of the task's loss and of the mixer's, by parameter."""

    def call(params):
        y, found, _ = s.call((params, {}), x, ctx)
        own = found.losses.get("sparsifiner_loss", jnp.zeros(()))
        return jnp.sum(jnp.sin(y)), own

    return jitted(jax.jacrev(call))(params)


def is_zero(tree):
    return [not np.any(a) for a in jax.tree.leaves(tree)]


def test_the_predictor_has_no_gradient_of_the_task(masked, dense):
    """In the masked phase none at all; in the other that of the squares alone, in
    which attention itself stands still."""
    s, x, ctx, *_ = masked
    task, own = gradients(s, x, ctx, s.arrays[0])
    assert all(is_zero(task["predictor"])) and all(is_zero(own))
    assert not any(is_zero({**task, "predictor": {}}))
    s, x, ctx, *_ = dense
    task, own = gradients(s, x, ctx, s.arrays[0])
    assert all(is_zero(task["predictor"])) and not any(is_zero(own["predictor"]))
    # A basis of 0 leaves no way to queries and keys but through attention.
    flat = s.arrays[0]["predictor"] | {"up": 0 * s.arrays[0]["predictor"]["up"]}
    _, own = gradients(s, x, ctx, s.arrays[0] | {"predictor": flat})
    assert all(is_zero({**own, "predictor": {}})) and np.any(own["predictor"]["up"])


def test_a_run_of_one_phase_is_the_start_of_one_of_the_other():
    """Both have the same arrays, and attention has all but the predictor's, which
    weight decay passes by."""

    def arrays(layers, **options):
        sizes = {"num_layers": 2, "embed_dim": 8, "num_heads": 2, "patch_size": 2}
        given = {"layers": layers, "mixers": {layers: options}, **sizes}
        config = schema.build(vit.Config, vit.resolve(given))
        model = vit.ViT(config, image_size=6, channels=1, num_classes=2)
        params, _ = jax.eval_shape(model.init, 0)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {"/".join(path_of(path)): leaf.shape for path, leaf in leaves}

    learns, chooses = arrays("sparsifiner", phase="reconstruct"), arrays("sparsifiner")
    assert learns == chooses
    own = {name for name in chooses if "predictor" in name}
    assert len(own) == 6
    # What has no gradient must not shrink.
    assert not any(re.search(optimizers.Config().decay_pattern, name) for name in own)
    assert arrays("attention") == {k: v for k, v in chooses.items() if k not in own}


# ---- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0.5, "threshold": 0.1}, "two rules for the same keys; got keep=0.5"),
        ({"keep": 0.0}, "keep must be in .0, 1.; got 0.0"),
        ({"rank": 0}, "rank must be at least 1; got 0"),
        ({"basis_threshold": -1.0}, "basis_threshold must be at least 0; got -1.0"),
    ],
)
def test_settings_outside_their_rule_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        sparsifiner.Config(**options)


def test_requests_that_the_layer_is_not_made_for_are_refused(masked):
    s, x, ctx, *_ = masked
    for changes, text in (
        ({"extra_tokens": 0}, "sparsifiner: tokens must be those of the grid"),
        ({"grid": (4, 3)}, r"made for one grid; got grid=\(4, 3\), made for \(3, 4\)"),
        ({"causal": True}, "sparsifiner: is not causal"),
    ):
        with pytest.raises(UserError, match=text):
            jax.eval_shape(s.call, s.arrays, x, ctx.replace(**changes))
    with pytest.raises(UserError, match="got extra_tokens=2, made for 1. Build"):
        x, ctx = tokens(s, extra=2)
        jax.eval_shape(s.call, s.arrays, x, ctx)
    with pytest.raises(UserError, match="sparsifiner: has no decode form"):
        s.build().init_state(2, 9)
    with pytest.raises(
        UserError, match="reduce must be at most head_dim; got reduce=5"
    ):
        layer(reduce=5).build()
    with pytest.raises(UserError, match="sparsifiner: needs the grid"):
        made(sparsifiner, None).build()
    with pytest.raises(UserError, match="sparsifiner: scores and weight map are those"):
        layer(output=({"type": "attention_sink_survey"},)).build()
