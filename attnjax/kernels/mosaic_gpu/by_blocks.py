"""Masks by blocks of queries and keys: one number for a tile that lies in a block."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels.block_masks import BlockLists, BlockMask
from attnjax.kernels.masks import And, Mask, Or, Tile
from attnjax.kernels.mosaic_gpu.tiles import BLOCK, ROWS
from attnjax.kernels.request import Request

BLOCK_MASK = BlockMask.operands[0].name


def nodes(mask: Mask) -> Iterator[Mask]:
    """The masks that a mask combines."""
    if isinstance(mask, And | Or):
        yield from nodes(mask.first)
        yield from nodes(mask.second)
    else:
        yield mask


def refusal(request: Request) -> str | None:
    """Why tiles would not lie in the blocks of the request's masks, or None."""
    for mask in nodes(request.spec.mask):
        if not isinstance(mask, BlockLists | BlockMask):
            continue
        if not request.static_positions:
            return f"finds the blocks of {type(mask).__name__} without positions alone"
        if mask.block_q % ROWS or mask.block_k % ROWS:
            return (
                f"needs blocks of whole tiles, {ROWS} queries and keys or multiples, "
                f"not {mask.block_q} and {mask.block_k}"
            )
    return None


def narrow(mask: Mask) -> bool:
    """Whether a tile of keys has to be one of `ROWS`, to lie in a block."""
    blocks = [x for x in nodes(mask) if isinstance(x, BlockLists | BlockMask)]
    return any(x.block_k % BLOCK for x in blocks)


def block_lists(mask: Mask) -> dict[str, BlockLists]:
    """The block lists in a mask, by names for their tables."""
    found = [node for node in nodes(mask) if isinstance(node, BlockLists)]
    return {f"block lists {i}": node for i, node in enumerate(dict.fromkeys(found))}


def table_of(mask: BlockLists) -> np.ndarray:
    """int32 [1, 1, blocks of queries, blocks of keys up to the last one named]."""
    columns = 1 + max((j for row in mask.lists for j in row), default=0)
    table = np.zeros((1, 1, len(mask.lists), columns), np.int32)
    for i, row in enumerate(mask.lists):
        table[0, 0, i, list(row)] = 1
    return table


def seen(mask: Mask, tile: Tile, look_up: Callable[[Mask], jax.Array]):
    """What `mask.visible(tile)` says, with masks by blocks looked up.

    Args:
        look_up: a mask by blocks -> boolean, the tile's one answer.
    """
    if isinstance(mask, BlockLists | BlockMask):
        return look_up(mask)
    if not isinstance(mask, And | Or):
        return mask.visible(tile)
    parts = [seen(x, tile, look_up) for x in (mask.first, mask.second)]
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known and isinstance(mask, And) else None
    return jnp.logical_and(*known) if isinstance(mask, And) else jnp.logical_or(*known)
