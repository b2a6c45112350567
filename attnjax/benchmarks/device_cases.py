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
        long: whether it is timed on one long sequence.
        fixed: operands that have no gradient when it is timed (but when checked).
        checked, timed: sizes, where they are not those of the others.
    """

    spec: kernels.AttentionSpec
    dims: tuple[int, int] = (128, 128)
    group: int = 1
    plain: bool = False
    long: bool = False
    fixed: tuple[str, ...] = ()
    checked: "Size | None" = None
    timed: "Size | None" = None


@dataclasses.dataclass(frozen=True)
class LinearVariant:
    """One recurrence.

    Attributes:
        spec: what is computed; it returns its state.
        dims: D and E.
        group: query heads that share a key/value head.
        packed: whether there are segment_ids.
        spread: value heads, with their decays and rates, that share a query and key.
        fixed: operands that have no gradient when it is timed (but when checked).
    """

    spec: kernels.LinearSpec
    dims: tuple[int, int] = (128, 128)
    group: int = 1
    packed: bool = False
    spread: int = 1
    fixed: tuple[str, ...] = ()
    plain = False
    checked = timed = None


@dataclasses.dataclass(frozen=True)
class DecodeVariant:
    """One step of decoding: a query at the end of a cache.

    Attributes:
        spec: what is computed.
        keys: most keys that the query sees; None for all.
        dims: D and E, which are equal.
        group: query heads that share a key/value head.
    """

    spec: kernels.AttentionSpec
    keys: int | None = None
    dims: tuple[int, int] = (128, 128)
    group: int = 4
    plain = False


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


REACH, BLOCK = 256, 128
WINDOW = kernels.SlidingWindow(1023)
# Long enough for the window to end within it.
WINDOW_CHECKED = Size(2, 2500, 4)
FINISH = (
    kernels.HeadRMSNorm(),
    kernels.HeadScale(),
    kernels.OutputGate("head"),
)
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
    "window": Variant(_spec(WINDOW), long=True, checked=WINDOW_CHECKED),
    "packed": Variant(_spec(CAUSAL & kernels.Segments()), long=True),
    "packed window": Variant(
        _spec(WINDOW & kernels.Segments()),
        long=True,
        checked=WINDOW_CHECKED,
    ),
    "prefix": Variant(_spec(CAUSAL | kernels.Prefix())),
    "soft cap": Variant(_spec(score=kernels.SoftCap(30.0))),
    "soft cap 64": Variant(_spec(score=kernels.SoftCap(30.0)), (64, 64)),
    "ALiBi": Variant(_spec(score=kernels.ALiBi()), fixed=("alibi_slopes",)),
    "score function": Variant(_spec(score=SCORE_FN)),
    "bias": Variant(_spec(kernels.Full(), score=kernels.Bias()), (64, 64)),
    "bias, one row": Variant(
        _spec(kernels.Full(), score=kernels.Bias()),
        (64, 64),
        checked=Size(1, 1000, 4),
        timed=Size(1, 4096, 16),
    ),
    "causal bias": Variant(_spec(score=kernels.Bias())),
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
    "head norm, scale, gate": Variant(_spec(epilogue=FINISH)),
    "distances": Variant(_spec(score=kernels.RelativeBias(REACH))),
    "block mask": Variant(_spec(CAUSAL & kernels.BlockMask(BLOCK, BLOCK))),
    "clipped": Variant(_spec(reweight=kernels.Clip(-0.001, 1.01))),
    "sharpened": Variant(
        _spec(weight_map=kernels.SoftplusL1(), reweight=kernels.Sharpen(3))
    ),
}


def _linear(*flags, scale=128**-0.5, **fields) -> LinearVariant:
    spec = kernels.LinearSpec(*flags, scale=scale, return_state=True)
    return LinearVariant(spec, **fields)


LINEAR_VARIANTS = {
    "linear plain": _linear(),
    "linear retention": _linear("head", fixed=("log_decay",)),
    "linear retention 64": _linear("head", dims=(64, 64), fixed=("log_decay",)),
    "linear token decay": _linear("token"),
    "linear token decay, packed": _linear("token", packed=True),
    "linear channel decay": _linear("channel"),
    "linear normalised": _linear("none", False, True),
    "linear grouped heads": _linear("token", group=4),
    "linear delta": _linear("none", True),
    "linear gated delta": _linear("token", True),
    "linear gated delta 16/32": _linear("token", True, spread=2),
    "linear gated delta 64": _linear("token", True, dims=(64, 64)),
    "linear channel delta": _linear("channel", True),
}

CACHES = 4096, 32768
DECODE_VARIANTS = {
    "decode all keys": DecodeVariant(_spec(kernels.Full())),
    "decode window and sinks": DecodeVariant(
        _spec(kernels.SlidingWindow(1023, sinks=4)), keys=1028
    ),
}


def draw(variant: Variant | LinearVariant, size: Size, *, seed: int, dtype=None):
    """((q, k, v), operands, cotangents of the output and of what comes beside it).

    What comes beside it is the log-sum of attention and the last state of a
    recurrence. Float operands are float32; q, k, v and the output's cotangent `dtype`,
    which is bfloat16 if left out.
    """
    linear = isinstance(variant, LinearVariant)
    make = _draw_linear if linear else _draw_attention
    return make(variant, size, seed=seed, dtype=dtype or jnp.bfloat16)


def _draw_attention(variant: Variant, size: Size, *, seed: int, dtype):
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
        "output_gate": lambda: normal(*_gate_shape(variant.spec, (b, t, h, e))),
        "head_scale": lambda: normal(h),
        "head_norm": lambda: normal(h, e),
        "relative_bias": lambda: normal(h, 2 * REACH + 1),
        "block_mask": lambda: jnp.asarray(_marks(rng, b, h, t)),
        "visible_keys": lambda: 1.0 + jnp.arange(t)[None, None],
        "sharpen_offset": lambda: 1.0 * (jnp.arange(t) >= 3)[None, None],
    }
    operands = {x.name: pool[x.name]() for x in variant.spec.operands}
    operands = {
        n: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        for n, x in operands.items()
    }
    cotangents = normal(b, t, h, e, dtype=dtype), normal(b, t, h)
    return tuple(x.astype(dtype) for x in qkv), operands, cotangents


def _gate_shape(spec: kernels.AttentionSpec, out: tuple[int, ...]) -> tuple[int, ...]:
    per_head = any(getattr(step, "per", None) == "head" for step in spec.epilogue)
    return out[:-1] if per_head else out


def _marks(rng: np.random.Generator, batch: int, heads: int, length: int) -> np.ndarray:
    """bool [B, H, N, N]: half of the blocks, and those on the diagonal."""
    count = -(-length // BLOCK)
    marks = rng.random((batch, heads, count, count)) < 0.5
    return marks | np.eye(count, dtype=bool)


def _draw_linear(variant: LinearVariant, size: Size, *, seed: int, dtype):
    rng, spec = np.random.default_rng(seed), variant.spec
    (d, e), b, t, h = variant.dims, size.batch, size.length, size.heads
    if h % variant.group:
        raise ValueError(f"draw: heads must be a multiple of {variant.group}; got {h}.")
    kv = h // variant.group
    if kv % variant.spread:
        raise ValueError(
            f"draw: value heads must be a multiple of {variant.spread}; got {kv}."
        )

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    q = normal(b, t, h // variant.spread, d)
    k, v = normal(b, t, kv // variant.spread, d), normal(b, t, kv, e)
    if spec.normalise:
        q, k = jnp.abs(q), jnp.abs(k)
    if spec.delta:
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    operands = {}
    shapes = {"head": (kv,), "token": (b, t, kv), "channel": (b, t, kv, d)}
    if spec.decay != "none":
        operands["log_decay"] = -0.05 * jnp.abs(normal(*shapes[spec.decay]))
    if spec.delta:
        operands["beta"] = jax.nn.sigmoid(normal(b, t, kv))
    if variant.packed:
        ids = np.sort(rng.integers(1, 9, (b, t)), axis=1).astype(np.int32)
        operands["segment_ids"] = jnp.asarray(ids)
    cotangents = normal(b, t, h, e), normal(b, kv, d, e + spec.normalise)
    qkv = tuple(x.astype(dtype) for x in (q, k, v))
    return qkv, operands, (cotangents[0].astype(dtype), cotangents[1])


def draw_decode(variant: DecodeVariant, size: Size, *, seed: int, dtype=None):
    """((q [B, 1, H, D], k, v [B, length, K, D]), operands) of a step of decoding."""
    rng = np.random.default_rng(seed)
    (d, e), b, s, h = variant.dims, size.batch, size.length, size.heads
    if h % variant.group or d != e:
        raise ValueError(
            f"draw_decode: heads must be a multiple of {variant.group} and D equal E; "
            f"got heads={h}, dims={variant.dims}."
        )
    shapes = (b, 1, h, d), *2 * ((b, s, h // variant.group, d),)
    qkv = tuple(
        jnp.asarray(rng.standard_normal(x, np.float32), dtype or jnp.bfloat16)
        for x in shapes
    )
    at_end = {"q_offset": jnp.asarray(s - 1, jnp.int32)}
    return qkv, at_end if variant.spec.mask.positional else {}


def cache_bytes(variant: DecodeVariant, size: Size) -> int:
    """Bytes of the keys and values, in 16 bits, that a step has to read."""
    keys = size.length if variant.keys is None else min(variant.keys, size.length)
    return 2 * size.batch * keys * size.heads // variant.group * sum(variant.dims)


def flops(variant: Variant | LinearVariant, size: Size) -> float:
    """Operations of the forward pass: 2 B H S^2 (D + E), half of it under a causal
    mask; what a mask skips beyond that is not counted off. Of a recurrence those of
    its chunked form, B H S (4 D E + L (D + E)), without a delta rule's solve."""
    if isinstance(variant, LinearVariant):
        d, e = variant.dims
        each = 4 * d * e + variant.spec.chunk_size * (d + e)
        return 1.0 * size.batch * size.heads * size.length * each
    pairs = size.length**2
    if not isinstance(variant.spec.mask, kernels.Full):
        pairs /= 2
    return 2.0 * size.batch * size.heads * pairs * sum(variant.dims)
