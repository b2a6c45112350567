"""Tables inside the kernels: tiles of biases by distance, and of marked blocks.

diagonals  [B|1, H|1, R, L]: a bias along falling distances, all of it in VMEM. The
           rows of a tile are one line of block_q + block_k numbers, each rotated
           by one place more than the row before; its gradient goes back the same
           way, halving the rows, and is summed in VMEM over a head's whole walk.
marks      int32 [B|1, H|1, N, W, S]: block rows as bits of W words of each key. A
           tile whose block rows lie in one word has one of N words of all rows; else
           there are W for each of N blocks of queries, or, where positions are only
           known on the device, one N for all
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnjax.kernels import look_ups
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.masks import Tile
from attnjax.kernels.mosaic_tpu.blocks import LANES, masks_inside, turn

Arrays = Mapping[str, jax.Array]
# Rows of a register: lines are turned and added eight at a time.
SUBLANES = 8


def forms(plan: BlockPlan) -> dict[str, str]:
    """ "diagonals" or "marks" of each table that the kernels read."""
    spec = plan.request.spec
    found = dict.fromkeys(look_ups.biases_by_distance(spec), "diagonals")
    if masks_inside(plan):
        found |= dict.fromkeys(look_ups.masks_by_blocks(spec), "marks")
    return found


def arrange(plan: BlockPlan, operands: Arrays) -> dict[str, jax.Array]:
    """The tables of a spec in the layout of their forms.

    Args:
        operands: with `q_positions` where the caller gave `q_offset`.
    """
    return {
        name: arrange_diagonals(plan, name, operands[name], operands)
        if form == "diagonals"
        else _arrange_marks(plan, name, operands)
        for name, form in forms(plan).items()
    }


def _lane(plan: BlockPlan) -> int:
    return math.gcd(plan.block_q, plan.block_k, LANES)


def arrange_diagonals(
    plan: BlockPlan, name: str, table: jax.Array, operands: Arrays
) -> jax.Array:
    """[B|1, H|1, R, L] of a table [H|1, 2 reach + 1]: distances from the largest on."""
    step = look_ups.biases_by_distance(plan.request.spec)[name]
    first = jnp.full((1,), plan.num_q * plan.block_q, jnp.int32)
    if "q_offset" in plan.request.operand_names:
        first = first + operands["q_positions"][:, 0]
    size = plan.num_q * plan.block_q + plan.num_k * plan.block_k
    found = look_ups.diagonals(step, table, first, size)
    return found.reshape(*found.shape[:2], -1, _lane(plan))


def _first_line(plan: BlockPlan, place) -> jax.Array:
    """Where the distances of a tile begin, in lines of lanes."""
    lane = _lane(plan)
    rows, columns = plan.block_q // lane, plan.block_k // lane
    return (plan.num_q - 1 - place.i) * rows + place.j * columns


def bias_tile(plan: BlockPlan, ref, place) -> jax.Array:
    """[block_q, block_k] of the diagonals."""
    first, lane = _first_line(plan, place), _lane(plan)
    width = plan.block_q + plan.block_k
    lines = [ref[pl.ds(first + n, 1), :] for n in range(width // lane)]
    line = jnp.broadcast_to(jnp.concatenate(lines, axis=1), (plan.block_q, width))
    turned = pltpu.roll(line, plan.block_k, 1, stride=1, stride_axis=0)
    return turned[:, : plan.block_k]


def add_diagonals(plan: BlockPlan, tile: jax.Array, ref, place) -> None:
    """Add the sums of a tile [block_q, block_k] along its diagonals."""
    width = plan.block_q + plan.block_k
    zeros = jnp.zeros((plan.block_q, plan.block_q), tile.dtype)
    rows = jnp.concatenate([tile, zeros], axis=1)
    while rows.shape[0] > SUBLANES:
        # The lower half lies as many places to the right as rows below the upper.
        half = -(-rows.shape[0] // (2 * SUBLANES)) * SUBLANES
        lower = pltpu.roll(rows[half:], width - half, 1)
        upper = rows[: lower.shape[0]] + lower
        rest = rows[lower.shape[0] : half]
        rows = jnp.concatenate([upper, rest], axis=0) if rest.shape[0] else upper
    line = pltpu.roll(rows[:1], plan.block_q, 1)
    for n in range(1, rows.shape[0]):
        line = line + pltpu.roll(rows[n : n + 1], plan.block_q - n, 1)
    first, lane = _first_line(plan, place), _lane(plan)
    for n in range(width // lane):
        ref[pl.ds(first + n, 1), :] += line[:, n * lane : (n + 1) * lane]


def _queries_known(plan: BlockPlan) -> bool:
    return not {"q_offset", "q_positions"} & plan.request.operand_names


def _rows_met(plan: BlockPlan, mask) -> np.ndarray:
    """int [num_q, 2]: the first and the last block row that blocks of queries meet."""
    first = np.arange(plan.num_q) * plan.block_q
    return np.stack([first, first + plan.block_q - 1], axis=1) // mask.block_q


def _in_one_word(plan: BlockPlan, mask) -> bool:
    """Whether no block of queries meets block rows of two words."""
    words = _rows_met(plan, mask) // look_ups.BITS
    return _queries_known(plan) and bool((words[:, 0] == words[:, 1]).all())


def _arrange_marks(plan: BlockPlan, name: str, operands: Arrays) -> jax.Array:
    mask = look_ups.masks_by_blocks(plan.request.spec)[name]
    table = look_ups.table_of(mask, operands)
    met = _rows_met(plan, mask)
    if _in_one_word(plan, mask):
        words = 1 + int(met.max()) // look_ups.BITS
        rows = np.arange(words * look_ups.BITS).reshape(words, -1)
    elif _queries_known(plan):
        rows = met[:, :1] + np.arange(1 + int((met[:, 1] - met[:, 0]).max()))
    else:
        rows = np.arange(table.shape[2])[None]
    rows = jnp.asarray(rows, jnp.int32)
    keys = operands.get("k_positions")
    if keys is None:
        keys = jnp.arange(plan.request.kv_len, dtype=jnp.int32)[None]
    columns = jax.lax.div(keys.astype(jnp.int32), jnp.int32(mask.block_k))
    longer = plan.num_k * plan.block_k - columns.shape[1]
    columns = jnp.pad(columns, ((0, 0), (0, longer)), constant_values=table.shape[3])
    return look_ups.mark_words(table, rows, columns)


def _place_of_words(plan: BlockPlan, mask, i):
    """Which of N a block of queries reads, and the block row of its first bit."""
    if not _queries_known(plan):
        return 0, 0
    first = jax.lax.div(i * plan.block_q, jnp.int32(mask.block_q))
    if _in_one_word(plan, mask):
        word = jax.lax.div(first, jnp.int32(look_ups.BITS))
        return word, word * look_ups.BITS
    return i, first


def spec_of(plan: BlockPlan, name: str, shape, place) -> pl.BlockSpec:
    """How an arranged table is cut; arguments as of `layout.operand_spec`."""
    mask = look_ups.masks_by_blocks(plan.request.spec).get(name)

    def index(*grid):
        at = place(*grid)
        lead = at.b if shape[0] > 1 else 0, at.h if shape[1] > 1 else 0
        if mask is None:
            return (*lead, 0, 0)
        return (*lead, _place_of_words(plan, mask, at.i)[0], 0, at.j)

    if mask is None:
        return pl.BlockSpec((None, None, *shape[2:]), index)
    return pl.BlockSpec((None, None, None, shape[3], plan.block_k), index)


def mark_tiles(plan: BlockPlan, tile: Tile, place, *, swapped: bool) -> dict:
    """Marks of a tile by name: bool, of the tile's shape."""
    masks = look_ups.masks_by_blocks(plan.request.spec)
    found = {}
    for name, mask in masks.items():
        words = tile.operands[name]
        row, _ = look_ups.divide(tile.q, mask.block_q)
        row = row - _place_of_words(plan, mask, place.i)[1]
        hit = jnp.zeros((), jnp.int32)
        for n in range(words.shape[0]):
            word = words[n : n + 1]
            word = turn(word) if swapped else word
            bits = jax.lax.shift_right_logical(
                *jnp.broadcast_arrays(word, row & (look_ups.BITS - 1))
            )
            hit = jnp.where((row >> 5) == n, bits & 1, hit)
        found[name] = hit == 1
    return found
