"""Which tiles a mask of arrays shows, found on the device: by block, or by score.

A mask by blocks is read off its own array, so that its cost is that of the array; of
masks that are combined with it each finds its own. Every other mask is evaluated once
on all scores, a block of queries at a time.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels import tiles
from attnjax.kernels.block_masks import BlockMask
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.masks import And, Full, Mask, Or
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.tile_table import for_all_mapped, static_table

Arrays = Mapping[str, jax.Array]
Pair = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]


def seen_and_full(plan: BlockPlan):
    """operands, padded to whole blocks -> (seen, full), bool [B|1, H|1, num_q, num_k]:
    whether a tile may show anything, and whether it shows everything.
    """

    def evaluate(operands: Arrays):
        seen, full = _of_mask(plan, plan.request.spec.mask, operands)
        if "kv_mask" in operands:
            valid = _by_score(plan, Full(), operands, guarded=True)
            seen, full = seen & valid[0], full & valid[1]
        return jnp.asarray(seen), jnp.asarray(full & _whole_tiles(plan))

    return for_all_mapped(evaluate)


def _whole_tiles(plan: BlockPlan) -> np.ndarray:
    """Tiles without padding of queries or keys."""
    whole = np.ones((1, 1, plan.num_q, plan.num_k), bool)
    whole[:, :, -1] &= plan.num_q * plan.block_q == plan.request.q_len
    whole[..., -1] &= not plan.padded_keys
    return whole


def _of_mask(plan: BlockPlan, mask: Mask, operands: Arrays) -> Pair:
    if _reads_blocks(mask) and plan.request.static_positions:
        if isinstance(mask, BlockMask):
            return _by_block(plan, mask, operands["block_mask"])
        first, second = (
            _of_mask(plan, part, operands) for part in (mask.first, mask.second)
        )
        join = jnp.logical_and if isinstance(mask, And) else jnp.logical_or
        return join(first[0], second[0]), join(first[1], second[1])
    if mask.complete and plan.request.static_positions:
        return _by_position(plan, mask)
    return _by_score(plan, mask, operands)


def _reads_blocks(mask: Mask) -> bool:
    if isinstance(mask, And | Or):
        return _reads_blocks(mask.first) or _reads_blocks(mask.second)
    return isinstance(mask, BlockMask)


def _by_position(plan: BlockPlan, mask: Mask) -> Pair:
    """From static positions alone."""
    request = dataclasses.replace(
        plan.request, spec=AttentionSpec(mask=mask), operand_shapes=()
    )
    table = static_table(dataclasses.replace(plan, request=request))
    full = np.zeros((1, 1, plan.num_q, plan.num_k), bool)
    seen = np.zeros_like(full)
    for i in range(plan.num_q):
        full[..., i, table.full[i, : table.num_full[i]]] = True
        seen[..., i, table.partial[i, : table.num_partial[i]]] = True
    return seen | full, full


def _by_block(plan: BlockPlan, mask: BlockMask, table: jax.Array) -> Pair:
    """From the array of marks."""
    seen = full = jnp.pad(table, ((0, 0), (0, 0), (0, 1), (0, 1)))
    sides = (
        (2, plan.block_q, mask.block_q, plan.request.q_len),
        (3, plan.block_k, mask.block_k, plan.request.kv_len),
    )
    for axis, tile, block, length in sides:
        met = _blocks_met(tile, block, length, table.shape[axis])
        shape = (*seen.shape[:axis], *met.shape, *seen.shape[axis + 1 :])
        seen, full = (
            jnp.take(x, met.reshape(-1), axis=axis).reshape(shape) for x in (seen, full)
        )
        seen, full = seen.any(axis + 1), full.all(axis + 1)
    return seen, full


def _blocks_met(tile: int, block: int, length: int, known: int) -> np.ndarray:
    """int [tiles, n]: the blocks that each tile meets; some of them more than once,
    and `known` for those beyond an array."""
    first = np.arange(0, length, tile)
    last = np.minimum(first + tile, length) - 1
    most = int((last // block - first // block).max()) + 1
    met = np.minimum(
        (first // block)[:, None] + np.arange(most), last[:, None] // block
    )
    return np.minimum(met, known)


def _by_score(
    plan: BlockPlan, mask: Mask, operands: Arrays, *, guarded: bool = False
) -> Pair:
    """From the mask itself (with `guarded`, from which keys exist), exactly."""
    request = plan.request

    def row(operands: Arrays, i):
        place = (i * plan.block_q, plan.block_q, 0, plan.num_k * plan.block_k)
        tile = tiles.make_tile(request, operands, place)
        mask_row = tile.operands["kv_mask"] if guarded else mask.visible(tile)
        queries = place[0] + jnp.arange(place[1], dtype=jnp.int32)
        keys = jnp.arange(place[3], dtype=jnp.int32)
        exist = (queries < request.q_len)[:, None] & (keys < request.kv_len)
        # What does not exist is neither seen nor in the way of being full.
        if mask_row is None:
            mask_row = jnp.ones((1, 1, 1, 1), bool)
        seen, full = mask_row & exist, mask_row | ~exist
        shape = (*seen.shape[:3], plan.num_k, plan.block_k)
        return seen.reshape(shape).any((2, 4)), full.reshape(shape).all((2, 4))

    numbers = jnp.arange(plan.num_q, dtype=jnp.int32)
    found = jax.lax.map(functools.partial(row, operands), numbers)
    return tuple(jnp.moveaxis(x, 0, 2) for x in found)
