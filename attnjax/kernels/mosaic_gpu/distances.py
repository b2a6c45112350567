"""Biases by distance: a tile of them is a part of a small array, read like a bias.

A kernel cannot gather. Element (i, j) of a tile depends on i - j alone, so 64 rows,
each one place further than the row before it, hold every tile: [64, W] with W = 2 reach
and a few tiles. A tile is a window of W, and beyond the reach all are alike.

The table's gradient is a sum along diagonals. Tiles beyond the reach are summed row by
row, with dq. Those within it are summed by a kernel of their own, where a block of
threads goes down one diagonal of tiles and adds them place by place (table.py); the few
sums that are left are taken here, in one order.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels.masks import Tile
from attnjax.kernels.mosaic_gpu.steps import Grid
from attnjax.kernels.mosaic_gpu.tiles import BLOCK, ROWS
from attnjax.kernels.relative import RelativeBias
from attnjax.kernels.request import Request
from attnjax.kernels.spec import AttentionSpec

Arrays = Mapping[str, jax.Array]


class Diagonals(RelativeBias):
    """RelativeBias whose operand is the tile of biases: its form inside a kernel."""

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """s + bias."""
        return s + tile.operands[self.name]


def inside(spec: AttentionSpec) -> AttentionSpec:
    """The spec as the kernels see it: the same one without a bias by distance."""
    if not steps_of(spec):
        return spec
    score = tuple(
        Diagonals(step.reach, step.name) if isinstance(step, RelativeBias) else step
        for step in spec.score
    )
    return dataclasses.replace(spec, score=score)


def steps_of(spec: AttentionSpec) -> dict[str, RelativeBias]:
    """The biases by distance of a spec, by operand."""
    return {step.name: step for step in spec.score if isinstance(step, RelativeBias)}


def refusal(request: Request) -> str | None:
    """Why distances are not known from a tile's place, or None."""
    moved = {"q_positions", "k_positions"} & request.operand_names
    if steps_of(request.spec) and moved:
        return (
            "finds the distances of RelativeBias without positions, an offset aside; "
            f"got {sorted(moved)}"
        )
    return None


def first_position(operands: Arrays) -> jax.Array:
    """int32 [B|1]: position of the first query."""
    if "q_positions" in operands:
        return operands["q_positions"][:, 0]
    return jnp.zeros((1,), jnp.int32)


def _margin(grid: Grid, reach: int) -> tuple[int, int]:
    """(the least, the largest) even distance q - k of a tile's first query and key
    that differs from all beyond it."""
    tile = (grid.block_q, ROWS) if grid.transposed else (ROWS, grid.block_k)
    even = reach + reach % 2 + 2
    return -even - tile[0], even + tile[1]


def windows(grid: Grid, step: RelativeBias, table: jax.Array, operands: Arrays):
    """The array whose windows are tiles of biases: float32 [B|1, H|1, 64, W].

    Vectors of two numbers are read: windows begin at even places, and an odd position
    of the first query is part of the array.
    """
    step.check_table(table)
    low, high = _margin(grid, step.reach)
    size = high - low + max(ROWS, grid.block_q, grid.block_k)
    i = jnp.arange(ROWS, dtype=jnp.int32)[:, None]
    x = jnp.arange(size, dtype=jnp.int32)
    distances = x + low - i if grid.transposed else high + i - x
    odd = jax.lax.rem(first_position(operands), jnp.int32(2))[:, None, None]
    places = jnp.clip(distances + odd, -step.reach, step.reach) + step.reach
    return jnp.swapaxes(jnp.take(table.astype(jnp.float32), places, axis=1), 0, 1)


def window(grid: Grid, reach: int, start, q_first, k_first):
    """First column of a tile's window.

    Args:
        start: position of the first query of all, int32.
        q_first, k_first: the tile's first query and key, counted from the first.
    """
    low, high = _margin(grid, reach)
    base = start - jax.lax.rem(start, jnp.int32(2)) + q_first - k_first
    base = jnp.clip(base, low, high)
    return base - low if grid.transposed else high - base


def beyond(grid: Grid, reach: int, base):
    """Whether all distances of a tile are at least `reach`, and at most -`reach`.

    Args:
        base: distance of the first query of a block of queries and a tile's first key.
    """
    return base - (grid.block_k - 1) >= reach, base + (BLOCK - 1) <= -reach


def near_tiles(grid: Grid, step: RelativeBias, cover, operands: Arrays):
    """Which tiles the table's kernel adds up, by diagonals of tiles.

    Args:
        cover: [B|1, H|1, num_q, num_k], 0 for tiles that are skipped.

    Returns:
        (first diagonal, int32 [G, N, n] places, int32 [G, N] how many): diagonal d is
        of tiles (i, BLOCK / block_k i + d); a place is i + num_q b, b counted in its
        group of rows of the batch. G is B, or 1 where blocks of threads are many.
    """
    per, request = BLOCK // grid.block_k, grid.request
    i = np.arange(grid.num_q)
    diagonals = np.arange(-per * (grid.num_q - 1), grid.num_k)
    moved = "q_positions" in operands
    if not moved:
        apart = beyond(grid, step.reach, -grid.block_k * diagonals)
        diagonals = diagonals[~(apart[0] | apart[1])]
    j = per * i + diagonals[:, None]
    inside_grid = (j >= 0) & (j < grid.num_k)
    seen = (cover > 0).any(1)[:, i, np.clip(j, 0, grid.num_k - 1)]
    seen = seen & inside_grid
    if moved:
        base = first_position(operands)[:, None, None]
        base = base - grid.block_k * jnp.asarray(diagonals, jnp.int32)[:, None]
        apart = beyond(grid, step.reach, base)
        seen = seen & ~(apart[0] | apart[1])
    xp = np if isinstance(seen, np.ndarray) else jnp
    shape = (request.batch, *seen.shape[1:])
    seen = xp.broadcast_to(seen, shape)
    together = not moved and request.num_heads * len(diagonals) >= ENOUGH_BLOCKS
    if together:
        seen = xp.swapaxes(seen, 0, 1).reshape(1, len(diagonals), -1)
    order = xp.argsort(~seen, axis=2, stable=True).astype(np.int32)
    counts = seen.sum(2).astype(np.int32)
    return int(diagonals[0]), jnp.asarray(order), jnp.asarray(counts)


# Blocks of threads that fill a card twice: with as many, rows of the batch are added up
# in a block and not after it.
ENOUGH_BLOCKS = 264


def collect(grid: Grid, step: RelativeBias, first: int, sums, ends, operands: Arrays):
    """Gradient of the table [H, 2 reach + 1].

    Args:
        first: first diagonal of tiles.
        sums: [G, H, N, BLOCK, block_k], tiles added up along diagonals.
        ends: ([B, H, T], [B, H, T]), rows of tiles beyond the reach, up and down.
    """
    size, blocks = grid.block_k, BLOCK // grid.block_k + 1
    g, h, n = sums.shape[:3]
    # Rows of `wide` numbers, read as rows of one less: each moves by one place more to
    # the right than the row before it, and a column holds one distance.
    wide = BLOCK + size
    x = jnp.pad(sums[..., ::-1, :], ((0, 0),) * 4 + ((0, wide - size),))
    x = x.reshape(g, h, n, -1)[..., : BLOCK * (wide - 1)]
    x = jnp.sum(x.reshape(g, h, n, BLOCK, wide - 1), axis=3)
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, 1),)).reshape(g, h, n, blocks, size)
    # Diagonals of tiles overlap: the next one begins `size` distances further.
    x = sum(
        jnp.pad(x[:, :, :, m], ((0, 0), (0, 0), (m, blocks - 1 - m), (0, 0)))
        for m in range(blocks)
    )
    x = x.reshape(g, h, -1)
    start = first_position(operands)[:, None]
    largest = start + (BLOCK - 1 - size * first)
    distances = (largest - jnp.arange(x.shape[2], dtype=jnp.int32))[:, None]
    reach, (up, down) = step.reach, (jnp.sum(end, axis=2)[..., None] for end in ends)
    up, down = jnp.sum(up, axis=0), jnp.sum(down, axis=0)
    if reach == 0:
        return jnp.sum(x, axis=(0, 2))[:, None] + up + down
    up += _total(jnp.where(distances >= reach, x, 0))
    down += _total(jnp.where(distances <= -reach, x, 0))
    places = largest - jnp.arange(1 - reach, reach, dtype=jnp.int32)
    there = (places >= 0) & (places < x.shape[2])
    places = jnp.clip(places, 0, x.shape[2] - 1)
    found = jnp.take_along_axis(
        x, jnp.broadcast_to(places[:, None], (g, h, 2 * reach - 1)), 2
    )
    found = jnp.sum(jnp.where(there[:, None], found, 0), axis=0)
    return jnp.concatenate([down, found, up], axis=1)


def _total(x: jax.Array) -> jax.Array:
    """[G, H, n] to [H, 1]."""
    return jnp.sum(x, axis=(0, 2))[:, None]
