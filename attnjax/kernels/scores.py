"""What happens to scaled products q.k before they become weights.

A score step is static and hashable; a spec holds a tuple of steps, applied in order.
Every step is elementwise: `apply(s, tile)` sees scores [B, H, t, s] and the tile's
indices and operands, nothing else, so any tile of any backend may call it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.kernels.masks import Tile, declare
from attnjax.kernels.operands import Operand
from attnjax.kernels.static_fn import check_static_fn


class ScoreStep:
    """Base of all score steps."""

    # The arrays that the step needs.
    operands: tuple[Operand, ...] = ()
    # Whether scores are never NaN or +inf, at masked places too.
    finite: bool = True
    # Whether the step must be the first of its spec.
    first: bool = False

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """New scores, same shape and dtype as `s`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SoftCap(ScoreStep):
    """cap * tanh(s / cap): scores stay within (-cap, cap) (Gemma 2, arXiv 2408.00118).

    Attributes:
        cap: the bound, > 0.
    """

    cap: float

    def __post_init__(self):
        if not self.cap > 0:
            raise ValueError(
                f"SoftCap: cap must be > 0; got cap={self.cap}. Leave the step out "
                "for no cap."
            )

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """cap * tanh(s / cap)."""
        del tile
        return self.cap * jnp.tanh(s / self.cap)


@dataclasses.dataclass(frozen=True)
class Bias(ScoreStep):
    """s + bias, with a gradient at any batch size.

    Attributes:
        name: operand, float [B, H, T, S], 1 in any axis that it shares.
    """

    name: str = "bias"

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The bias."""
        return (Operand(self.name, "bhts", "float", trains=True),)

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """s + bias."""
        return s + tile.operands[self.name].astype(s.dtype)


@dataclasses.dataclass(frozen=True)
class ALiBi(ScoreStep):
    """s - slope[h] * |q - k| (Press et al., arXiv 2108.12409).

    Under a causal mask this is the paper's bias; without one it is symmetric.
    Operand: `alibi_slopes` float [H], with gradient.
    """

    operands = (Operand("alibi_slopes", "h", "float", trains=True),)

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """s - slope * |q - k|."""
        distance = jnp.abs(tile.q - tile.k).astype(s.dtype)
        return s - tile.operands["alibi_slopes"].astype(s.dtype) * distance


@dataclasses.dataclass(frozen=True)
class ScoreFn(ScoreStep):
    """Scores by a function of scores and indices, with gradients to its operands.

    Example:
        def far_penalty(s, b, h, q, k, strength):
            return s - strength * jnp.log1p(jnp.abs(q - k))
        ScoreFn(far_penalty, ("strength",), ("head",))

    Attributes:
        fn: (s, b, h, q, k, *operands) -> scores, elementwise: indices are int arrays
            and operands float arrays that broadcast against s [B, H, t, s]. A
            module-level function, or a frozen dataclass with `__call__` for one with
            settings; arrays come only as operands. At masked places its value is not
            used, and only a "table" operand's gradient needs it to be finite there.
        names: names of its operands, in the order of its arguments.
        reduce: for each name how it is laid out, and so how its gradient is reduced:
            "tile" [B,H,T,S], "row" [B,H,T], "column" [B,H,S], "head" [H], "batch" [B]
            (1 in an axis that is shared), or "table": any shape, handed over whole,
            to be indexed by the function.
    """

    fn: Callable[..., Any]
    names: tuple[str, ...] = ()
    reduce: tuple[str, ...] = ()
    finite = False

    def __post_init__(self):
        check_static_fn("ScoreFn", self.fn)
        declare("ScoreFn", self.names, self.reduce, trains=True)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The function's arrays."""
        return declare("ScoreFn", self.names, self.reduce, trains=True)

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """What the function says."""
        arrays = [tile.operands[name] for name in self.names]
        out = self.fn(s, tile.b, tile.h, tile.q, tile.k, *arrays)
        if out.shape != s.shape:
            raise ValueError(
                "ScoreFn: fn must return scores of the shape it was given; got "
                f"shape={out.shape} for s of shape {s.shape}."
            )
        return out.astype(s.dtype)
