"""The blocked form under jax's transformations, at low precision, and its memory."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnjax import kernels
from attnjax.kernels import AttentionSpec, block_plan, blocked, reference
from attnjax.kernels.choose_blocks import plan_blocks
from attnjax.kernels.tile_table import static_table, tile_table

CAUSAL = AttentionSpec(mask=kernels.Causal())
PACKED = AttentionSpec(mask=kernels.Causal() & kernels.Segments())
B, T, H, D = 2, 37, 2, 5


def qkv(*, b=B, t=T, h=H, d=D, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (b, t, h, d), dtype) for key in keys]


@functools.partial(jax.jit, static_argnames=("spec", "module", "block_sizes"))
def attend(q, k, v, spec=CAUSAL, operands=None, *, module=blocked, **options):
    operands = operands or {}
    request = kernels.make_request(q, k, v, spec, operands, kernels.default_target())
    return module.run(request, q, k, v, operands, **options)[0]


tiled = functools.partial(attend, block_sizes=(16, 16))
exact = functools.partial(attend, module=reference)


def grads(form, q, k, v, *rest):
    def total(q, k, v):
        return jnp.sum(jnp.sin(form(q, k, v, *rest)))

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


def close(left, right, atol=2e-6):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


def segments(*lengths):
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return jnp.asarray(np.stack([ids, ids[::-1]]), jnp.int32)


def packed(ids):
    return {"q_segment_ids": ids, "k_segment_ids": ids}


either_form = pytest.mark.parametrize("form", [attend, tiled], ids=["one", "tiled"])


@either_form
def test_vmap_over_batched_and_shared_arrays(form):
    q, k, v = qkv()
    many = jnp.stack([q, 2 * q, -q])
    got = jax.jit(jax.vmap(lambda q: grads(form, q, k, v)))(many)
    close(got, jax.lax.map(lambda q: grads(exact, q, k, v), many))


def test_keys_of_the_common_id_are_seen_by_every_segment():
    q, k, v = qkv()
    ids = segments(5, 20, 12)
    apart = jnp.where(jnp.arange(T) < 3, -1, ids)
    spec = AttentionSpec(mask=kernels.Causal() & kernels.Segments(common=-1))
    given = {"q_segment_ids": ids, "k_segment_ids": apart}
    got = np.asarray(jax.jit(lambda: tiled(q, k, v, spec, given))())
    seen = (ids[:, :, None] == apart[:, None]) | (apart == -1)[:, None]
    seen &= (ids != 0)[:, :, None] & np.tri(T, dtype=bool)
    scores = np.einsum("bthd,bshd->bhts", q, k) / D**0.5
    weights = np.exp(scores) * np.asarray(seen)[:, None]
    total = weights.sum(-1, keepdims=True)
    told = np.einsum("bhts,bshd->bthd", weights / np.where(total, total, 1), v)
    close(got, told)
    assert np.asarray(seen)[0, 20, 0] and not np.asarray(seen)[0, 0].any()


def test_vmap_over_traced_segments():
    q, k, v = qkv()
    ids = jnp.stack([segments(5, 20, 12), segments(0, 37)])

    def run(form, ids):
        return grads(form, q, k, v, PACKED, packed(ids))

    got = jax.jit(jax.vmap(lambda ids: run(tiled, ids)))(ids)
    close(got, jax.lax.map(lambda ids: run(exact, ids), ids))


@either_form
@pytest.mark.parametrize("policy", [None, "dots_saveable"])
def test_scan_and_checkpoint(form, policy):
    q, k, v = qkv()
    policy = policy and getattr(jax.checkpoint_policies, policy)

    def stack(form):
        @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
        def layer(x, w):
            return x + form(x * w, k, v), None

        return jax.jit(jax.grad(lambda q: jax.lax.scan(layer, q, W)[0].sum()))

    close(stack(form)(q), stack(exact)(q), atol=1e-5)


W = jnp.array([0.5, 1.0, 2.0])


@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_shard_map_with_shared_keys_bias_and_segments(name, monkeypatch):
    """Arrays that are the same on some devices get the sum of their gradients."""
    monkeypatch.setattr(block_plan, "SMALL_TILE", 0)
    monkeypatch.setattr(block_plan, "SMALL_LENGTH", 0)
    monkeypatch.setattr(block_plan, "CANDIDATES", ((16, 16),))
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto)
    parts = P("data", None, "tensor")
    batch = P("data")
    spec = dataclasses.replace(PACKED, score=kernels.Bias())
    q, k, v = qkv()
    arrays = (q, k[:, :, :1], v[:, :, :1], jax.random.normal(jax.random.key(1), (T, T)))
    ids = segments(5, 20, 12)[:1]

    def run(q, k, v, bias, ids, implementation=name):
        operands = packed(ids) | {"bias": bias[None, None]}
        options = {"implementation": implementation}
        return kernels.attention(q, k, v, spec, operands, **options)

    def total(q, k, v, bias):
        specs = (parts, batch, batch, P(), P())
        run_shard = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=parts)
        return jnp.sum(jnp.sin(run_shard(q, k, v, bias, ids)))

    def whole(*arrays):
        return jnp.sum(jnp.sin(run(*arrays, ids, implementation="reference")))

    got = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*arrays)
    close(got, jax.grad(whole, (0, 1, 2, 3))(*arrays))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", [attend, tiled, exact])
def test_half_precision_is_as_near_as_rounding_allows(dtype, form):
    q, k, v = qkv(dtype=dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    got = form(q, k, v)
    assert got.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        got.astype(jnp.float32), exact(*wide), rtol=eps, atol=eps
    )
    for left, right in zip(grads(form, q, k, v), grads(exact, *wide), strict=True):
        assert left.dtype == dtype
        rounding = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            left.astype(jnp.float32), right, atol=rounding, rtol=rounding
        )


@pytest.mark.parametrize("again", [None, kernels.Sharpen(15)])
@pytest.mark.parametrize("weights", [kernels.Softmax(), kernels.Softpick()])
def test_huge_scores_do_not_overflow(weights, again):
    q, k, v = (10 * x for x in qkv())
    spec = dataclasses.replace(CAUSAL, weight_map=weights, reweight=again)
    count = jnp.arange(1.0, T + 1)[None, None]
    operands = {"visible_keys": count, "sharpen_offset": jnp.minimum(count - 1, 1)}
    rest = (spec, operands if again else {})
    for form in (attend, tiled):
        close(form(10 * q, 10 * k, v, *rest), exact(10 * q, 10 * k, v, *rest), 1e-4)
        finite = [jnp.isfinite(g).all() for g in grads(form, 10 * q, 10 * k, v, *rest)]
        assert all(finite)


def test_gradients_repeat_bit_for_bit():
    q, k, v = qkv()
    ids = packed(segments(3, 14, 20))
    run = jax.jit(lambda: grads(tiled, q, k, v, PACKED, ids))
    for one, two in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(one, two)


def offset_cases():
    whole = qkv()
    wanted = exact(*whole)
    for first, length in ((0, 37), (11, 26), (36, 1), (20, 5)):
        yield first, [whole[0][:, first : first + length], *whole[1:]], wanted


@pytest.mark.parametrize("form", [attend, tiled, exact])
def test_queries_at_an_offset_equal_their_rows_of_the_whole(form):
    for first, (q, k, v), wanted in offset_cases():
        for offset in (jnp.int32(first), jnp.full((B,), first)):
            got = form(q, k, v, CAUSAL, {"q_offset": offset})
            close(got, wanted[:, first : first + q.shape[1]])


@pytest.mark.parametrize("form", [attend, tiled])
def test_positions_may_come_in_any_order(form):
    q, k, v = qkv()
    order = jax.random.permutation(jax.random.key(3), T)
    where = jnp.broadcast_to(order, (B, T)).astype(jnp.int32)
    spec = AttentionSpec(mask=kernels.SlidingWindow(6), score=kernels.ALiBi())
    slopes = {"alibi_slopes": jnp.array([0.5, 0.1])}
    shuffled = form(
        q[:, order],
        k[:, order],
        v[:, order],
        spec,
        slopes | {"q_positions": where, "k_positions": where},
    )
    close(shuffled, exact(q, k, v, spec, slopes)[:, order])


def test_causal_and_window_visit_only_the_tiles_they_need():
    def visits(mask, t=64, block=16):
        spec = AttentionSpec(mask=mask)
        q, k, v = qkv(t=t)
        request = kernels.make_request(q, k, v, spec, {}, kernels.default_target())
        table = static_table(plan_blocks(request, (block, block)))
        return int(table.num_full.sum()), int(table.num_partial.sum())

    assert visits(kernels.Full()) == (16, 0)
    assert visits(kernels.Causal()) == (6, 4)
    assert visits(kernels.SlidingWindow(15)) == (0, 7)
    assert visits(kernels.SlidingWindow(15, sinks=1)) == (0, 9)
    assert visits(kernels.Full(), t=60) == (12, 4)


def chosen(b, t, h, mask=CAUSAL.mask, s=None):
    make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q, k = make((b, t, h, 64)), make((b, s or t, h, 64))
    spec, operands = AttentionSpec(mask=mask), {}
    if s is not None:
        operands = {"q_offset": jax.ShapeDtypeStruct((), jnp.int32)}
    target = kernels.default_target()
    plan = plan_blocks(kernels.make_request(q, k, k, spec, operands, target), None)
    return plan.block_q, plan.block_k


def test_block_sizes_follow_shape_and_mask():
    assert chosen(12, 64, 4) == (64, 64)
    assert chosen(4, 256, 8) == (256, 256)
    assert chosen(2, 1, 8, s=4096) == (1, 256)
    assert chosen(2, 1, 8, s=256) == (1, 256)
    assert chosen(1, 4096, 8) == (256, 128)
    assert chosen(1, 4096, 8, kernels.SlidingWindow(255)) == (64, 64)
    assert chosen(8, 1024, 12) == (64, 64)
    assert chosen(64, 256, 12) == (64, 64)
    assert chosen(1, 2**17, 1) == (256, 128)


def test_packed_documents_skip_the_tiles_between_them():
    q, k, v = qkv(b=1, t=64)
    ids = packed(jnp.asarray(np.repeat([1, 2, 0], [32, 16, 16])[None]))
    request = kernels.make_request(q, k, v, PACKED, ids, kernels.default_target())
    table = tile_table(plan_blocks(request, (16, 16)), ids)
    np.testing.assert_array_equal(table.num_full, [0, 1, 0, 0])
    np.testing.assert_array_equal(table.num_partial, [1, 1, 1, 0])
    assert table.full[1, 0] == 0
    assert [int(row[0]) for row in table.partial[:3]] == [0, 1, 2]


def test_memory_grows_with_length_and_not_with_its_square(optimised):
    def scratch(t):
        arrays = [jax.ShapeDtypeStruct((1, t, 4, 16), jnp.float32)] * 3
        run = jax.jit(lambda *x: grads(attend, *x))
        return run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = scratch(2048), scratch(8192)
    assert long < 4.5 * short
    assert long < 4 * 8192**2 * 4 / 16


def test_no_array_is_quadratic_in_length():
    arrays = [jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)] * 3
    text = jax.jit(lambda *x: grads(attend, *x)).lower(*arrays).as_text()
    assert "4096x4096" not in text
    assert "4096" in text


def test_hooks_that_are_off_leave_no_trace():
    arrays = qkv(t=64)

    def text(spec):
        return jax.jit(lambda *x: grads(tiled, *x, spec)).lower(*arrays).as_text()

    plain = text(CAUSAL)
    spelled = AttentionSpec(
        mask=kernels.Full() & kernels.Causal() & kernels.Full(),
        scale=D**-0.5,
        score=(),
        weight_map=kernels.Softmax(sink=None, bound=None),
        reweight=None,
        epilogue=(),
        dropout_rate=0.0,
    )
    assert text(spelled) == plain
    for hook in (
        {"score": kernels.SoftCap(9.0)},
        {"weight_map": kernels.Softmax(bound=9.0)},
        {"reweight": kernels.Clip()},
    ):
        assert text(dataclasses.replace(CAUSAL, **hook)) != plain


def test_a_spec_made_again_does_not_compile_again():
    traces = []

    @functools.partial(jax.jit, static_argnames="spec")
    def run(q, k, v, spec):
        traces.append(spec)
        return kernels.attention(q, k, v, spec)

    for _ in range(3):
        mask = kernels.Causal() & kernels.SlidingWindow(4)
        run(*qkv(), AttentionSpec(mask=mask, score=kernels.SoftCap(5.0)))
    assert len(traces) == 1


def test_kernels_work_with_float64_switched_on_in_the_environment():
    code = (
        "import jax, jax.numpy as jnp; from attnjax import kernels; "
        "q = jnp.ones((1, 9, 2, 4), jnp.float64); "
        "out = kernels.attention(q, q, q); assert out.dtype == jnp.float64"
    )
    env = {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)
