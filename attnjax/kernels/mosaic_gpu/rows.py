"""Running rows of the forward kernel and weights of the backward ones.

Softmax works in base 2, with the scale folded into the exponent; other maps run their
own formulas (`weight_maps`), rescaled only if they need a maximum.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math
from attnjax.kernels.mosaic_gpu.inline import inline
from attnjax.kernels.mosaic_gpu.shim import Machine
from attnjax.kernels.request import Request
from attnjax.kernels.tile_math import LOW
from attnjax.kernels.weight_maps import Softmax, WeightMap

LOG2E = math.log2(math.e)


def in_base2(weight_map: WeightMap) -> bool:
    """Whether its weights are exp2 of something."""
    return type(weight_map) is Softmax


@dataclasses.dataclass(frozen=True)
class RowMath:
    """The weight map of a request on tiles [rows, keys].

    Attributes:
        request: the call.
        machine: the warpgroup's operations.
    """

    request: Request
    machine: Machine

    @property
    def base2(self) -> bool:
        """Whether weights are exp2(s * unit - shift)."""
        return in_base2(self.request.spec.weight_map)

    @property
    def folds_scale(self) -> bool:
        """Whether the products' scale is part of the unit."""
        return self.base2 and not self.request.spec.score and self.request.scale > 0

    @property
    def unit(self) -> float:
        """Factor from scores to the exponent's units."""
        if not self.base2:
            return 1.0
        return LOG2E * (self.request.scale if self.folds_scale else 1.0)

    def raw(self, products: jax.Array) -> jax.Array:
        """q.k with the scale where it is not folded."""
        return products if self.folds_scale else products * self.request.scale

    def start(self, rows: int):
        """(row maximum, row sum) before any key; None where not needed."""
        weight_map, top, total = self.request.spec.weight_map, None, None
        if weight_map.needs_max:
            # Above masked scores, so that rows without a visible key sum to 0: at the
            # same height a fused multiply-add could leave exp(half an ulp of 1e30).
            start = LOW / 2 if weight_map.floor is None else weight_map.floor
            top = self.machine.full((rows,), start * self.unit)
        if weight_map.needs_sum:
            total = self.machine.full((rows,), 0.0)
        return top, total

    def raise_top(self, top, s: jax.Array):
        """New maximum, and the factor that old sums fade by."""
        if top is None:
            return None, None
        new = jnp.maximum(top, jnp.max(s, axis=1) * self.unit)
        fade = jnp.exp2(top - new) if self.base2 else jnp.exp(top - new)
        return new, fade

    def shift(self, top):
        """What exponentials of the forward pass are shifted by: a number for each
        row, one number, or None."""
        shift = tile_math.shift_of(self.request.spec.weight_map, top)
        return shift * LOG2E if self.base2 and top is None else shift

    def weigh(self, s: jax.Array, shift, axis: int, mask=None):
        """Numerators of a tile and what is summed of it, 0 where masked.

        Args:
            shift: a number for each place along `axis`, one number, or None.
        """
        if isinstance(shift, jax.Array):
            shift = self.machine.spread(shift, s.shape, axis)
        if not self.base2:
            weigh = functools.partial(tile_math.weigh, self.request.spec.weight_map)
            return inline(weigh, s, shift, mask)
        u = jnp.exp2(s * self.unit - shift)
        return u, u

    def cotangent(self, s, u, shift, axis: int, mask, dp, d_sum):
        """ds of a tile; `shift` and `d_sum` are numbers along `axis`, or None."""
        if d_sum is not None:
            d_sum = self.machine.spread(d_sum, s.shape, axis)
        if self.base2:
            return u * (dp + d_sum)
        if shift is not None:
            shift = self.machine.spread(shift, s.shape, axis)
        weight_map = self.request.spec.weight_map
        cotangent = functools.partial(tile_math.score_cotangent, weight_map)
        return inline(cotangent, s, u, shift, mask, (dp, d_sum))

    def finish(self, top, total, sink):
        """(factor from numerators to weights, log-sum) of finished rows.

        Args:
            sink: the logit that joins the sum, or None.
        """
        exp = jnp.exp2 if self.base2 else jnp.exp
        natural = 1 / LOG2E if self.base2 else 1.0
        shift = self.shift(top)
        if shift is None:
            shift = 0.0
        if sink is None:
            alive = total > 0
            safe = jnp.where(alive, total, 1.0)
            lse = jnp.log(safe) + shift * natural
            return jnp.where(alive, 1 / safe, 0.0), jnp.where(alive, lse, -jnp.inf)
        if not isinstance(shift, jax.Array):
            shift = self.machine.full(total.shape, shift)
        sink = sink * (1 / natural)
        high = jnp.maximum(shift, sink)
        fade = exp(shift - high)
        total = total * fade + exp(sink - high)
        return fade / total, jnp.log(total) + high * natural
