"""What the kernels are checked and timed on where a GPU is at hand.

A variant is a spec with head sizes; its arrays are drawn from a seed. Correctness runs
on short sequences against dense float64, timing on B * S = 16384 tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import kernels

CAUSAL = kernels.Causal()
Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One computation.

    Attributes:
        spec: what is computed.
        dims: D and E.
        group: query heads that share a key/value head.
        plain: whether it is plain causal or full softmax: what others are held to.
    """

    spec: kernels.AttentionSpec
    dims: tuple[int, int] = (128, 128)
    group: int = 1
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class Size:
    """Batch, tokens and query heads of one measurement."""

    batch: int
    length: int
    heads: int


def far_penalty(s, b, h, q, k, strength):
    """A score function with an operand per head."""
    return s - strength * jnp.log(jnp.abs(q - k).astype(s.dtype) + 1)


def _spec(mask=CAUSAL, **fields) -> kernels.AttentionSpec:
    return kernels.AttentionSpec(mask=mask, **fields)


SCORE_FN = kernels.ScoreFn(far_penalty, ("strength",), ("head",))
VARIANTS = {
    "causal 128": Variant(_spec(), plain=True),
    "full 128": Variant(_spec(kernels.Full()), plain=True),
    "causal 64": Variant(_spec(), (64, 64), plain=True),
    "full 64": Variant(_spec(kernels.Full()), (64, 64), plain=True),
    "causal 256": Variant(_spec(), (256, 256), plain=True),
    "grouped heads": Variant(_spec(), group=4, plain=True),
    "latent 192/128": Variant(_spec(), (192, 128)),
    "log-sum": Variant(_spec(return_lse=True)),
    "window": Variant(_spec(kernels.SlidingWindow(1023))),
    "packed": Variant(_spec(CAUSAL & kernels.Segments())),
    "prefix": Variant(_spec(CAUSAL | kernels.Prefix())),
    "soft cap": Variant(_spec(score=kernels.SoftCap(30.0))),
    "soft cap 64": Variant(_spec(score=kernels.SoftCap(30.0)), (64, 64)),
    "ALiBi": Variant(_spec(score=kernels.ALiBi())),
    "score function": Variant(_spec(score=SCORE_FN)),
    "bias": Variant(_spec(kernels.Full(), score=kernels.Bias()), (64, 64)),
    "learned sink": Variant(_spec(weight_map=kernels.Softmax("logit"))),
    "off by one": Variant(_spec(weight_map=kernels.Softmax("off_by_one"))),
    "bounded": Variant(
        _spec(score=kernels.SoftCap(30.0), weight_map=kernels.Softmax(bound=30.0))
    ),
    "sigmoid": Variant(_spec(weight_map=kernels.Sigmoid(-math.log(4096)))),
    "softplus": Variant(_spec(weight_map=kernels.SoftplusL1())),
    "relu power": Variant(_spec(weight_map=kernels.ReluPower(2, normalise=True))),
    "polynomial": Variant(_spec(weight_map=kernels.Polynomial())),
    "softpick": Variant(_spec(weight_map=kernels.Softpick())),
    "gate": Variant(_spec(epilogue=kernels.OutputGate())),
}


def draw(variant: Variant, size: Size, *, seed: int, dtype=jnp.bfloat16):
    """((q, k, v), operands, (cotangent of the output, of the log-sum)).

    Float operands are float32; q, k, v and the cotangent `dtype`.
    """
    rng = np.random.default_rng(seed)
    (d, e), b, t, h = variant.dims, size.batch, size.length, size.heads
    if h % variant.group:
        raise ValueError(f"draw: heads must be a multiple of {variant.group}; got {h}.")

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    kv = h // variant.group
    qkv = normal(b, t, h, d), normal(b, t, kv, d), normal(b, t, kv, e)
    ids = np.sort(rng.integers(1, 9, (b, t)), axis=1).astype(np.int32)
    pool = {
        "q_segment_ids": lambda: jnp.asarray(ids),
        "k_segment_ids": lambda: jnp.asarray(ids),
        "prefix_len": lambda: jnp.full((b,), t // 3, jnp.int32),
        "alibi_slopes": lambda: jnp.asarray(2.0 ** (-8 * np.arange(1, h + 1) / h)),
        "strength": lambda: 0.3 * normal(h),
        "sink": lambda: normal(h),
        "bias": lambda: normal(1, h, t, t),
        "output_gate": lambda: normal(b, t, h, e),
    }
    operands = {x.name: pool[x.name]() for x in variant.spec.operands}
    operands = {
        n: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        for n, x in operands.items()
    }
    cotangents = normal(b, t, h, e, dtype=dtype), normal(b, t, h)
    return tuple(x.astype(dtype) for x in qkv), operands, cotangents


def flops(variant: Variant, size: Size) -> float:
    """Operations of the forward pass: 2 B H S^2 (D + E), half of it under a causal
    mask; what a mask skips beyond that is not counted off."""
    pairs = size.length**2
    if not isinstance(variant.spec.mask, kernels.Full):
        pairs /= 2
    return 2.0 * size.batch * size.heads * pairs * sum(variant.dims)
