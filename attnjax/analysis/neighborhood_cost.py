"""What neighbourhood attention costs in tiles, against what its windows need.

A kernel takes queries in tiles, boxes of the grid, and visits every tile of keys that
the windows of a tile of queries touch. Along an axis these are the tiles from the
window of its first query to that of its last one; on several axes their product.

Source: Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922 (the
analytical tool, whose code is not released: these are its published rules).
"""

import dataclasses
import math
from collections.abc import Sequence

from attnjax.core.errors import UserError
from attnjax.kernels import Coverage, Neighborhood, Span
from attnjax.mixers.neighborhood_attention import window_of


@dataclasses.dataclass(frozen=True)
class Cost:
    """Tiles of keys that a tile of queries visits.

    Attributes:
        dense: with full attention.
        worst: the most of any tile of queries; all of them take as long where they
            run side by side.
        mean: over the tiles of queries.
        bound: pairs of full attention over pairs that are visible, the speed-up that
            no tiling exceeds on the mean.
    """

    dense: int
    worst: int
    mean: float
    bound: float

    @property
    def speedup(self) -> float:
        """Over full attention, by the worst tile of queries."""
        return self.dense / self.worst

    @property
    def mean_speedup(self) -> float:
        """Over full attention, by the mean tile of queries."""
        return self.dense / self.mean

    @property
    def perfectly_sparse(self) -> bool:
        """Whether every visited tile is needed whole, so that nothing is masked."""
        return math.isclose(self.speedup, self.bound)


def simulate(
    mask: Neighborhood,
    *,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    dynamic: bool = False,
) -> Cost:
    """Count the tiles of a neighbourhood. Dilated places are sorted by their class
    before they are cut into tiles.

    Args:
        mask: the grid and its windows.
        q_tile, kv_tile: sides of the tiles, one for each axis of the grid.
        dynamic: the keys are cut out first, then laid into tiles, so that the first
            tile begins with the window; else tiles lie at multiples of their sides.

    Raises:
        UserError: for tiles of another rank, or without places.
    """
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if len(tile) != len(mask.grid) or min(tile) < 1:
            raise UserError(
                f"neighborhood_cost: {name} must have a side of at least 1 for each "
                f"axis of grid={mask.grid}; got {name}={tuple(tile)}."
            )
    settings = (mask.grid, mask.window, mask.stride, mask.dilation, mask.causal)
    dense, worst, mean, bound = 1, 1, 1.0, 1.0
    for axis, q_side, kv_side in zip(
        zip(*settings, strict=True), q_tile, kv_tile, strict=True
    ):
        trips = _trips(*axis, q_side, kv_side, dynamic)
        dense *= -(-axis[0] // kv_side)
        worst *= max(trips)
        mean *= sum(trips) / len(trips)
        bound *= axis[0] ** 2 / _pairs(*axis)
    return Cost(dense, worst, mean, bound)


def _classes(length: int, dilation: int) -> list[int]:
    """Lengths of the interleaved axes."""
    return [len(range(own, length, dilation)) for own in range(dilation)]


def _trips(length, window, stride, dilation, causal, q_side, kv_side, dynamic):
    """Tiles of keys for each tile of queries along one axis."""
    found = []
    for size in _classes(length, dilation):
        for first in range(0, size, q_side):
            last = min(first + q_side, size) - 1
            start, _ = window_of(first, size, window, stride, causal)
            _, end = window_of(last, size, window, stride, causal)
            if dynamic:
                start, end = 0, end - start
            found.append(-(-end // kv_side) - start // kv_side)
    return found


def _pairs(length, window, stride, dilation, causal) -> int:
    """Visible pairs of query and key along one axis."""
    total = 0
    for size in _classes(length, dilation):
        for place in range(size):
            start, end = window_of(place, size, window, stride, causal)
            total += end - start
    return total


def row_major(mask: Neighborhood, *, block_q: int, block_kv: int) -> Cost:
    """The same where tiles are runs of tokens in row-major order, as
    `kernels.attention` takes them: it visits what the mask does not call empty.

    Args:
        mask: the grid and its windows.
        block_q, block_kv: tokens of a tile of queries, and of keys.
    """
    size = math.prod(mask.grid)
    trips = []
    for q in range(0, size, block_q):
        q_last = min(q + block_q, size) - 1
        keys = ((k, min(k + block_kv, size) - 1) for k in range(0, size, block_kv))
        claims = (mask.coverage(Span(q, q_last, *ends)) for ends in keys)
        trips.append(sum(claim != Coverage.EMPTY for claim in claims))
    settings = (mask.grid, mask.window, mask.stride, mask.dilation, mask.causal)
    pairs = math.prod(_pairs(*axis) for axis in zip(*settings, strict=True))
    dense = -(-size // block_kv)
    return Cost(dense, max(trips), sum(trips) / len(trips), size**2 / pairs)


def flops(
    mask: Neighborhood, *, num_heads: int, head_dim: int, value_dim: int | None = None
) -> float:
    """Forward FLOPs (2 a multiply-add) of scores and mixing of one sequence, of the
    visible pairs alone; times bound / speedup of a `Cost`, of what its worst tile
    makes of them."""
    settings = (mask.grid, mask.window, mask.stride, mask.dilation, mask.causal)
    pairs = math.prod(_pairs(*axis) for axis in zip(*settings, strict=True))
    return 2.0 * pairs * num_heads * (head_dim + (value_dim or head_dim))


def end_to_end(speedup: float, share: float) -> float:
    """The speed-up of a model of which attention takes `share` of the time (Amdahl).

    Raises:
        UserError: for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(
            f"neighborhood_cost: share must be in [0, 1]; got share={share}."
        )
    return 1 / (1 - share + share / speedup)
