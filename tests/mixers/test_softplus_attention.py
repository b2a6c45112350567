"""Facts of LSSA and LSSAR (arXiv 2501.13428)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layers import DIMS, SEGMENTS, B, close, context
from flax import nnx

from attnjax import kernels
from attnjax.conformance.subject import jitted
from attnjax.core.errors import UserError
from attnjax.mixers import softplus_attention as softplus
from attnjax.mixers.slots.base import Call

T, D = 7, 4
RNG = np.random.default_rng(5)
Q, K = (RNG.normal(size=(1, T, 1, D)).astype(np.float32) for _ in range(2))
ROW = np.arange(1, T + 1)[:, None]
LOWER = np.tri(T, dtype=bool)


@functools.cache
def program(options, mask, keys):
    """Compiled once for equal settings: (query, key, operands) -> the heads of values
    that are unit vectors."""
    config = softplus.Config(
        num_heads=1, num_kv_heads=1, value_head_dim=keys, **dict(options)
    )
    graph, params = nnx.split(softplus.Mixer(config, DIMS, rngs=nnx.Rngs(0)))

    @jitted
    def mix(query, key, operands):
        value = jnp.eye(keys)[None, :, None]
        qkv = (softplus.unit(query), softplus.unit(key), value)
        call = Call(context(length=T, batch=1))
        return nnx.merge(graph, params).attend(None, qkv, mask, operands, call)

    return mix


CAUSAL = kernels.Causal()


def weights_of(query=Q, key=K, mask=CAUSAL, operands=None, **options):
    """Weights [T, S] of one head as a layer makes them, causal unless told."""
    mix = program(tuple(sorted(options.items())), mask, key.shape[1])
    return np.asarray(mix(query, key, operands or {}))[0, :, 0]


@pytest.fixture(scope="module")
def first():
    """A of LSSA."""
    return weights_of(form="lssa")


@pytest.fixture(scope="module")
def second():
    """A' of LSSAR with p = 3."""
    return weights_of(power=3)


def of_reference(query, key, **options):
    """The same by the definition in float64."""
    with jax.enable_x64(True):
        q, k = (jnp.asarray(a, jnp.float64) for a in (query, key))
        value = jnp.eye(key.shape[1], dtype=jnp.float64)[None, :, None]
        told = jitted(functools.partial(softplus.reference, **options))
        return np.asarray(told(q, k, value, jnp.asarray(LOWER)[None]))[0, :, 0]


def test_both_forms_are_the_definition(first, second):
    close(first, of_reference(Q, K, power=None), 1e-6)
    close(second, of_reference(Q, K, power=3), 1e-5)


def test_rows_of_the_first_stage_sum_to_1_and_are_positive_on_visible_keys(first):
    close(first.sum(-1), np.ones(T), 1e-6)
    assert np.all(first[LOWER] > 0)
    np.testing.assert_array_equal(first[~LOWER], 0)


def test_rows_of_the_second_stage_sum_to_b_over_b_plus_eps(first, second):
    b = np.maximum(first * ROW - (ROW > 3), 0) ** 3
    total = b.sum(-1)
    close(second.sum(-1), total / (total + 1e-8), 1e-5)
    assert np.all(second.sum(-1) <= 1 + 1e-6)


def test_an_entry_survives_exactly_if_it_is_above_the_mean_weight(first, second):
    late = np.broadcast_to(ROW > 3, first.shape)
    np.testing.assert_array_equal(second[late] > 0, (first > 1 / ROW)[late])
    assert np.any(second[late & LOWER] == 0)


def test_scores_never_pass_log_d_log_n(first):
    limit = np.log(D) * np.log(ROW)
    # A is at most softplus(limit) among weights of at least softplus(-limit).
    high, low = np.log1p(np.exp(limit)), np.log1p(np.exp(-limit))
    assert np.all(first <= (high / (high + (ROW - 1) * low)) + 1e-6)
    cosine = np.einsum(
        "btd,bsd->ts", *(np.asarray(softplus.unit(a))[:, :, 0] for a in (Q, K))
    )
    assert np.all(np.abs(cosine) <= 1 + 1e-6)


def test_positive_factors_of_queries_and_keys_change_nothing(second):
    factor = np.linspace(0.1, 9, T).reshape(1, T, 1, 1).astype(np.float32)
    close(weights_of(Q * factor, K * factor[:, ::-1], power=3), second, 1e-5)


def test_a_huge_power_keeps_the_largest_weight_alone(first):
    found = weights_of(power=400, guard="peak")
    told = np.where(first == first.max(-1, keepdims=True), 1.0, 0.0)
    np.testing.assert_allclose(found, told, atol=0.05)


@pytest.mark.parametrize("guard", ["sum", "peak"])
def test_a_uniform_row_beyond_the_third_gives_0_not_the_mean(guard):
    # Equal scores, and a count that floats hold exactly.
    operands = {
        "visible_keys": jnp.full((1, 1, 1), 4.0),
        "sharpen_offset": jnp.ones((1, 1, 1)),
    }
    spec = kernels.AttentionSpec(
        reweight=kernels.Sharpen(15, 0.0 if guard == "peak" else 1e-8)
    )
    zeros, value = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 4, 1, 1))
    out = kernels.attention(zeros, jnp.zeros((1, 4, 1, 1)), value, spec, operands)
    np.testing.assert_array_equal(np.asarray(out), 0)


def test_equal_keys_give_almost_0_where_eps_guards_the_sum():
    found = weights_of(Q, np.ones_like(K), power=15)
    np.testing.assert_allclose(found[3:], 0, atol=1e-6)


def test_the_first_token_has_weight_1_in_both_stages(first, second):
    assert first[0, 0] == pytest.approx(1, abs=1e-6)
    assert second[0, 0] == pytest.approx(1, abs=1e-6)


def test_the_first_three_rows_keep_every_weight(first, second):
    b = (first * ROW)[:3] ** 3
    close(second[:3], b / b.sum(-1, keepdims=True), 1e-5)


def test_equal_keys_have_equal_weights():
    found = weights_of(Q, np.ones_like(K), form="lssa")
    close(found, LOWER / ROW, 1e-6)


def test_power_1_without_an_offset_changes_nothing(first):
    # In the first three rows the offset is 0.
    close(weights_of(power=1)[:3], first[:3], 1e-6)


def test_masking_equals_dropping_the_keys(second):
    seen = np.array([True] * 3 + [False] * 2 + [True] * 2)
    hidden = weights_of(
        Q, K, kernels.Full(), {"kv_mask": jnp.asarray(seen)[None]}, power=3
    )
    dropped = weights_of(Q, K[:, seen], kernels.Full(), power=3)
    close(hidden[:, seen], dropped, 1e-5)
    np.testing.assert_array_equal(hidden[:, ~seen], 0)


def test_the_guards_differ_where_all_weights_are_near_the_mean():
    close_keys = np.ones_like(K) + 0.05 * K
    plain = weights_of(Q, close_keys, power=15)
    peaked = weights_of(Q, close_keys, power=15, guard="peak")
    assert np.all(plain[3:].sum(-1) < 0.5)
    close(peaked.sum(-1), np.ones(T), 1e-5)


def test_rows_count_the_keys_of_their_document():
    ids = jnp.asarray(SEGMENTS)
    operands = {"q_segment_ids": ids, "k_segment_ids": ids}
    mask = kernels.Causal() & kernels.Segments()
    sizes = (B, *([ids.shape[1]] * 2))
    found = jitted(lambda given: softplus.visible_keys(mask, given, sizes, 1))(operands)
    told = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS != 0)[:, :, None]
    told = (told & np.tri(ids.shape[1], dtype=bool)).sum(-1)
    np.testing.assert_array_equal(np.asarray(found)[..., 0], told)


def test_gradients_at_the_papers_power_are_those_of_the_definition():
    weigh = np.random.default_rng(6).normal(size=(T, T))
    count = np.arange(1, T + 1.0)
    operands = {
        "visible_keys": count[None, None],
        "sharpen_offset": np.where(count > 3, 1.0, 0.0)[None, None],
    }
    spec = kernels.AttentionSpec(
        mask=kernels.Causal(),
        scale=float(np.log(D)),
        weight_map=kernels.SoftplusL1(),
        reweight=kernels.Sharpen(15),
    )

    def ours(query, key):
        query = softplus.unit(query) * np.log(count)[None, :, None, None]
        eye = jnp.eye(T)[None, :, None]
        out = kernels.attention(query, softplus.unit(key), eye, spec, operands)
        return jnp.sum(out[0, :, 0] * weigh)

    def told(query, key):
        eye = jnp.eye(T)[None, :, None]
        out = softplus.reference(query, key, eye, jnp.asarray(LOWER)[None])
        return jnp.sum(out[0, :, 0] * weigh)

    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, jnp.float64) for a in (Q, K)]
        both = lambda *a: [jax.grad(f, (0, 1))(*a) for f in (ours, told)]  # noqa: E731
        found, right = jitted(both)(*arrays)
        for a, b in zip(found, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_other_weight_maps_are_refused():
    config = softplus.Config(
        output=({"type": "attention_sink_survey", "weight_map": "softpick"},)
    )
    with pytest.raises(UserError, match=r"scores and their weights.*sink_survey"):
        nnx.eval_shape(lambda: softplus.Mixer(config, DIMS, rngs=nnx.Rngs(0)))


def test_heads_of_size_1_are_refused():
    config = softplus.Config(head_dim=1)
    with pytest.raises(UserError, match="head_dim must be at least 2"):
        nnx.eval_shape(lambda: softplus.Mixer(config, DIMS, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"power": 0}, "power must be at least 1"),
        ({"form": "lssa", "power": 3}, "belong to the second stage"),
        ({"form": "lssa", "guard": "peak"}, "belong to the second stage"),
        ({"cross": True, "window": 3}, "no window over the memory"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        softplus.Config(**options)


def test_both_kernels_run_on_each_devices_own_rows_and_heads():
    dims = dataclasses.replace(DIMS, num_heads=4, num_kv_heads=2)
    mixer = softplus.Mixer(softplus.Config(power=2), dims, rngs=nnx.Rngs(3))
    mesh = jax.make_mesh(
        (4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    x = jax.random.normal(jax.random.key(1), (4, T, dims.embed_dim))
    ctx = context(length=T, batch=4)

    def loss(x, rows):
        y, _ = mixer(x, ctx.replace(rows=rows))
        return jnp.sum(jnp.sin(y)), y

    run = jax.grad(loss, has_aux=True)
    wanted = jitted(functools.partial(run, rows=None))(x)
    with kernels.watching() as watch:
        found = jitted(functools.partial(run, rows=rows))(x)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), found, wanted)
    sizes = {(r.batch, r.num_heads) for r in (c.request for c in watch.choices)}
    assert sizes == {(1, 1), (1, 2)}
