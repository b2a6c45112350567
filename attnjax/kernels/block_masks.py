"""Masks by blocks of queries and keys: lists that are known, or arrays.

Positions are counted from 0; block i of size n holds positions i n .. i n + n - 1.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels.masks import Coverage, Mask, Span, Tile
from attnjax.kernels.operands import Operand


def _check_sizes(owner: str, block_q: int, block_k: int) -> None:
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{owner}: {name} must be an integer >= 1; got {name}={value!r}."
            )


@dataclasses.dataclass(frozen=True)
class BlockLists(Mask):
    """A block of queries attends to the blocks of keys in its list, known statically.

    Attributes:
        block_q, block_k: positions in a block of queries and of keys.
        lists: for each block of queries the indices of its blocks of keys.
    """

    block_q: int
    block_k: int
    lists: tuple[tuple[int, ...], ...]
    positional = True
    complete = True

    def __post_init__(self):
        _check_sizes("BlockLists", self.block_q, self.block_k)
        lists = tuple(tuple(map(int, row)) for row in self.lists)
        object.__setattr__(self, "lists", lists)
        if not lists or any(j < 0 for row in lists for j in row):
            raise ValueError(
                "BlockLists: lists must name blocks of keys by indices >= 0, one list "
                f"for each block of queries; got lists={lists}."
            )

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        """Every block of queries has a list, and lists name blocks that exist."""
        rows, columns = -(-q_len // self.block_q), -(-kv_len // self.block_k)
        if len(self.lists) != rows or block_table(self).shape[1] > columns:
            raise ValueError(
                f"BlockLists: T={q_len} has {rows} blocks of {self.block_q} queries "
                f"and S={kv_len} has {columns} blocks of {self.block_k} keys; got "
                f"{len(self.lists)} lists with indices up to "
                f"{block_table(self).shape[1] - 1}."
            )

    def visible(self, tile: Tile) -> jax.Array:
        """Whether the key's block is in the list of the query's."""
        table = jnp.asarray(block_table(self))[None, None]
        return _look_up(table, tile, self.block_q, self.block_k)

    def coverage(self, span: Span) -> Coverage:
        """Exact: from the blocks that the tile touches."""
        part = block_table(self)[
            span.q_first // self.block_q : span.q_last // self.block_q + 1,
            span.k_first // self.block_k : span.k_last // self.block_k + 1,
        ]
        if not part.any():
            return Coverage.EMPTY
        reached = (span.k_last // self.block_k) < block_table(self).shape[1]
        return Coverage.FULL if part.all() and reached else Coverage.PARTIAL


@functools.lru_cache(maxsize=64)
def block_table(mask: BlockLists) -> np.ndarray:
    """Lists as bool [blocks of queries, blocks of keys up to the last one named]."""
    columns = 1 + max((j for row in mask.lists for j in row), default=0)
    table = np.zeros((len(mask.lists), columns), bool)
    for i, row in enumerate(mask.lists):
        table[i, list(row)] = True
    return table


@dataclasses.dataclass(frozen=True)
class BlockMask(Mask):
    """A block of queries attends to the blocks of keys that an array marks.

    Operand: `block_mask` bool [B, H, NQ, NK] (1 in B or H where they share), with
    NQ = ceil(T / block_q) and NK = ceil(S / block_k); `mark_blocks` makes one of
    lists. Blocks beyond the array are not seen.

    Attributes:
        block_q, block_k: positions in a block of queries and of keys.
    """

    block_q: int
    block_k: int
    positional = True
    operands = (Operand("block_mask", "*", "bool", shape="bhmn"),)

    def __post_init__(self):
        _check_sizes("BlockMask", self.block_q, self.block_k)

    def visible(self, tile: Tile) -> jax.Array:
        """Whether the block of the query and the key is marked."""
        table = tile.operands["block_mask"]
        return _look_up(table, tile, self.block_q, self.block_k)


def _look_up(table: jax.Array, tile: Tile, block_q: int, block_k: int) -> jax.Array:
    """table[b, h, q // block_q, k // block_k], False beyond its ends."""
    rows = jax.lax.div(tile.q, jnp.int32(block_q))
    columns = jax.lax.div(tile.k, jnp.int32(block_k))
    inside = (rows < table.shape[2]) & (columns < table.shape[3])
    rows = jnp.minimum(rows, table.shape[2] - 1)
    columns = jnp.minimum(columns, table.shape[3] - 1)
    shared = rows.shape[0] == columns.shape[0] == 1
    batches, heads = (1, tile.b.shape[0]), (1, tile.h.shape[1])
    if shared and table.shape[0] in batches and table.shape[1] in heads:
        part = jnp.take(table, rows[0, 0, :, 0], axis=2)
        return jnp.take(part, columns[0, 0, 0, :], axis=3) & inside
    b = tile.b if table.shape[0] > 1 else 0
    h = tile.h if table.shape[1] > 1 else 0
    return table[b, h, rows, columns] & inside


def mark_blocks(indices: jax.Array, counts: jax.Array, *, num_k: int) -> jax.Array:
    """The array of `BlockMask` from lists.

    Args:
        indices: int [..., NQ, n], blocks of keys of each block of queries.
        counts: int [..., NQ], how many of a list count.
        num_k: NK, the number of blocks of keys; an index beyond it marks nothing.

    Returns:
        bool [..., NQ, NK].
    """
    counted = jnp.arange(indices.shape[-1]) < counts[..., None]
    # What does not count is written to one more block, which is cut off.
    flat = jnp.where(counted, indices, num_k).reshape(-1, indices.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    marks = jnp.zeros((flat.shape[0], num_k + 1), bool)
    marks = marks.at[rows, jnp.minimum(flat, num_k)].set(True)
    return marks[:, :num_k].reshape(*counts.shape, num_k)
