"""Which tiles a kernel visits, as words that its grid walks.

A kind matrix [B or 1, num_q, num_k] says of each tile whether the mask leaves it
empty, partial or full. A list of steps orders the tiles by blocks of queries, or of
keys; one word holds a step, because all words must fit the scalar memory.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels import tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.blocked_forward import pad_operands
from attnjax.kernels.tile_table import static_table

Arrays = Mapping[str, jax.Array]
Words = np.ndarray | jax.Array

EMPTY, PARTIAL, FULL = 0, 1, 2
# A word: bits 0-1 the kind, 2 first and 3 last of its row, then two block indices.
FIRST, LAST = 4, 8
FLAG_BITS, INDEX_BITS = 4, 13
MOST_BLOCKS = 2**INDEX_BITS
# Words of all batch rows together: 256 KiB of scalar memory.
MOST_WORDS = 2**16


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


def tile_kinds(plan: BlockPlan, operands: Arrays) -> Words:
    """Kinds [B or 1, num_q, num_k]: a constant, or found on the device."""
    static = static_kinds(plan)
    if is_static(plan):
        return static[None]
    seen, full = _seen_and_full(plan)(pad_operands(plan, operands))
    if seen.shape[0] * static.size > MOST_WORDS:
        seen, full = seen.any(0, keepdims=True), full.all(0, keepdims=True)
    found = jnp.where(full, FULL, jnp.where(seen, PARTIAL, EMPTY)).astype(jnp.int32)
    return jnp.where(static == EMPTY, EMPTY, found)


def _seen_and_full(plan: BlockPlan):
    """operands -> (seen, full), bool [B or 1, num_q, num_k]: whether a tile's mask
    shows anything, and everything, to any, and all, heads.

    Under vmap one list of steps serves the whole mapped axis, so that the axis can
    become one of the grid's.
    """
    request = plan.request

    def row(operands: Arrays, i):
        place = (i * plan.block_q, plan.block_q, 0, plan.num_k * plan.block_k)
        tile = tiles.make_tile(request, operands, place)
        mask = tiles.visible(request.spec, tile)
        queries = place[0] + jnp.arange(place[1], dtype=jnp.int32)
        keys = jnp.arange(place[3], dtype=jnp.int32)
        exist = (queries < request.q_len)[:, None] & (keys < request.kv_len)
        mask = exist[None, None] if mask is None else mask & exist
        mask = mask.reshape(*mask.shape[:3], plan.num_k, plan.block_k)
        return mask.any((1, 2, 4)), mask.all((1, 2, 4))

    def evaluate(operands: Arrays):
        numbers = jnp.arange(plan.num_q, dtype=jnp.int32)
        found = jax.lax.map(functools.partial(row, operands), numbers)
        return tuple(jnp.swapaxes(x, 0, 1) for x in found)

    folded = jax.custom_batching.custom_vmap(evaluate)

    @folded.def_vmap
    def _(axis_size, in_batched, operands):
        del axis_size
        axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched[0])
        seen, full = jax.vmap(evaluate, in_axes=(axes,))(operands)
        return (seen.any(0), full.all(0)), (False, False)

    return folded


def list_steps(kinds: Words) -> Words:
    """Steps [B or 1, n] over the rows of a kind matrix, each row at least once.

    Known kinds give as many steps as there are tiles to visit; kinds found on the
    device give one for each tile, those to visit first in each row. The rest name the
    last tile visited, so that nothing is fetched for them.
    """
    if isinstance(kinds, np.ndarray):
        return _static_steps(kinds[0])[None]
    num_b, num_rows, num_columns = kinds.shape
    seen = kinds != EMPTY
    order = jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32)
    count = seen.sum(-1, keepdims=True, dtype=jnp.int32)
    number = jnp.arange(num_columns, dtype=jnp.int32)
    place = jnp.minimum(number, jnp.maximum(count - 1, 0))
    columns = jnp.take_along_axis(order, place, -1)
    kind = jnp.take_along_axis(kinds, columns, -1)
    flags = jnp.where(number < count, kind, EMPTY)
    flags += jnp.where(number == 0, FIRST, 0)
    flags += jnp.where(number == num_columns - 1, LAST, 0)
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    words = _pack(rows, columns, flags)
    return words.reshape(num_b, num_rows * num_columns)


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
    """Steps [B or 1, n] over all tiles, the empty ones too, each a row of its own."""
    num_b, num_rows, num_columns = kinds.shape
    xp = np if isinstance(kinds, np.ndarray) else jnp
    rows = xp.arange(num_rows, dtype=np.int32)[:, None]
    columns = xp.arange(num_columns, dtype=np.int32)
    words = _pack(rows, columns, kinds | FIRST | LAST)
    return words.reshape(num_b, num_rows * num_columns)
