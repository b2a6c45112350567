"""What the Hopper kernels refuse, what they lower, and how large their tiles are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from attnjax import kernels
from attnjax.kernels import AttentionSpec, mosaic_gpu
from attnjax.kernels.mosaic_gpu import refusals, tiles
from attnjax.kernels.mosaic_gpu.inline import inline

H200 = kernels.Target("gpu", "NVIDIA H200")
CAUSAL = kernels.Causal()


@dataclasses.dataclass(frozen=True)
class EveryOther:
    stride: int

    def __call__(self, b, h, q, k):
        return (q - k) % (self.stride + 0 * h) == 0


def of_four_axes(b, h, q, k):
    return q[:, :, :, 0] == k[:, :, 0]


def rooted(s, b, h, q, k):
    return jnp.sqrt(jnp.abs(s))


def looked_up(s, b, h, q, k, table):
    return s + table[(q + 3 * k) % 7]


def swished(s, b, h, q, k, row, column):
    return jax.nn.relu(s * row) * s + jax.nn.sigmoid(column)


@dataclasses.dataclass(frozen=True)
class Sorted(kernels.EpilogueStep):
    axes: str = ""

    @property
    def operands(self):
        if not self.axes:
            return ()
        return (kernels.Operand("table", self.axes, "float"),)

    def apply(self, o, arrays):
        return jnp.sort(o, axis=-1)


@dataclasses.dataclass(frozen=True)
class OverQueries(kernels.EpilogueStep):
    def apply(self, o, arrays):
        return o - o.sum(-2, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Flattened(kernels.EpilogueStep):
    def apply(self, o, arrays):
        return o.reshape(-1).reshape(o.shape)


@dataclasses.dataclass(frozen=True)
class SortedWeights(kernels.Reweight):
    def apply(self, p, peak, tile):
        return jnp.sort(p, axis=-1)

    def slope(self, p, peak, tile):
        return p


@dataclasses.dataclass(frozen=True)
class ByPosition(kernels.Reweight):
    def apply(self, p, peak, tile):
        return p * tile.q.astype(p.dtype)

    def slope(self, p, peak, tile):
        return p


def request_of(spec, *, b=2, t=256, s=256, h=4, kv=2, d=64, e=64, **more):
    dtype, target = more.pop("dtype", jnp.bfloat16), more.pop("target", H200)
    given = jax.ShapeDtypeStruct
    qkv = [
        given(shape, dtype) for shape in ((b, t, h, d), (b, s, kv, d), (b, s, kv, e))
    ]
    whole = ("segment_ids", "prefix_len", "q_offset", "positions")
    pool = {
        name: given(shape, jnp.int32 if name.endswith(whole) else jnp.float32)
        for name, shape in {
            "q_segment_ids": (b, t),
            "k_segment_ids": (b, s),
            "prefix_len": (b,),
            "sink": (h,),
            "bias": (1, h, t, s),
            "alibi_slopes": (h,),
            "row": (b, 1, t),
            "column": (b, h, s),
            "table": (7,),
            "relative_bias": (h, 7),
            "visible_keys": (1, 1, t),
            "sharpen_offset": (b, h, t),
            "head_norm": (h, e),
            "head_scale": (h,),
            "output_gate": (b, t, h, e),
        }.items()
    }
    operands = {x.name: pool[x.name] for x in spec.operands if x.name in pool} | more
    return kernels.make_request(*qkv, spec, operands, target), qkv, operands


REFUSED = {
    "a CPU": ("needs platform gpu", AttentionSpec(), {"target": kernels.Target("cpu")}),
    "Blackwell": (
        "Hopper (sm_90a: H100, H200, H20, H800, GH200), not 'NVIDIA B200'",
        AttentionSpec(),
        {"target": kernels.Target("gpu", "NVIDIA B200")},
    ),
    "Ampere": (
        "not 'NVIDIA A100",
        AttentionSpec(),
        {"target": kernels.Target("gpu", "NVIDIA A100-SXM4-80GB")},
    ),
    "float32": ("bfloat16 or all float16", AttentionSpec(), {"dtype": jnp.float32}),
    "wide heads": ("at most 256, not D=320, E=64", AttentionSpec(), {"d": 320}),
    "a second pass that sorts": (
        "cannot lower 'sort', which reweight=SortedWeights()",
        AttentionSpec(reweight=SortedWeights()),
        {},
    ),
    "a second pass by position": (
        "gives reweight=ByPosition() one head's tile [t, s], on which it fails",
        AttentionSpec(reweight=ByPosition()),
        {},
    ),
    "a table": (
        "'table' is a table",
        AttentionSpec(score=kernels.ScoreFn(looked_up, ("table",), ("table",))),
        {},
    ),
    "four axes": (
        "one head's tile [t, s], on which it fails",
        AttentionSpec(kernels.MaskFn(of_four_axes)),
        {},
    ),
    "small blocks": (
        "64 queries and keys or multiples, not 64 and 32",
        AttentionSpec(kernels.BlockLists(64, 32, ((0,), (0, 1), (0,), (2,)))),
        {},
    ),
    "blocks at an offset": (
        "finds the blocks of BlockLists without positions alone",
        AttentionSpec(kernels.BlockLists(128, 128, ((0,), (0, 1)))),
        {"q_offset": jax.ShapeDtypeStruct((), jnp.int32)},
    ),
    "distances of positions": (
        "RelativeBias without positions, an offset aside; got ['k_positions']",
        AttentionSpec(score=kernels.RelativeBias(3)),
        {"k_positions": jax.ShapeDtypeStruct((1, 256), jnp.int32)},
    ),
    "an epilogue that sorts": (
        "cannot lower 'sort', which epilogue=(Sorted(",
        AttentionSpec(epilogue=Sorted()),
        {},
    ),
    "an epilogue over queries": (
        "a kernel reduces a tile over its last axis; got reduce_sum of (64, 64)",
        AttentionSpec(epilogue=OverQueries()),
        {},
    ),
    "an epilogue that turns": (
        "a kernel keeps the axes of a tile; got reshape from (64, 64) to (4096,)",
        AttentionSpec(epilogue=Flattened()),
        {},
    ),
    "an epilogue with a table": (
        "by row and feature; 'table' has axes '*'",
        AttentionSpec(epilogue=Sorted("*")),
        {},
    ),
    "an epilogue of one feature": (
        "keeps rows of an epilogue apart from features; E is 1",
        AttentionSpec(epilogue=kernels.HeadScale()),
        {"e": 1},
    ),
    "a square root": (
        "cannot lower 'sqrt', which score=(ScoreFn(",
        AttentionSpec(score=kernels.ScoreFn(rooted)),
        {},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    text, spec, options = REFUSED[name]
    assert text in mosaic_gpu.supports(request_of(spec, **options)[0])


@pytest.mark.parametrize(
    "kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "GH200 480GB"]
)
def test_takes_hopper(kind):
    target = kernels.Target("gpu", kind)
    assert mosaic_gpu.supports(request_of(AttentionSpec(), target=target)[0]) is None


def test_is_never_chosen_by_itself():
    assert mosaic_gpu.RANK == {}


SWISHED = kernels.ScoreFn(swished, ("row", "column"), ("row", "column"))
LOWERED = {
    "full": (AttentionSpec(), {}),
    "causal, D = 256": (AttentionSpec(CAUSAL), {"d": 256, "e": 256}),
    "latent, D != E": (AttentionSpec(CAUSAL), {"d": 192, "e": 128, "kv": 4}),
    "lengths and dims with padding": (
        AttentionSpec(CAUSAL),
        {"t": 77, "s": 77, "d": 80},
    ),
    "float16": (AttentionSpec(CAUSAL, return_lse=True), {"dtype": jnp.float16}),
    "window": (AttentionSpec(kernels.SlidingWindow(9, 4, sinks=2)), {}),
    "block lists": (
        AttentionSpec(CAUSAL | kernels.BlockLists(64, 128, ((0,), (1,), (), (0,)))),
        {},
    ),
    "block mask by head": (
        AttentionSpec(CAUSAL & kernels.BlockMask(64, 64)),
        {"block_mask": jax.ShapeDtypeStruct((2, 4, 4, 4), jnp.bool_)},
    ),
    "neighbourhood": (
        AttentionSpec(
            kernels.Neighborhood((16, 16), window=5, dilation=2) | kernels.Dilated(7)
        ),
        {},
    ),
    "packed": (AttentionSpec(CAUSAL & kernels.Segments()), {}),
    "prefix, sink": (
        AttentionSpec(CAUSAL | kernels.Prefix(), weight_map=kernels.Softmax("logit")),
        {},
    ),
    "dilated, bounded": (
        AttentionSpec(
            CAUSAL & kernels.MaskFn(EveryOther(3)),
            score=kernels.SoftCap(20.0),
            weight_map=kernels.Softmax("off_by_one", bound=20.0),
        ),
        {},
    ),
    "cap, bias, alibi": (
        AttentionSpec(
            CAUSAL,
            score=(kernels.SoftCap(2.0), kernels.Bias(), kernels.ALiBi()),
        ),
        {},
    ),
    "distances": (
        AttentionSpec(CAUSAL, score=(kernels.SoftCap(9.0), kernels.RelativeBias(3))),
        {},
    ),
    "clipped, gated": (
        AttentionSpec(
            CAUSAL,
            reweight=kernels.Clip(-0.1, 1.1),
            epilogue=kernels.OutputGate(),
            weight_map=kernels.Softmax("logit"),
        ),
        {},
    ),
    "sharpened": (
        AttentionSpec(
            CAUSAL, weight_map=kernels.SoftplusL1(), reweight=kernels.Sharpen(15)
        ),
        {"d": 192, "e": 128, "kv": 4},
    ),
    "clipped, elementwise": (
        AttentionSpec(weight_map=kernels.Sigmoid(-2.0), reweight=kernels.Clip()),
        {},
    ),
    "rows and columns": (AttentionSpec(CAUSAL, score=SWISHED), {}),
    "sigmoid": (AttentionSpec(CAUSAL, weight_map=kernels.Sigmoid(-2.0)), {}),
    "softplus": (AttentionSpec(CAUSAL, weight_map=kernels.SoftplusL1()), {}),
    "relu": (AttentionSpec(weight_map=kernels.ReluPower(1)), {}),
    "relu power": (AttentionSpec(weight_map=kernels.ReluPower(2)), {}),
    "polynomial": (AttentionSpec(CAUSAL, weight_map=kernels.Polynomial()), {}),
    "softpick": (AttentionSpec(CAUSAL, weight_map=kernels.Softpick()), {}),
    "elu": (AttentionSpec(weight_map=kernels.EluPlusOne(normalise=True)), {}),
    "normed and gated": (
        AttentionSpec(epilogue=(kernels.HeadRMSNorm(), kernels.OutputGate())),
        {"d": 80, "e": 80},
    ),
    "scaled, gated by row": (
        AttentionSpec(
            CAUSAL,
            weight_map=kernels.Sigmoid(-2.0),
            epilogue=(kernels.HeadScale(), kernels.OutputGate("head", "none")),
        ),
        {"output_gate": jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)},
    ),
}


def traced(name):
    spec, options = LOWERED[name]
    request, qkv, operands = request_of(spec, **options)
    assert mosaic_gpu.supports(request) is None
    trained = {n for n, x in operands.items() if jnp.issubdtype(x.dtype, jnp.inexact)}

    def total(qkv, some, rest):
        out, lse = mosaic_gpu.run(request, *qkv, some | rest)
        total = out.astype(jnp.float32).sum()
        return total + lse.sum() if spec.return_lse else total

    some = {n: x for n, x in operands.items() if n in trained}
    rest = {n: x for n, x in operands.items() if n not in trained}
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).trace(qkv, some, rest)


def lowered_text(name):
    return traced(name).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.pallas
@pytest.mark.parametrize("name", LOWERED)
def test_forward_and_backward_lower_for_cuda(name):
    text = lowered_text(name)
    calls = re.findall(r"@mosaic_gpu_v2\b", text)
    joint = tiles.joint_dkv(
        *(tiles.padded_dim(LOWERED[name][1].get(x, 64)) for x in "de")
    )
    spec = LOWERED[name][0]
    more = name == "distances"
    if spec.reweight is not None:
        more = 1 + spec.weight_map.needs_sum
    assert len(calls) == (3 if joint else 4) + more


@pytest.mark.pallas
def test_kernels_lower_under_vmap_and_inside_shard_map():
    spec = AttentionSpec(CAUSAL & kernels.Segments(), score=kernels.ALiBi())
    request, qkv, operands = request_of(spec)
    slopes = operands.pop("alibi_slopes")

    def total(slopes, qkv, ids):
        return mosaic_gpu.run(request, *qkv, ids | {"alibi_slopes": slopes})[0].sum()

    def twice(x):
        return jax.ShapeDtypeStruct((2, *x.shape), x.dtype)

    gradients = jax.grad(total, argnums=(0, 1))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("seed",), axis_types=auto)
    spread = P("seed")

    def one(slopes, qkv, ids):
        qkv, ids = jax.tree.map(lambda x: x[0], (qkv, ids))
        slopes = jax.lax.pcast(slopes, "seed", to="varying")
        return jax.tree.map(lambda x: x[None], gradients(slopes, qkv, ids))

    inside = jax.shard_map(
        one, mesh=mesh, in_specs=(P(), spread, spread), out_specs=spread
    )
    mapped = jax.vmap(gradients, in_axes=(None, 0, 0))
    given = slopes, [twice(x) for x in qkv], {n: twice(x) for n, x in operands.items()}
    for program in (mapped, inside):
        traced = jax.jit(program).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert len(re.findall(r"@mosaic_gpu_v2\b", text)) == 3


def test_hooks_that_are_off_leave_the_plain_kernel():
    LOWERED["empty hooks"] = (AttentionSpec(kernels.Full(), score=()), {})
    names = ("full", "full", "empty hooks", "window")
    jaxprs = [re.sub(r"0x[0-9a-f]+", "", str(traced(name).jaxpr)) for name in names]
    assert jaxprs[0] == jaxprs[2] != jaxprs[3]
    texts = [lowered_text(name) for name in names[:3]]
    # jax 0.11 numbers what it lowers: one program has a new text each time.
    numbered = texts[0] != texts[1]
    assert numbered or texts[0] == texts[2]


def test_primitives_are_those_that_jax_lowers():
    lowering = pytest.importorskip("jax._src.pallas.mosaic_gpu.lowering")
    core = pytest.importorskip("jax._src.pallas.mosaic_gpu.core")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lane = plgpu.LoweringSemantics.Lane, core.PrimitiveSemantics.Warpgroup
    known = {primitive.name for primitive in lowering.mosaic_lowering_rules[lane]}
    assert refusals.PRIMITIVES - {"pjit"} <= known


def test_inline_opens_wrapped_functions_and_additions():
    def fn(x):
        return jax.nn.relu(x) * x + jax.nn.silu(x)

    def slope(x, one):
        return jax.jvp(fn, (x,), (one,))

    x = jnp.linspace(-2.0, 2.0, 7)
    jaxpr = jax.make_jaxpr(lambda x: inline(slope, x, jnp.ones_like(x)))(x)
    names = set(refusals._primitives(jaxpr.jaxpr))
    assert not names & refusals.INLINED
    for got, wanted in zip(
        inline(slope, x, jnp.ones(7)), slope(x, jnp.ones(7)), strict=True
    ):
        assert jnp.array_equal(got, wanted)


@pytest.mark.parametrize("d", range(64, 257, 64))
@pytest.mark.parametrize("e", range(64, 257, 64))
def test_tiles_fit_into_shared_memory(d, e):
    assert tiles.forward_bytes(tiles.forward_tiles(d, e), d, e) <= tiles.SHARED_MEMORY
    back = tiles.backward_tiles(d, e)
    assert tiles.backward_bytes(back, d, e) <= tiles.SHARED_MEMORY
    along = tiles.diagonal_tiles(back, d, e)
    assert tiles.diagonal_bytes(along, d, e) <= tiles.SHARED_MEMORY


def test_wrong_tiles_are_refused():
    spec = AttentionSpec(kernels.BlockMask(64, 64))
    marks = jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.bool_)
    request, qkv, operands = request_of(spec, block_mask=marks)

    def run(qkv, operands):
        sizes = (tiles.Tiles(128), tiles.Tiles(64))
        return mosaic_gpu.run(request, *qkv, operands, tiles=sizes)

    with pytest.raises(ValueError, match=r"step must be 64 for blocks .* got 128"):
        jax.eval_shape(run, qkv, operands)
    with pytest.raises(ValueError, match=r"step must be one of \(64, 128\); got 96"):
        tiles.Tiles(step=96)
    with pytest.raises(ValueError, match=r"stages must be at least 1; got stages=0"):
        tiles.Tiles(stages=0)
