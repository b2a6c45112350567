"""Which tiles a kernel visits, as words that its grid walks.

A kind matrix [num_q, num_k], one for all or for each row of the batch and head, says
of each tile whether the mask leaves it empty, partial or full. A list of steps orders
the tiles by blocks of queries, or of keys; one word holds a step, because all words
must fit the scalar memory.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.blocked_forward import pad_operands
from attnjax.kernels.mosaic_tpu.seen import seen_and_full
from attnjax.kernels.tile_table import static_table

Arrays = Mapping[str, jax.Array]
Words = np.ndarray | jax.Array

EMPTY, PARTIAL, FULL = 0, 1, 2
# A word: bits 0-1 the kind, 2 first and 3 last of its row, then two block indices.
FIRST, LAST = 4, 8
FLAG_BITS, INDEX_BITS = 4, 13
MOST_BLOCKS = 2**INDEX_BITS
# Words of all lists together: half of the 1 MiB of scalar memory.
MOST_WORDS = 2**17


def kind_of(word):
    """EMPTY, PARTIAL or FULL."""
    return word & 3


def row_of(word):
    """The block whose results are gathered: of queries, or of keys."""
    return word >> (FLAG_BITS + INDEX_BITS)


def column_of(word):
    """The block that is walked over."""
    return (word >> FLAG_BITS) & (MOST_BLOCKS - 1)


def is_static(plan: BlockPlan) -> bool:
    """Whether positions alone say everything about the mask."""
    request = plan.request
    mask = request.spec.mask
    known = request.static_positions or not mask.positional
    return known and mask.complete and "kv_mask" not in request.operand_names


@functools.lru_cache(maxsize=256)
def static_kinds(plan: BlockPlan) -> np.ndarray:
    """Kinds [num_q, num_k] from static positions; what they leave open is partial."""
    table = static_table(plan)
    kinds = np.zeros((plan.num_q, plan.num_k), np.int32)
    for i in range(plan.num_q):
        kinds[i, table.full[i, : table.num_full[i]]] = FULL
        kinds[i, table.partial[i, : table.num_partial[i]]] = PARTIAL
    if plan.num_q * plan.block_q != plan.request.q_len:
        # Queries that do not exist are masked, so that they add to no gradient.
        kinds[-1] = np.minimum(kinds[-1], PARTIAL)
    return kinds


def tile_kinds(plan: BlockPlan, operands: Arrays, *, by_head: bool = True) -> Words:
    """Kinds [B or 1, H or 1, num_q, num_k]: a constant, or found on the device.

    Args:
        by_head: whether heads may have lists of their own.
    """
    static = static_kinds(plan)
    if is_static(plan):
        return static[None, None]
    seen, full = seen_and_full(plan)(pad_operands(plan, operands))
    group = plan.request.num_heads // plan.request.num_kv_heads
    for axis, may in ((1, by_head and group * plan.num_q <= MOST_BLOCKS), (0, True)):
        if not may or seen.shape[0] * seen.shape[1] * static.size > MOST_WORDS:
            seen = seen.any(axis, keepdims=True)
            full = full.all(axis, keepdims=True)
    found = jnp.where(full, FULL, jnp.where(seen, PARTIAL, EMPTY)).astype(jnp.int32)
    return jnp.where(static == EMPTY, EMPTY, found)


def by_keys(plan: BlockPlan, kinds: Words) -> Words:
    """Kinds [B or 1, 1, num_k, num_q] to walk over queries; or, if each head has its
    own, [B or 1, K, num_k, G num_q]: a column i of the g-th query head of a key/value
    head is g num_q + i."""
    kinds = kinds.swapaxes(2, 3)
    b, h, num_k, num_q = kinds.shape
    if h == 1:
        return kinds
    heads = plan.request.num_kv_heads
    kinds = kinds.reshape(b, heads, h // heads, num_k, num_q).swapaxes(2, 3)
    return kinds.reshape(b, heads, num_k, -1)


def list_steps(kinds: Words) -> Words:
    """Steps [B or 1, heads or 1, n] over the rows of kind matrices, each row at least
    once.

    Known kinds give as many steps as there are tiles to visit; kinds found on the
    device give one for each tile, those to visit first in each row. The rest name the
    last tile visited, so that nothing is fetched for them.
    """
    if isinstance(kinds, np.ndarray):
        return _static_steps(kinds[0, 0])[None, None]
    num_columns = kinds.shape[3]
    seen = kinds != EMPTY
    number = jnp.arange(num_columns, dtype=jnp.int32)
    count = seen.sum(-1, keepdims=True, dtype=jnp.int32)
    last = jnp.where(seen, number, 0).max(-1, keepdims=True)
    # One sort of numbers and no look-up: tiles that are seen come first, with kinds.
    behind = jnp.where(seen, 0, 4 * MOST_BLOCKS)
    order = jax.lax.sort(behind + 4 * number + kinds, is_stable=False)
    visited = number < count
    columns = jnp.where(visited, order >> 2, last)
    flags = jnp.where(visited, order & 3, EMPTY)
    flags += jnp.where(number == 0, FIRST, 0)
    flags += jnp.where(number == num_columns - 1, LAST, 0)
    rows = jnp.arange(kinds.shape[2], dtype=jnp.int32)[:, None]
    words = _pack(rows, columns, flags)
    return words.reshape(*kinds.shape[:2], -1)


def _static_steps(kinds: np.ndarray) -> np.ndarray:
    words = []
    for row, row_kinds in enumerate(kinds):
        columns = np.flatnonzero(row_kinds != EMPTY)
        if not columns.size:
            columns = np.zeros(1, int)
        flags = row_kinds[columns].astype(np.int64)
        flags[0] += FIRST
        flags[-1] += LAST
        words.append(_pack(row, columns, flags))
    return np.concatenate(words).astype(np.int32)


def _pack(row, column, flags):
    return (row << (FLAG_BITS + INDEX_BITS)) | (column << FLAG_BITS) | flags


def list_tiles(kinds: Words) -> Words:
    """Steps [B or 1, H or 1, n] over all tiles, the empty ones too, each a row of its
    own."""
    num_rows, num_columns = kinds.shape[2:]
    xp = np if isinstance(kinds, np.ndarray) else jnp
    rows = xp.arange(num_rows, dtype=np.int32)[:, None]
    columns = xp.arange(num_columns, dtype=np.int32)
    words = _pack(rows, columns, kinds | FIRST | LAST)
    return words.reshape(*kinds.shape[:2], -1)
