"""A finished row of weights taken once more: what needs every row of keys twice.

With p the weights of a row after its weight map, and peak their maximum,
    b = apply(p, peak, tile)
    weights = b / (sum b + extra(peak, tile))   with `needs_sum`, else b.
The peak is there to scale b, so that no power of it overflows; formulas must not
depend on it otherwise, and its derivative is taken as 0. b must be 0 where p is 0:
that is how masked places stay out. Arrays come as rows [B, H, t, 1] of `tile`, and
have no gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnjax.kernels.masks import Tile
from attnjax.kernels.operands import Operand

# Beside this every b of a row is 0.
_LARGEST = 1e30


class Reweight:
    """Base of all second passes."""

    needs_sum: bool = False
    # The arrays, per row, that it needs.
    operands: tuple[Operand, ...] = ()

    def apply(self, p: jax.Array, peak: jax.Array, tile: Tile) -> jax.Array:
        """b, the shape of p; 0 where p is 0."""
        raise NotImplementedError

    def slope(self, p: jax.Array, peak: jax.Array, tile: Tile) -> jax.Array:
        """db/dp with the peak held."""
        raise NotImplementedError

    def extra(self, peak: jax.Array, tile: Tile) -> jax.Array | float:
        """What joins the sum of b, in the units of b: [B, H, t, 1] or a number."""
        del peak, tile
        return 0.0


@dataclasses.dataclass(frozen=True)
class Clip(Reweight):
    """clip((high - low) p + low, 0, 1): clipped softmax, which can give exact zeros
    and ones (Bondarenko et al., arXiv 2306.12929).

    Attributes:
        low: at most 0 (the paper's gamma, -alpha / length of training).
        high: at least 1 (the paper's zeta).
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not (self.low <= 0 and self.high >= 1):
            raise ValueError(
                "Clip: low must be <= 0 and high >= 1; got "
                f"low={self.low}, high={self.high}."
            )

    def _line(self, p: jax.Array) -> jax.Array:
        return (self.high - self.low) * p + self.low

    def apply(self, p: jax.Array, peak: jax.Array, tile: Tile) -> jax.Array:
        """The line, clipped."""
        del peak, tile
        return jnp.clip(self._line(p), 0, 1)

    def slope(self, p: jax.Array, peak: jax.Array, tile: Tile) -> jax.Array:
        """high - low between the ends, 0 beyond them."""
        del peak, tile
        line = self._line(p)
        inside = (line > 0) & (line < 1)
        return jnp.where(inside, jnp.asarray(self.high - self.low, p.dtype), 0)


@dataclasses.dataclass(frozen=True)
class Sharpen(Reweight):
    """b = relu(p * count - offset)^power, then b / (sum b + eps): LSSAR, which keeps
    what is above the mean weight (arXiv 2501.13428).

    Operands: `visible_keys` float [B, H, T], how many keys the row sees;
    `sharpen_offset` float [B, H, T], >= 0: the paper's 1, and 0 in the first three
    rows. Axes may have size 1.

    Attributes:
        power: an integer >= 1; the paper's 15 (for longer texts) or 3.
        eps: added to the sum of b, >= 0.
    """

    power: int = 15
    eps: float = 1e-8
    needs_sum = True
    operands = (
        Operand("visible_keys", "bht", "float"),
        Operand("sharpen_offset", "bht", "float"),
    )

    def __post_init__(self):
        if not isinstance(self.power, int) or self.power < 1:
            raise ValueError(
                f"Sharpen: power must be an integer >= 1; got power={self.power!r}."
            )
        if not self.eps >= 0:
            raise ValueError(f"Sharpen: eps must be >= 0; got eps={self.eps}.")

    def _above(self, p: jax.Array, tile: Tile) -> jax.Array:
        count = tile.operands["visible_keys"].astype(p.dtype)
        return jnp.maximum(
            p * count - tile.operands["sharpen_offset"].astype(p.dtype), 0
        )

    def _unit(self, peak: jax.Array, tile: Tile) -> jax.Array:
        """1 / relu(peak * count - offset), 1 where that is 0."""
        top = self._above(peak, tile)
        return 1 / jnp.where(top > 0, top, 1)

    def apply(self, p: jax.Array, peak: jax.Array, tile: Tile) -> jax.Array:
        """relu(p * count - offset)^power, over its value at the peak."""
        return (self._above(p, tile) * self._unit(peak, tile)) ** self.power

    def slope(self, p: jax.Array, peak: jax.Array, tile: Tile) -> jax.Array:
        """power * count * relu(p * count - offset)^(power - 1), in the same units."""
        unit = self._unit(peak, tile)
        above = self._above(p, tile)
        count = tile.operands["visible_keys"].astype(p.dtype)
        steep = self.power * count * unit * (above * unit) ** (self.power - 1)
        return jnp.where(above > 0, steep, 0)

    def extra(self, peak: jax.Array, tile: Tile) -> jax.Array | float:
        """eps in the units of b, finite: where float32 cannot hold it, in rows whose
        largest weight is hardly above the mean, it leaves nothing of the row."""
        if self.eps == 0:
            return 0.0
        return jnp.minimum(self.eps * self._unit(peak, tile) ** self.power, _LARGEST)
