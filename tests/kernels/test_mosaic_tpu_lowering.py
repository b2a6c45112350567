"""The TPU kernels become Mosaic modules on any machine, in every variant."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from attnjax import kernels
from attnjax.kernels import AttentionSpec, Target

pytestmark = pytest.mark.pallas

TPU = Target("tpu", "TPU v5 lite")
CAUSAL = kernels.Causal()
F32, I32, BF16 = jnp.float32, jnp.int32, jnp.bfloat16
B, T, H = 2, 1024, 4


@dataclasses.dataclass(frozen=True)
class EveryOther:
    stride: int

    def __call__(self, b, h, q, k):
        return (q - k) % (self.stride + 0 * h) == 0


def rows_and_columns(s, b, h, q, k, tilt, slant, strength):
    return s * (1 + tilt) + slant - strength * jnp.log1p(jnp.exp2(-s))


BY_ROWS = kernels.ScoreFn(
    rows_and_columns, ("tilt", "slant", "strength"), ("row", "column", "batch")
)
POOL = {
    "bias": ((1, H, T, T), BF16),
    "alibi_slopes": ((H,), F32),
    "sink": ((H,), F32),
    "tilt": ((B, H, T), BF16),
    "slant": ((1, 1, T), F32),
    "strength": ((B,), F32),
    "output_gate": ((B, T, H, 64), BF16),
    "head_scale": ((H,), F32),
    "head_norm": ((H, 64), F32),
    "relative_bias": ((H, 201), F32),
    "block_mask": ((B, H, 16, 32), jnp.bool_),
    "visible_keys": ((B, 1, T), F32),
    "sharpen_offset": ((1, 1, T), F32),
    "prefix_len": ((B,), I32),
    "q_segment_ids": ((B, T), I32),
    "k_segment_ids": ((B, T), I32),
    "kv_mask": ((1, T), jnp.bool_),
    "q_offset": ((B,), I32),
}
MASKS = {
    "full": AttentionSpec(),
    "causal": AttentionSpec(mask=CAUSAL),
    "window": AttentionSpec(mask=kernels.SlidingWindow(100, 7, sinks=3)),
    "prefix": AttentionSpec(mask=CAUSAL | kernels.Prefix()),
    "packed": AttentionSpec(mask=CAUSAL & kernels.Segments()),
    "function": AttentionSpec(mask=kernels.MaskFn(EveryOther(3))),
    "neighbourhood": AttentionSpec(
        mask=kernels.Neighborhood((32, 32), 7, stride=2, causal=(True, False))
    ),
    "dilated": AttentionSpec(mask=CAUSAL & kernels.Dilated(3)),
    "block lists": AttentionSpec(
        mask=kernels.BlockLists(128, 128, tuple((i, 0) for i in range(8)))
    ),
    "lists of odd blocks": AttentionSpec(
        mask=CAUSAL & kernels.BlockLists(48, 80, tuple((i % 13, 0) for i in range(22)))
    ),
    "blocks of heads": AttentionSpec(mask=CAUSAL & kernels.BlockMask(64, 32)),
}
SCORES = {
    "cap": AttentionSpec(mask=CAUSAL, score=kernels.SoftCap(30.0)),
    "bias": AttentionSpec(score=kernels.Bias()),
    "alibi": AttentionSpec(mask=CAUSAL, score=kernels.ALiBi()),
    "function": AttentionSpec(score=BY_ROWS),
    "distances": AttentionSpec(mask=CAUSAL, score=kernels.RelativeBias(100)),
}
MAPS = {
    "sink": kernels.Softmax(sink="logit"),
    "off by one": kernels.Softmax(sink="off_by_one"),
    "bounded": kernels.Softmax(bound=20.0),
    "sigmoid": kernels.Sigmoid(-6.0),
    "softplus": kernels.SoftplusL1(),
    "polynomial": kernels.Polynomial(),
    "softpick": kernels.Softpick(),
    "relu": kernels.ReluPower(power=2),
    "elu": kernels.EluPlusOne(normalise=True),
}
EPILOGUES = {
    "gate": kernels.OutputGate(),
    "gate by head": kernels.OutputGate(per="head"),
    "norm and scale": (kernels.HeadRMSNorm(), kernels.HeadScale()),
}
VARIANTS = {f"mask {name}": spec for name, spec in MASKS.items()}
VARIANTS |= {f"score {name}": spec for name, spec in SCORES.items()}
VARIANTS |= {
    f"map {name}": AttentionSpec(mask=CAUSAL, weight_map=weight_map)
    for name, weight_map in MAPS.items()
}
VARIANTS |= {
    f"epilogue {name}": AttentionSpec(mask=CAUSAL, epilogue=epilogue)
    for name, epilogue in EPILOGUES.items()
}


VARIANTS |= {
    "again clip": AttentionSpec(
        mask=MASKS["blocks of heads"].mask,
        score=kernels.RelativeBias(100),
        reweight=kernels.Clip(-0.1, 1.1),
    ),
    "again sharpen": AttentionSpec(
        mask=CAUSAL, weight_map=kernels.SoftplusL1(), reweight=kernels.Sharpen()
    ),
}


def traced(spec, *, more=(), t=T, kv=2, d=64, e=64, dtype=BF16, mapped=False):
    """Forward and backward, traced for a TPU."""
    names = [operand.name for operand in spec.operands]
    operands = {n: jax.ShapeDtypeStruct(*POOL[n]) for n in (*names, *more)}
    if spec.epilogue == (EPILOGUES["gate by head"],):
        operands["output_gate"] = jax.ShapeDtypeStruct((B, T, H), BF16)
    shapes = ((B, t, H, d), (B, T, kv, d), (B, T, kv, e))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    trained = {o.name for o in spec.operands if o.trains}

    def total(q, k, v, given, rest):
        out = kernels.attention(
            q, k, v, spec, given | rest, implementation="mosaic_tpu", target=TPU
        )
        return sum(x.astype(F32).sum() for x in jax.tree.leaves(out))

    def step(q, k, v, operands):
        given = {n: x for n, x in operands.items() if n in trained}
        rest = {n: x for n, x in operands.items() if n not in trained}
        return jax.value_and_grad(total, (0, 1, 2, 3))(q, k, v, given, rest)

    if mapped:
        step = jax.vmap(step)
        arrays, operands = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), (arrays, operands)
        )
    return jax.jit(step).trace(*arrays, operands)


def lowered(spec, **how):
    return traced(spec, **how).lower(lowering_platforms=("tpu",)).as_text()


def num_kernels(text):
    return len(re.findall(r"custom_call @tpu_custom_call", text))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_lowers_forward_and_backward(name):
    text = lowered(VARIANTS[name])
    more = {"score bias": 1, "again clip": 2, "again sharpen": 2}
    assert num_kernels(text) == 3 + more.get(name, 0)
    # No array of T x S, but for the bias and its gradient.
    if name != "score bias":
        assert f"{T}x{T}x" not in text and f"{T}x{T}>" not in text


SHAPES = {
    "float32, D != E": dict(dtype=F32, d=80, e=40),
    "wide heads": dict(d=512, e=256),
    "few queries": dict(t=9, more=("q_offset",)),
    "positions and keys that are not there": dict(more=("q_offset", "kv_mask")),
    "a mapped axis": dict(mapped=True),
    "distances from an offset": dict(more=("q_offset",)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_lowers(name):
    spec = dataclasses.replace(MASKS["causal"], return_lse=True)
    if "distances" in name:
        spec = dataclasses.replace(
            spec, mask=MASKS["blocks of heads"].mask, score=kernels.RelativeBias(100)
        )
    assert num_kernels(lowered(spec, **SHAPES[name])) == 3


def test_mapped_lists_take_one_kernel_each():
    assert num_kernels(lowered(MASKS["packed"], mapped=True)) == 3
    assert num_kernels(lowered(VARIANTS["again clip"], mapped=True)) == 5


def test_hooks_that_do_nothing_leave_no_trace(without_places):
    def text(spec):
        return re.sub(r"0x[0-9a-f]+", "", str(traced(spec).jaxpr))

    plain = text(MASKS["causal"])
    assert text(AttentionSpec(mask=CAUSAL & kernels.Full(), score=())) == plain
    assert text(SCORES["cap"]) != plain
    specs = (MASKS["causal"], AttentionSpec(mask=CAUSAL & kernels.Full(), score=()))
    first, second = (lowered(spec) for spec in specs)
    assert first == second
