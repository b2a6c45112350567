"""Finished weights taken once more, on one tile: a spec's `reweight`.

With u the numerators of the weight map and p = u unit the weights it makes of them,
    b = apply(p, peak),   weights = b factor
and with dp the cotangent of the weights, before the rows' sum is divided by,
    db = (dp - delta) factor,   du = slope(p, peak) db unit
(blocked_reweight.py has the whole). What is of rows stays a vector.
"""

import dataclasses
from collections.abc import Mapping

import jax

from attnjax.kernels.masks import Tile
from attnjax.kernels.mosaic_gpu import thin
from attnjax.kernels.mosaic_gpu.hooks import Hooks
from attnjax.kernels.mosaic_gpu.rows import RowMath


@dataclasses.dataclass(frozen=True)
class Second:
    """The second pass over one tile.

    Attributes:
        rows: the weight map's arithmetic.
        hooks: the spec's functions for the tile's head.
        axis: along which rows run in the tile.
        first: its first row.
        known: by name what is known of rows: "peak", and "unit", "factor", "delta"
            where they are not 1 and 0.
    """

    rows: RowMath
    hooks: Hooks
    axis: int
    first: jax.Array
    known: Mapping[str, jax.Array]

    def _spread(self, name: str, like: jax.Array):
        if name not in self.known:
            return None
        return self.rows.machine.spread(self.known[name], like.shape, self.axis)

    def _times(self, x: jax.Array, name: str) -> jax.Array:
        factor = self._spread(name, x)
        return x if factor is None else x * factor

    def finished(self, u: jax.Array) -> jax.Array:
        """p of numerators u."""
        return self._times(u, "unit")

    def again(self, u: jax.Array) -> jax.Array:
        """b of numerators u."""
        reweight = self.rows.request.spec.reweight
        return self._call(reweight.apply, u.shape, self.finished(u))

    def weights(self, u: jax.Array) -> jax.Array:
        """What multiplies the values."""
        return self._times(self.again(u), "factor")

    def of_finished(self, u: jax.Array, dp: jax.Array) -> jax.Array:
        """The cotangent of p."""
        reweight = self.rows.request.spec.reweight
        delta = self._spread("delta", dp)
        dp = self._times(dp if delta is None else dp - delta, "factor")
        return self._call(reweight.slope, u.shape, self.finished(u)) * dp

    def cotangents(self, u: jax.Array, dp: jax.Array, d_sum):
        """The cotangents of u and, given that of the logarithm of the row's sum or
        None, of the sum, as `RowMath.cotangent` takes them."""
        if d_sum is not None and "unit" in self.known:
            d_sum = d_sum * self.known["unit"]
        return self._times(self.of_finished(u, dp), "unit"), d_sum

    def extra(self, shape: tuple[int, int]):
        """What joins the sum of b: a number for each row, or one."""

        def extra(peak, tile):
            return self.rows.request.spec.reweight.extra(peak, tile)

        return self._call(extra, shape)

    def _call(self, fn, shape: tuple[int, int], *tiles):
        """fn(*tiles, peak, tile)."""
        operands = self.rows.request.spec.reweight.operands
        of_rows = (shape[0], 1) if self.axis == 0 else (1, shape[1])
        shapes, values = [shape] * len(tiles) + [of_rows], [*tiles, self.known["peak"]]
        for x in operands:
            one, value = self.hooks.thin(x.name, shape, self.axis, self.first)
            shapes.append(one)
            values.append(value)
        count = len(tiles) + 1

        def run(*given):
            arrays = dict(zip((x.name for x in operands), given[count:], strict=True))
            place = dict.fromkeys(("b", "h", "q", "k"))
            return fn(*given[:count], Tile(**place, operands=arrays))

        return thin.evaluate(self.rows.machine, run, shapes, *values)
