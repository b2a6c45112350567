"""Biases of the distance between query and key, learned, with their gradient."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels.masks import Tile
from attnjax.kernels.operands import Operand
from attnjax.kernels.scores import ScoreStep


@dataclasses.dataclass(frozen=True)
class RelativeBias(ScoreStep):
    """s + table[h, distance], distance = q - k cut to -reach ... reach.

    Operand, with gradient: float [H, 2 reach + 1] (or [1, ...] for all heads), entry
    reach + distance. `t5_bias` makes it of T5's table of buckets.

    Attributes:
        reach: >= 0.
        name: the operand.
    """

    reach: int
    name: str = "relative_bias"

    def __post_init__(self):
        if not isinstance(self.reach, int) or self.reach < 0:
            raise ValueError(
                "RelativeBias: reach must be an integer >= 0; got "
                f"reach={self.reach!r}."
            )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The table."""
        return (Operand(self.name, "*", "float", trains=True, shape="hr"),)

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """s + table[h, q - k]."""
        table = tile.operands[self.name].astype(s.dtype)
        self.check_table(table)
        if tile.contiguous:
            return s + self._by_diagonals(table, tile, s.shape[2:])[None]
        steps = jnp.clip(tile.q - tile.k, -self.reach, self.reach) + self.reach
        return s + jnp.swapaxes(jnp.take(table, steps[:, 0], axis=1), 0, 1)

    def check_table(self, table: jax.Array) -> None:
        """Refuse a table of another reach."""
        if table.shape[1] != 2 * self.reach + 1:
            raise ValueError(
                f"RelativeBias: operand {self.name!r} must have 2 reach + 1 = "
                f"{2 * self.reach + 1} distances; got shape={table.shape}."
            )

    def _by_diagonals(
        self, table: jax.Array, tile: Tile, shape: tuple[int, int]
    ) -> jax.Array:
        """[H, t, s] of a tile whose positions count up, by reshaping: one value for
        each of its t + s - 1 diagonals, so that the gradient is a sum over diagonals
        and not a scatter over the tile."""
        t, n = shape[0], sum(shape) - 1
        first = tile.q[0, 0, 0, 0] - tile.k[0, 0, 0, 0] + t - 1
        steps = first - jnp.arange(n, dtype=jnp.int32)
        steps = jnp.clip(steps, -self.reach, self.reach) + self.reach
        # Row i of the tile is diagonals[t - 1 - i :]: rows of n + 1 read as rows of n
        # move one place to the right each.
        diagonals = jnp.pad(jnp.take(table, steps, axis=1), ((0, 0), (0, 1)))
        rows = jnp.broadcast_to(diagonals[:, None], (len(table), t, n + 1))
        rows = rows.reshape(len(table), -1)[:, : t * n]
        return rows.reshape(len(table), t, n)[:, :, t - 1 :]


def t5_buckets(
    reach: int, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
    """T5's bucket of each distance q - k = -reach ... reach (arXiv 1910.10683), int32
    [2 reach + 1]: exact near 0, then logarithmic up to max_distance."""
    behind = np.arange(-reach, reach + 1)
    buckets, offset = num_buckets, 0
    if bidirectional:
        buckets //= 2
        offset = np.where(behind < 0, buckets, 0)
        behind = np.abs(behind)
    behind = np.maximum(behind, 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(behind, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (buckets - exact)).astype(int), buckets - 1)
    return (offset + np.where(behind < exact, behind, far)).astype(np.int32)


def t5_bias(
    table: jax.Array, *, max_distance: int = 128, bidirectional: bool = True
) -> jax.Array:
    """The operand of `RelativeBias(max_distance)` from T5's table [buckets, H]: beyond
    max_distance all distances share a bucket, so that reach is enough.

    Returns:
        [H, 2 max_distance + 1], dtype of `table`.
    """
    buckets = t5_buckets(
        max_distance,
        num_buckets=table.shape[0],
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    return jnp.take(table, buckets, axis=0).T
