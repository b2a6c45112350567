"""When the TPU kernels are taken, and which tiles they visit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnjax import kernels
from attnjax.kernels import AttentionSpec, Target, mosaic_tpu
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.mosaic_tpu import blocks, layout, steps, tables

TPU = Target("tpu", "TPU v5 lite")
CAUSAL = AttentionSpec(mask=kernels.Causal())
PACKED = AttentionSpec(mask=kernels.Causal() & kernels.Segments())


def shapes(dtype=jnp.bfloat16, *, b=2, t=48, h=4, kv=2, d=64, e=64):
    make = jax.ShapeDtypeStruct
    return (
        make((b, t, h, d), dtype),
        make((b, t, kv, d), dtype),
        make((b, t, kv, e), dtype),
    )


def request_of(spec, operands=(), *, target=TPU, **sizes):
    return kernels.make_request(*shapes(**sizes), spec, dict(operands), target)


def test_auto_takes_the_kernels_on_a_tpu_and_says_so():
    lines = kernels.explain(*shapes(), CAUSAL, target=TPU)
    assert lines[0] == "uses mosaic_tpu on tpu"
    assert "mosaic_tpu: supports it" in lines
    traced = jax.make_jaxpr(
        lambda q, k, v: kernels.attention(q, k, v, CAUSAL, target=TPU)
    )(*shapes())
    assert "pallas_call" in str(traced)


def test_a_bias_of_less_than_a_tile_is_taken():
    """Of 49 tokens, a window of 7 x 7, where a tile has 128 keys."""
    spec, bias = AttentionSpec(score=kernels.Bias()), jnp.zeros((1, 4, 49, 49))
    assert mosaic_tpu.supports(request_of(spec, {"bias": bias}, t=49)) is None


def test_products_of_mixed_dtypes_are_float32():
    q, k, v = shapes()
    wide = jax.ShapeDtypeStruct(k.shape, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        traced = jax.make_jaxpr(
            lambda q, k, v: kernels.attention(q, k, v, CAUSAL, target=TPU)
        )(q, wide, v)
    assert traced.out_avals[0].dtype == jnp.bfloat16
    assert re.search(r"f32\[\d+,\d+\] = dot_general", str(traced))
    assert "preferred_element_type=float32" in str(traced)
    assert "HIGHEST" in str(traced)


def table_score(s, b, h, q, k, table):
    return s + table[(q + k) % 3]


TABLE = AttentionSpec(score=kernels.ScoreFn(table_score, ("table",), ("table",)))
REFUSED = {
    "cpu": ("needs platform tpu, not cpu", CAUSAL, {"target": Target("cpu")}),
    "float16": ("not float16", CAUSAL, {"dtype": jnp.float16}),
    "wide": ("D and E <= 512, not D=520, E=64", CAUSAL, {"d": 520}),
    "one query": ("with T=1, below 8, reads the cache", AttentionSpec(), {"t": 1}),
    "mesh": (
        "inside shard_map in a program for 4 devices",
        CAUSAL,
        {"target": dataclasses.replace(TPU, num_devices=4)},
    ),
    "second pass of a step": (
        "with T=4, below 8, takes no second pass over rows, as Clip",
        AttentionSpec(reweight=kernels.Clip(-0.1, 1.1)),
        {"t": 4, "d": 128, "e": 128},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name):
    reason, spec, sizes = REFUSED[name]
    request = request_of(spec, **sizes)
    assert reason in mosaic_tpu.supports(request)
    with pytest.raises(NotImplementedError, match="Use implementation='auto'"):
        kernels.choose(request, "mosaic_tpu")


def sorted_distance(b, h, q, k):
    return jnp.sort(q - k) > 0


@dataclasses.dataclass(frozen=True)
class Ranked(kernels.Reweight):
    def apply(self, p, peak, tile):
        return p * jnp.argsort(p)

    def slope(self, p, peak, tile):
        return jnp.ones_like(p)


@dataclasses.dataclass(frozen=True)
class RunningSum(kernels.WeightMap):
    def unnormalized(self, s, shift):
        return jnp.cumsum(jax.nn.sigmoid(s), axis=-1)

    def slope(self, s, u):
        return u


BLOCKS = tuple((i, 0) for i in range(8))
TABLES = {
    "score": ("a table, as operand 'table' is", TABLE, {"table": (3,)}),
    "moved distances": (
        "along diagonals, which needs positions that count up by one, not operand "
        "'k_positions'",
        AttentionSpec(score=kernels.RelativeBias(7)),
        {"relative_bias": (4, 15), "k_positions": (1, 1024)},
    ),
    "ranks": (
        "has no sort in a kernel, which Ranked takes",
        AttentionSpec(reweight=Ranked()),
        {},
    ),
    "sort": (
        "has no sort in a kernel, which MaskFn takes",
        AttentionSpec(mask=kernels.MaskFn(sorted_distance)),
        {},
    ),
    "running sum": (
        "has no cumsum in a kernel, which RunningSum takes",
        AttentionSpec(weight_map=RunningSum()),
        {},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_look_ups_are_refused_and_auto_takes_another(name):
    reason, spec, sizes = TABLES[name]
    dtypes = {"k_positions": jnp.int32}
    operands = {
        n: jax.ShapeDtypeStruct(x, dtypes.get(n, jnp.float32)) for n, x in sizes.items()
    }
    lines = kernels.explain(*shapes(t=1024), spec, operands, target=TPU)
    assert lines[0] == "uses blocked on tpu"
    assert any("mosaic_tpu: " in line and reason in line for line in lines)


def test_a_step_of_decoding_looks_nothing_up():
    operands = {"block_mask": jax.ShapeDtypeStruct((2, 4, 1, 6), jnp.bool_)}
    request = request_of(
        AttentionSpec(mask=kernels.BlockMask(8, 8)), operands, t=4, d=128, e=128
    )
    assert "values up in a table, as operand 'block_mask'" in mosaic_tpu.supports(
        request
    )


def test_lists_of_whole_blocks_need_no_look_up():
    spec = AttentionSpec(mask=kernels.BlockLists(128, 128, BLOCKS))
    request = request_of(spec, t=1024)
    assert mosaic_tpu.supports(request) is None
    whole, wider = (blocks.plan_blocks(request, (n, n)) for n in (128, 256))
    assert not blocks.masks_inside(whole)
    assert layout.operand_forms(whole) == {}
    assert layout.operand_forms(wider) == {"block_lists_0": "marks"}


TABLED = AttentionSpec(
    mask=kernels.Causal() & kernels.BlockMask(16, 8),
    score=kernels.RelativeBias(7),
    reweight=kernels.Clip(-0.1, 1.1),
)
SHARED = {
    "known tiles": (CAUSAL, 3),
    "tiles found on the device": (
        dataclasses.replace(PACKED, score=kernels.ALiBi()),
        3,
    ),
    "tables and a second pass": (TABLED, 5),
}


@pytest.mark.parametrize("name", SHARED)
def test_inside_shard_map_a_mesh_is_no_obstacle(name):
    several = dataclasses.replace(TPU, num_devices=4)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=auto)
    spec, count = SHARED[name]
    make = jax.ShapeDtypeStruct
    pool = {
        "q_segment_ids": (make((4, 48), jnp.int32), P("data")),
        "k_segment_ids": (make((4, 48), jnp.int32), P("data")),
        "block_mask": (make((4, 4, 3, 6), jnp.bool_), P("data")),
        "alibi_slopes": (make((4,), jnp.float32), P()),
        "relative_bias": (make((4, 15), jnp.float32), P()),
    }
    given = {o.name: pool[o.name] for o in spec.operands}
    operands, places = ({n: x[i] for n, x in given.items()} for i in (0, 1))
    trained = {n: x for n, x in operands.items() if x.dtype == jnp.float32}

    def run(q, k, v, operands):
        return kernels.attention(q, k, v, spec, operands, target=several)

    cuts = (P("data"),) * 3 + (places,)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=cuts, out_specs=P("data"))

    def total(q, k, v, trained, operands):
        return sharded(q, k, v, operands | trained).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(total, (0, 1, 2, 3)))
    traced = step.trace(*shapes(b=4), trained, operands)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("custom_call @tpu_custom_call") == count


def kinds_of(spec, operands=(), block=16, **sizes):
    plan = BlockPlan(request_of(spec, operands, **sizes), block, block)
    return plan, np.asarray(steps.tile_kinds(plan, dict(operands)))


def walked(words):
    """(row, column, kind) of each step, and flags of its row's first and last."""
    return [
        (
            steps.row_of(w),
            steps.column_of(w),
            steps.kind_of(w),
            bool(w & 4),
            bool(w & 8),
        )
        for w in np.asarray(words).tolist()
    ]


def test_known_masks_walk_only_the_tiles_they_need():
    _, kinds = kinds_of(CAUSAL)
    assert walked(steps.list_steps(kinds)[0, 0]) == [
        (0, 0, steps.PARTIAL, True, True),
        (1, 0, steps.FULL, True, False),
        (1, 1, steps.PARTIAL, False, True),
        (2, 0, steps.FULL, True, False),
        (2, 1, steps.FULL, False, False),
        (2, 2, steps.PARTIAL, False, True),
    ]
    window = AttentionSpec(mask=kernels.SlidingWindow(3))
    by_keys = steps.list_steps(steps.by_keys(*kinds_of(window, t=160)))
    assert by_keys.shape == (1, 1, 19)


def test_marked_blocks_are_the_only_ones_that_a_head_visits():
    marks = np.zeros((2, 4, 6, 6), bool)
    marks[:, :, 0, 0] = marks[0, 1, 5, 2] = marks[1, 3, 4] = True
    spec = AttentionSpec(mask=kernels.Causal() & kernels.BlockMask(8, 8))
    plan, kinds = kinds_of(spec, {"block_mask": jnp.asarray(marks)})
    assert kinds.shape == (2, 4, 3, 3)
    wanted = np.zeros_like(kinds)
    wanted[:, :, 0, 0] = wanted[0, 1, 2, 1] = steps.PARTIAL
    wanted[1, 3, 2] = steps.PARTIAL
    np.testing.assert_array_equal(kinds, wanted)
    # Without the diagonal, a tile is full where all its blocks are marked.
    marks[0, 1, 4:, 2:4] = [[1, 1], [1, 0]]
    marks[0, 1, 4:, :2] = True
    either = AttentionSpec(mask=kernels.BlockMask(8, 8))
    full = kinds_of(either, {"block_mask": jnp.asarray(marks)})[1] == steps.FULL
    assert np.argwhere(full[0]).tolist() == [[1, 2, 0]]
    words = steps.list_steps(jnp.asarray(kinds))
    assert [step[:3] for step in walked(words[0, 1])[6:]] == [
        (2, 1, 1),
        (2, 1, 0),
        (2, 1, 0),
    ]
    # Over keys each pair of a head and a block of queries is a step of its own.
    turned = steps.list_steps(steps.by_keys(plan, jnp.asarray(kinds)))
    assert turned.shape == (2, 2, 3 * 2 * 3)
    assert [step[:3] for step in walked(turned[1, 1])[6:9]] == [
        (1, 3 + 2, 1),
        (1, 3 + 2, 0),
        (1, 3 + 2, 0),
    ]


@pytest.mark.parametrize("mask_q", [3, 8, 1])
def test_marks_of_a_tile_are_those_of_the_array(mask_q):
    """Block rows of one word, of two, and of as many as a tile has queries."""
    length, size = 108, 18 if mask_q > 1 else 54
    mask = kernels.BlockMask(mask_q, 5)
    marks = np.random.default_rng(2).random((1, 4, -(-length // mask_q), 20)) < 0.5
    request = request_of(AttentionSpec(mask=mask), {"block_mask": marks}, t=length)
    plan = BlockPlan(request, size, size)
    assert tables._in_one_word(plan, mask) == (mask_q == 8)
    words = layout.arrange_operands(plan, {"block_mask": jnp.asarray(marks)})
    words = words["block_mask"]
    dense = np.zeros((length, length), bool)
    seen = marks[0, 1].repeat(mask_q, 0)[:length].repeat(5, 1)
    dense[:, : seen.shape[1]] = seen
    for i, j in ((0, 0), (length // size - 1, 1), (1, length // size - 1)):
        place = layout.Place(0, 1, jnp.int32(i), jnp.int32(j))
        spec = tables.spec_of(plan, "block_mask", words.shape, lambda at=place: at)
        b, h, n, _, column = spec.index_map()
        part = words[b, h, n, :, int(column) * size : (int(column) + 1) * size]
        q, k = layout._numbers(plan, place, False)
        tile = kernels.Tile(0, 1, q, k, {"block_mask": part})
        (found,) = tables.mark_tiles(plan, tile, place, swapped=False).values()
        rows, columns = (slice(x * size, (x + 1) * size) for x in (i, j))
        np.testing.assert_array_equal(found, dense[rows, columns])


def test_lists_that_do_not_fit_the_scalar_memory_are_shared():
    spec = AttentionSpec(mask=kernels.BlockMask(1, 1))
    marks = jnp.zeros((4, 4, 256, 256), bool).at[1, 2, 3, 5].set(True)
    _, kinds = kinds_of(spec, {"block_mask": marks}, block=1, b=4, t=256)
    assert kinds.shape == (1, 1, 256, 256)
    assert (kinds[0, 0] != steps.EMPTY).sum() == 1
    assert kinds[0, 0, 3, 5] == steps.PARTIAL


def test_documents_are_skipped_in_each_row_of_the_batch():
    ids = jnp.asarray(np.stack([np.repeat([1, 2, 3], 16), np.ones(48, int)]), jnp.int32)
    operands = {"q_segment_ids": ids, "k_segment_ids": ids}
    _, kinds = kinds_of(PACKED, operands)
    assert (kinds[0, 0] == steps.PARTIAL * np.eye(3)).all()
    np.testing.assert_array_equal(kinds[1], kinds_of(CAUSAL)[1][0])
    first, second = map(walked, steps.list_steps(jnp.asarray(kinds))[:, 0])
    assert len(first) == len(second) == 9
    # What is left over names the tile before it, so that nothing is fetched.
    assert [step[:3] for step in first[3:6]] == [(1, 1, 1), (1, 1, 0), (1, 1, 0)]
    assert [step[3:] for step in first[3:6]] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert [step[:3] for step in second[3:6]] == [(1, 0, 2), (1, 1, 1), (1, 1, 0)]


@pytest.mark.parametrize("mask", [kernels.Full(), kernels.Prefix()])
def test_padding_of_queries_and_keys_is_masked(mask):
    operands = {"prefix_len": jnp.asarray([100])} if mask.operands else {}
    _, kinds = kinds_of(AttentionSpec(mask=mask), operands, t=40)
    assert (kinds[0, 0, :2, :2] == steps.FULL).all()
    assert (kinds[0, 0, 2] == steps.PARTIAL).all()
    assert (kinds[0, 0, :, 2] == steps.PARTIAL).all()


def test_blocks_fit_the_lengths_and_the_memory():
    def sizes(spec=CAUSAL, operands=(), **shape):
        plan = blocks.plan_blocks(request_of(spec, operands, **shape), None)
        return plan.block_q, plan.block_k

    assert sizes(t=197) == (256, 256)
    assert sizes(t=9) == (128, 128)
    assert sizes(t=8192, d=512) == (256, 256)
    assert sizes(AttentionSpec(), t=8192) == blocks.WIDEST
    assert sizes(AttentionSpec(), t=8192, d=256) == (512, 512)
    assert sizes(AttentionSpec(), t=8192, dtype=jnp.float32) == (512, 512)
    window = AttentionSpec(mask=kernels.SlidingWindow(127))
    assert max(sizes(window, t=8192)) < 512
    bias = {"bias": jax.ShapeDtypeStruct((1, 4, 4096, 4096), jnp.float32)}
    assert sizes(AttentionSpec(score=kernels.Bias()), bias, t=4096) == (512, 512)
    marks = {"block_mask": jax.ShapeDtypeStruct((1, 1, 32, 16), jnp.bool_)}
    marked = AttentionSpec(mask=kernels.BlockMask(128, 256))
    assert sizes(marked, marks, t=4096) == (128, 128)
    again = AttentionSpec(reweight=kernels.Clip())
    assert sizes(again, t=8192) == (512, 512)
