"""The TPU kernels, interpreted on the CPU, against dense float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from attnjax import kernels
from attnjax.kernels import AttentionSpec, Target, mosaic_tpu, reference
from attnjax.kernels.compat import vary_together

pytestmark = pytest.mark.pallas

B, T, H, K, D, E = 2, 19, 4, 2, 5, 3
TPU = Target("tpu", "TPU v5 lite")
# Pallas' own interpreter of grids and blocks: fast, and blind to copies and races.
run = functools.partial(mosaic_tpu.run, block_sizes=(8, 8), interpret=True)


@dataclasses.dataclass(frozen=True)
class EveryOther:
    stride: int

    def __call__(self, b, h, q, k):
        return (q - k) % (self.stride + 0 * h) == 0


def per_head_reach(b, h, q, k, reach):
    return q - k <= reach


def decaying_log(s, b, h, q, k, strength, tilt, slant):
    """Not finite at k > q: what a causal mask hides must stay hidden."""
    penalty = strength * jnp.log((q - k + 1).astype(s.dtype))
    return s * (1 + tilt) - penalty + slant


CAUSAL = kernels.Causal()
PACKED = CAUSAL & kernels.Segments()
LOG = kernels.ScoreFn(
    decaying_log, ("strength", "tilt", "slant"), ("head", "row", "column")
)
CAPPED = (kernels.SoftCap(2.0), kernels.Bias(), kernels.ALiBi())
SINK, ONE = kernels.Softmax(sink="logit"), kernels.Softmax(sink="off_by_one")
# Every kind of tile (skipped, full, partial, sorted at trace time and on the device),
# of operand (scalar, row, column, tile) and of weight map (with a maximum, with a sum,
# with neither) at least once, shared and not, with 1, 2 and 4 kv heads.
CASES = {
    "plain": (AttentionSpec(), K),
    "causal": (AttentionSpec(mask=CAUSAL), H),
    "causal, cap, bias, alibi, sink": (
        AttentionSpec(mask=CAUSAL, score=CAPPED, weight_map=SINK),
        K,
    ),
    "window, rows and columns": (
        AttentionSpec(mask=kernels.SlidingWindow(9), score=LOG),
        1,
    ),
    "window ahead, sigmoid": (
        AttentionSpec(
            mask=kernels.SlidingWindow(3, 2, sinks=1), weight_map=kernels.Sigmoid(-1.5)
        ),
        H,
    ),
    "prefix, off by one": (
        AttentionSpec(mask=CAUSAL | kernels.Prefix(), weight_map=ONE, scale=0.7),
        1,
    ),
    "packed, bias, keys that are not there": (
        AttentionSpec(mask=PACKED, score=kernels.Bias(), weight_map=SINK),
        K,
    ),
    "distances, blocks of heads, second pass": (
        AttentionSpec(
            mask=CAUSAL & kernels.BlockMask(4, 3),
            score=(kernels.RelativeBias(6), kernels.SoftCap(3.0)),
            weight_map=SINK,
            reweight=kernels.Clip(-0.05, 1.1),
        ),
        K,
    ),
    "lists of small blocks, distances of all heads": (
        AttentionSpec(
            mask=kernels.BlockLists(
                3, 5, ((0, 3), (1,), (2, 0), (), (1, 3), (0,), (2,))
            )
            | kernels.BlockMask(19, 10),
            score=kernels.RelativeBias(2, "near"),
        ),
        1,
    ),
    "function of heads": (
        AttentionSpec(
            mask=kernels.MaskFn(EveryOther(3))
            & kernels.MaskFn(per_head_reach, ("reach",), ("head",))
        ),
        K,
    ),
}


def arrays(kv_heads, *, batch=B, heads=H, tokens=T, dtype=jnp.float32):
    rng = np.random.default_rng(7)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q = normal(batch, tokens, heads, D)
    k, v = normal(batch, tokens, kv_heads, D), normal(batch, tokens, kv_heads, E)
    ids = np.repeat([1, 2, 0, 3], [6, 5, 2, 6])[:tokens]
    segments = jnp.asarray(np.stack([ids, ids[::-1]])[:batch], jnp.int32)
    pool = {
        "bias": normal(1, heads, tokens, tokens),
        "alibi_slopes": normal(heads),
        "sink": normal(heads),
        "head_scale": normal(heads),
        "head_norm": normal(1, E),
        "output_gate": normal(batch, tokens, heads, E),
        "strength": normal(heads),
        "tilt": 0.3 * normal(batch, 1, tokens),
        "slant": normal(1, heads, tokens),
        "prefix_len": jnp.asarray([3, 12], jnp.int32)[:batch],
        "q_segment_ids": segments,
        "k_segment_ids": segments,
        "relative_bias": normal(heads, 13),
        "near": normal(1, 5),
        "block_mask": jnp.asarray(rng.random((batch, heads, 5, 7)) < 0.6),
        "visible_keys": jnp.asarray(1.0 + np.arange(tokens))[None, None].astype(dtype),
        "sharpen_offset": jnp.where(jnp.arange(tokens) > 2, 0.5, 0)[None, None],
        "reach": jnp.asarray([0, 3, 50, -1], jnp.int32)[:heads],
    }
    return (
        q,
        k,
        v,
        pool,
        (normal(batch, tokens, heads, E), normal(batch, tokens, heads)),
    )


def operands_of(spec, pool):
    found = {operand.name: pool[operand.name] for operand in spec.operands}
    if "near" in found:
        found["block_mask"] = pool["block_mask"][:1, :1, :1, :2]
    if GATE_A_HEAD in spec.epilogue:
        found["output_gate"] = pool["output_gate"][..., 0]
    return found


def value_and_grads(form, spec, q, k, v, operands, cotangents):
    """Output, log-sum and gradients of a random projection of both."""

    @jax.jit
    def everything(q, k, v, operands):
        names = {operand.name for operand in spec.operands if operand.trains}
        trained = {n: x for n, x in operands.items() if n in names}

        def project(q, k, v, trained):
            given = operands | trained
            request = kernels.make_request(q, k, v, spec, given, TPU)
            out, lse = form(request, q, k, v, given)
            total = (out * cotangents[0]).sum()
            if lse is not None:
                total += jnp.where(lse > -1e9, lse * cotangents[1], 0).sum()
            return total, (out, lse)

        return jax.grad(project, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, trained)

    return everything(q, k, v, operands)


def oracle(spec, *given):
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, given
        )
        return jax.tree.map(np.asarray, value_and_grads(reference.run, spec, *wide))


def agree(got, wanted, eps=3e-6):
    """Equal up to a share of each array's largest entry."""
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, right), left in zip(paths, jax.tree.leaves(got), strict=True):
        finite = np.abs(np.where(np.isfinite(right), right, 0)).max()
        np.testing.assert_allclose(
            left, right, atol=eps * max(1.0, finite), rtol=eps, err_msg=str(path)
        )


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_dense_float64(name):
    spec, kv_heads = CASES[name]
    q, k, v, pool, cotangents = arrays(kv_heads)
    operands = operands_of(spec, pool)
    if "not there" in name:
        operands["kv_mask"] = jnp.arange(T)[None] < jnp.asarray([[17], [4]])
    given = (q, k, v, operands, cotangents)
    agree(value_and_grads(run, spec, *given), oracle(spec, *given))


PLACED = {
    "an offset for each row": (
        AttentionSpec(
            mask=CAUSAL & kernels.BlockMask(3, 4), score=kernels.RelativeBias(6)
        ),
        {"q_offset": jnp.asarray([9, 2], jnp.int32)},
    ),
    "queries and keys in any order": (
        AttentionSpec(mask=kernels.BlockMask(3, 4)),
        {
            "q_positions": jnp.asarray([[3, 11, 0, 14, 5, 8, 2, 9, 16, 1]], jnp.int32),
            "k_positions": jnp.stack([jnp.arange(T)[::-1], (7 * jnp.arange(T)) % T]),
        },
    ),
}


@pytest.mark.parametrize("name", PLACED)
def test_tables_are_read_at_the_positions_that_are_given(name):
    spec, places = PLACED[name]
    q, k, v, pool, cotangents = arrays(1, heads=2)
    operands = operands_of(spec, pool) | places
    given = (q[:, :10], k, v, operands, [x[:, :10] for x in cotangents])
    agree(value_and_grads(run, spec, *given), oracle(spec, *given))


GATE, SCALE = kernels.OutputGate(), kernels.HeadScale()
GATE_A_HEAD, NORM = kernels.OutputGate(per="head"), kernels.HeadRMSNorm()
SHARP = kernels.Sharpen(2, 1e-3)
# Name -> weight map, mask, epilogue, and second pass if any.
MAPS = {
    "bounded softmax": (kernels.Softmax(bound=20.0, sink="logit"), CAUSAL, GATE),
    "softplus": (kernels.SoftplusL1(), kernels.SlidingWindow(5), (NORM, SCALE)),
    "softmax, sharpened": (ONE, CAUSAL, (NORM, GATE), SHARP),
    "softplus, sharpened": (kernels.SoftplusL1(), CAUSAL, (), SHARP),
    "sigmoid, clipped": (kernels.Sigmoid(), PACKED, (), kernels.Clip(-0.1, 1.3)),
    "polynomial": (kernels.Polynomial(eps=0.0), PACKED, ()),
    "softpick": (kernels.Softpick(), PACKED, GATE_A_HEAD),
    "squared relu": (kernels.ReluPower(power=2, factor=0.3), CAUSAL, (NORM, GATE)),
    "normalised elu": (kernels.EluPlusOne(normalise=True), CAUSAL, ()),
}


@pytest.mark.parametrize("name", MAPS)
def test_weight_maps_and_epilogues_equal_dense_float64(name):
    weight_map, mask, epilogue, *again = MAPS[name]
    spec = AttentionSpec(
        mask=mask,
        weight_map=weight_map,
        epilogue=epilogue,
        reweight=again[0] if again else None,
    )
    q, k, v, pool, cotangents = arrays(1, batch=1, heads=2)
    given = (q, k, v, operands_of(spec, pool), cotangents)
    agree(value_and_grads(run, spec, *given), oracle(spec, *given))


RACED = ("causal, cap, bias, alibi, sink", "distances, blocks of heads, second pass")


@pytest.mark.parametrize("name", [*RACED, "packed"])
def test_copies_and_cores_do_not_race(name):
    """Memory starts as NaN, copies land when waited for, two cores share the grid."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    spec = CASES[name][0] if name in CASES else AttentionSpec(mask=PACKED)
    q, k, v, pool, cotangents = arrays(1, batch=1, heads=2, tokens=11)
    given = (q, k, v, operands_of(spec, pool), cotangents)
    how = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    form = functools.partial(run, interpret=how)
    agree(value_and_grads(form, spec, *given), oracle(spec, *given))
    assert not interpret_pallas_call.races.races_found


def attend(form, q, k, v, spec, operands):
    request = kernels.make_request(q, k, v, spec, operands, TPU)
    return form(request, q, k, v, operands)[0]


def grads(form, q, k, v, spec, operands=()):
    def total(q, k, v):
        return jnp.sum(jnp.sin(attend(form, q, k, v, spec, dict(operands))))

    return jax.grad(total, (0, 1, 2))(q, k, v)


def test_vmap_over_seeds_and_over_tables():
    q, k, v, pool, _ = arrays(1, batch=1, heads=2, tokens=11)
    many = jnp.stack([q, 2 * q, -q])
    # Blocks of 8: the first of these sees nothing in a tile that the others see.
    ids = jnp.asarray([[1] * 8 + [2] * 3], jnp.int32)
    packs = jnp.stack([ids, ids[:, ::-1], 0 * ids + 1])
    mask = PACKED & kernels.BlockMask(3, 2)
    marks = pool["block_mask"]
    marks = jnp.stack([marks, ~marks, marks[..., ::-1, :]])
    tables = jnp.stack([pool["relative_bias"] * n for n in range(3)])

    def one(form, q, ids, marks, table):
        operands = {"q_segment_ids": ids, "k_segment_ids": ids}
        operands |= {"block_mask": marks, "relative_bias": table}
        spec = AttentionSpec(mask=mask, score=kernels.RelativeBias(6))
        return grads(form, q, k, v, spec, operands)

    each = (many, packs, marks, tables)
    got = jax.jit(jax.vmap(functools.partial(one, run)))(*each)
    wanted = [one(reference.run, *x) for x in zip(*each, strict=True)]
    agree(got, jax.tree.map(lambda *x: jnp.stack(x), *wanted))


def test_shard_map_sums_the_gradients_of_what_is_shared():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v, pool, _ = arrays(1, heads=1, tokens=11)
    spec = AttentionSpec(mask=PACKED, score=kernels.RelativeBias(6))
    cuts = (P("data"),) * 3 + (P(), P("data"))

    def attend_shard(form, q, k, v, table, ids):
        varying = vary_together((q, k, v, table, ids))
        names = ("relative_bias", "q_segment_ids", "k_segment_ids")
        operands = dict(zip(names, (*varying[3:], varying[4]), strict=True))
        return attend(form, *varying[:3], spec, operands)

    def total(form, *given):
        run_shard = jax.shard_map(
            functools.partial(attend_shard, form),
            mesh=mesh,
            in_specs=cuts,
            out_specs=P("data"),
        )
        return jnp.sum(jnp.sin(run_shard(*given)))

    given = (q, k, v, pool["relative_bias"], pool["q_segment_ids"])
    forms = (functools.partial(run, interpret=pltpu.InterpretParams()), reference.run)
    got, wanted = (
        jax.jit(jax.grad(functools.partial(total, form), (0, 1, 2, 3)))(*given)
        for form in forms
    )
    agree(got, wanted)


def test_scan_and_checkpoint():
    q, k, v, _, _ = arrays(1, batch=1, heads=2)
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, D - E),))
    spec = AttentionSpec(mask=CAUSAL)

    def stack(form):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x, w):
            return x + attend(form, x * w, k, v, spec, {}), None

        weights = jnp.array([0.5, 1.0, 2.0])
        return jax.jit(jax.grad(lambda q: jax.lax.scan(layer, q, weights)[0].sum()))

    agree(stack(run)(q), stack(reference.run)(q), eps=1e-5)


def test_bfloat16_is_as_near_as_rounding_allows():
    q, k, v, _, _ = arrays(K, dtype=jnp.bfloat16)
    spec = AttentionSpec(mask=CAUSAL)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    forms = ((run, (q, k, v)), (reference.run, wide))
    got, wanted = (
        jax.jit(lambda *x, f=form: (attend(f, *x, spec, {}), *grads(f, *x, spec)))(*x)
        for form, x in forms
    )
    assert all(x.dtype == jnp.bfloat16 for x in got)
    agree([x.astype(jnp.float32) for x in got], wanted, eps=2e-2)
