"""Which tiles of a blocked computation are computed, and which of them need a mask.

A mask of static positions alone is sorted at trace time. One that depends on arrays
is sorted on the device: its tiles are evaluated once, without heads unless the mask
tells heads apart, and each is visited, visited without a mask, or skipped.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels import tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.masks import Coverage, Span, Tile

Arrays = Mapping[str, jax.Array]
Index = np.ndarray | jax.Array


class TileTable(NamedTuple):
    """For each block of queries, the blocks of keys that it meets.

    Attributes:
        full, partial: int32 [num_q, n], block indices; the rest of a row is padding.
        num_full, num_partial: int32 [num_q], how many of a row count.
    """

    full: Index
    num_full: Index
    partial: Index
    num_partial: Index


def tile_table(plan: BlockPlan, operands: Arrays) -> TileTable:
    """Sort the tiles of a plan into skipped, full and partial ones.

    Args:
        operands: padded to whole blocks.
    """
    table = static_table(plan)
    if (
        _positions_known(plan)
        and plan.request.spec.mask.complete
        and not _guarded(plan)
    ):
        return table
    return _sort_on_device(plan, operands, table)


def _positions_known(plan: BlockPlan) -> bool:
    request = plan.request
    return request.static_positions or not request.spec.mask.positional


def _guarded(plan: BlockPlan) -> bool:
    return "kv_mask" in plan.request.operand_names


@functools.lru_cache(maxsize=256)
def static_table(plan: BlockPlan) -> TileTable:
    """What static positions alone say; a tile that they leave open is partial."""
    mask = plan.request.spec.mask
    known = _positions_known(plan)
    rows: list[tuple[list[int], list[int]]] = []
    for i in range(plan.num_q):
        full, partial = [], []
        for j in range(plan.num_k):
            cover = mask.coverage(_span(plan, i, j)) if known else Coverage.PARTIAL
            cut = _guarded(plan) or (plan.padded_keys and j == plan.num_k - 1)
            if cover == Coverage.FULL and not cut:
                full.append(j)
            elif cover != Coverage.EMPTY:
                partial.append(j)
        rows.append((full, partial))
    return TileTable(
        *_as_table([full for full, _ in rows]),
        *_as_table([partial for _, partial in rows]),
    )


def _span(plan: BlockPlan, i: int, j: int) -> Span:
    """Positions of tile (i, j), without padding."""
    return Span(
        q_first=i * plan.block_q,
        q_last=min((i + 1) * plan.block_q, plan.request.q_len) - 1,
        k_first=j * plan.block_k,
        k_last=min((j + 1) * plan.block_k, plan.request.kv_len) - 1,
    )


def _as_table(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(row) for row in rows], np.int32)
    table = np.zeros((len(rows), max(1, counts.max())), np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table, counts


def tile_at(plan: BlockPlan, operands: Arrays, i, j) -> tuple[Tile, jax.Array | None]:
    """Tile (i, j) and its whole mask."""
    place = (i * plan.block_q, plan.block_q, j * plan.block_k, plan.block_k)
    return _tile_and_mask(plan, operands, place)


def _tile_and_mask(plan: BlockPlan, operands: Arrays, place):
    """A tile and its mask, the padding of the keys included."""
    tile = tiles.make_tile(plan.request, operands, place)
    mask = tiles.visible(plan.request.spec, tile)
    if plan.padded_keys:
        keys = jnp.arange(place[3], dtype=jnp.int32) + place[2]
        exists = (keys < plan.request.kv_len)[None, None, None, :]
        mask = exists if mask is None else mask & exists
    return tile, mask


def for_all_mapped(evaluate):
    """operands -> (seen, full), made so that under vmap one answer serves the whole
    mapped axis: seen by any of it, full for all of it.

    Loops over tiles then keep one length, and the axis can become one of a grid's.
    """
    folded = jax.custom_batching.custom_vmap(evaluate)

    @folded.def_vmap
    def _(axis_size, in_batched, operands):
        del axis_size
        axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched[0])
        seen, full = jax.vmap(evaluate, in_axes=(axes,))(operands)
        return (seen.any(0), full.all(0)), (False, False)

    return folded


def _seen_and_full(plan: BlockPlan):
    """operands -> (seen, full), bool [num_q, num_k]: whether a tile's mask shows
    anything, and everything.
    """

    def evaluate(operands: Arrays):
        def row(i):
            place = (i * plan.block_q, plan.block_q, 0, plan.num_k * plan.block_k)
            _, mask = _tile_and_mask(plan, operands, place)
            mask = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
            whole = (*mask.shape[:2], plan.block_q, place[3])
            mask = jnp.broadcast_to(mask, whole).reshape(-1, plan.num_k, plan.block_k)
            return mask.any((0, 2)), mask.all((0, 2))

        return jax.lax.map(row, jnp.arange(plan.num_q, dtype=jnp.int32))

    return for_all_mapped(evaluate)


def _sort_on_device(plan: BlockPlan, operands: Arrays, static: TileTable) -> TileTable:
    """Evaluate the mask of one row of tiles at a time, and sort what is left of the
    static table."""
    open_tiles = np.zeros((plan.num_q, plan.num_k), bool)
    for i in range(plan.num_q):
        open_tiles[i, static.full[i, : static.num_full[i]]] = True
        open_tiles[i, static.partial[i, : static.num_partial[i]]] = True

    seen, full = _seen_and_full(plan)(operands)
    full = full & open_tiles
    partial = seen & open_tiles & ~full

    def compact(chosen):
        order = jnp.argsort(~chosen, axis=1, stable=True).astype(jnp.int32)
        return order, chosen.sum(axis=1, dtype=jnp.int32)

    return TileTable(*compact(full), *compact(partial))
