"""A bias of low rank, by widening queries and keys: s q.k + f_q.f_k = [s q | f_q].[k |
f_k], so that no bias is stored or read (FlashBias, arXiv 2505.12044).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels.masks import Tile
from attnjax.kernels.operands import Operand
from attnjax.kernels.scores import ScoreStep
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.target import Target

# Fused kernels want head dims of whole multiples of this.
LANES = 8


@dataclasses.dataclass(frozen=True)
class LowRankBias(ScoreStep):
    """s + bias_q . bias_k, the first step of its spec; rank R is the last axis.

    Operands, with gradient: `bias_q` float [B, T, H, R], `bias_k` float [B, S, K, R],
    with 1 in an axis that they share (not R). A factor of its own for each query head
    (a slope) belongs to `bias_q` when heads share keys. Factors of positions lose
    their whole numbers in bfloat16 above 256: pass them in float32, which widens q
    and k to float32 too.
    """

    operands = (
        Operand("bias_q", "bthr", "float", trains=True),
        Operand("bias_k", "bskr", "float", trains=True),
    )
    first = True

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """Refused: not a function of one score."""
        raise NotImplementedError(
            "LowRankBias: it is a product of rows, which no tile of scores can apply. "
            "Call kernels.attention, or kernels.widen first."
        )


def widened(spec: AttentionSpec) -> bool:
    """Whether `widen` has something to do."""
    return bool(spec.score) and isinstance(spec.score[0], LowRankBias)


def widen(
    q: jax.Array,
    k: jax.Array,
    spec: AttentionSpec,
    operands: Mapping[str, jax.Array],
    target: Target,
) -> tuple[jax.Array, jax.Array, AttentionSpec, dict[str, jax.Array]]:
    """The same attention without its `LowRankBias`, or the arguments as they are.

    Returns:
        q [B, T, H, D + R'] and k [B, S, K, D + R'] in the widest dtype of q, k and
        the factors, a spec with scale 1, and the other operands. R' is R, and off the
        CPU filled up so that D + R' is a multiple of 8.

    Raises:
        ValueError: when the factors differ in R.
    """
    operands = dict(operands)
    if not widened(spec):
        return q, k, spec, operands
    factors = operands.pop("bias_q"), operands.pop("bias_k")
    if factors[0].shape[-1] != factors[1].shape[-1]:
        raise ValueError(
            "LowRankBias: bias_q and bias_k must have one rank R as their last axis; "
            f"got bias_q.shape={factors[0].shape}, bias_k.shape={factors[1].shape}."
        )
    dtype = jnp.result_type(q, k, *factors)
    dim = q.shape[-1] + factors[0].shape[-1]
    fill = 0 if target.platform == "cpu" else -dim % LANES
    scale = q.shape[-1] ** -0.5 if spec.scale is None else spec.scale

    def beside(x, factor):
        whole = jnp.broadcast_to(factor, (*x.shape[:-1], factor.shape[-1]))
        parts = x.astype(dtype), whole.astype(dtype)
        return jnp.pad(jnp.concatenate(parts, -1), [(0, 0)] * 3 + [(0, fill)])

    q = beside(q.astype(dtype) * jnp.asarray(scale, dtype), factors[0])
    rest = dataclasses.replace(spec, scale=1.0, score=spec.score[1:])
    return q, beside(k, factors[1]), rest, operands
