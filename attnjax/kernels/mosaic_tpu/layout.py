"""Arrays as the kernels take them: padded, heads first, cut into blocks.

An operand is laid out by the axes along which it really varies:
    scalar  neither t nor s: [B|1, H|1] in scalar memory
    row     t alone: [B|1, H|1, 1, T]
    column  s alone: [B|1, H|1, 1, S]
    tile    both: [B|1, H|1, T, S]
Vectors lie along lanes, because a column in memory would be padded to 128 lanes; the
kernel turns them where it needs to. Tables have forms of their own (tables.py).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnjax.kernels import look_ups, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.masks import Tile
from attnjax.kernels.mosaic_tpu import tables
from attnjax.kernels.mosaic_tpu.blocks import turn
from attnjax.kernels.operands import Operand, as_rank4

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step of the grid is: traced scalars.

    Attributes:
        b, h: batch index and query head.
        i, j: block of queries and of keys.
    """

    b: jax.Array
    h: jax.Array
    i: jax.Array
    j: jax.Array


def form_of(operand: Operand, shape: tuple[int, ...]) -> str:
    """ "scalar", "row", "column" or "tile"."""
    varies = {a for a, n in zip(operand.axes, shape, strict=True) if n > 1}
    if "t" in varies:
        return "tile" if "s" in varies else "row"
    return "column" if "s" in varies else "scalar"


def operand_forms(plan: BlockPlan) -> dict[str, str]:
    """The form of each operand that the kernels read."""
    known = tiles.declarations(plan.request.spec)
    shapes = tiles.of_tiles(plan.request.spec, dict(plan.request.operand_shapes))
    # `tiles.place_queries` has turned it into positions.
    if "q_offset" in shapes:
        offset = shapes.pop("q_offset")
        shapes["q_positions"] = (offset[0] if offset else 1, plan.request.q_len)
    found = tables.forms(plan)
    for name in sorted(shapes):
        if known[name].axes != "*":
            found[name] = form_of(known[name], shapes[name])
    return found


def arrange_operands(plan: BlockPlan, operands: Arrays) -> dict[str, jax.Array]:
    """Operands in the layout of their forms."""
    known = tiles.declarations(plan.request.spec)
    forms = operand_forms(plan)
    vectors = {
        name: _arrange(plan, forms[name], as_rank4(array, known[name].axes))
        for name, array in operands.items()
        if known[name].axes != "*"
    }
    return vectors | tables.arrange(plan, operands)


def _arrange(plan: BlockPlan, form: str, x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.int32)
    elif form != "tile" or x.dtype != jnp.bfloat16:
        x = x.astype(jnp.float32)
    if form == "scalar":
        return x.reshape(x.shape[:2])
    if form == "row":
        x = jnp.swapaxes(x, 2, 3)
    longer = {
        "row": (1, plan.num_q * plan.block_q),
        "column": (1, plan.num_k * plan.block_k),
        "tile": (plan.num_q * plan.block_q, plan.num_k * plan.block_k),
    }[form]
    return pad_to(x, (*x.shape[:2], *longer))


def pad_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros after the end of each axis."""
    width = [(0, new - old) for old, new in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, width) if any(map(any, width)) else x


def blocked_heads(x: jax.Array, length: int) -> jax.Array:
    """[B, T, H, D] to [B, H, length, D]."""
    x = tiles.heads_first(x)
    return pad_to(x, (*x.shape[:2], length, x.shape[3]))


def row_vectors(x: jax.Array, length: int) -> jax.Array:
    """[B, T, H] to [B, H, 1, length]."""
    x = jnp.swapaxes(x, 1, 2)[:, :, None]
    return pad_to(x, (*x.shape[:3], length))


def operand_spec(plan: BlockPlan, name: str, shape, place) -> pl.BlockSpec:
    """How an arranged operand is cut.

    Args:
        place: (grid indices and the words' ref) -> `Place`.
    """
    form = operand_forms(plan)[name]
    if form == "scalar":
        return pl.BlockSpec(memory_space=pltpu.SMEM)
    if form in ("diagonals", "marks"):
        return tables.spec_of(plan, name, shape, place)
    sizes = {
        "row": (1, plan.block_q),
        "column": (1, plan.block_k),
        "tile": (plan.block_q, plan.block_k),
    }[form]

    def index(*grid):
        at = place(*grid)
        b = at.b if shape[0] > 1 else 0
        h = at.h if shape[1] > 1 else 0
        last = {"row": (0, at.i), "column": (0, at.j), "tile": (at.i, at.j)}[form]
        return (b, h, *last)

    return pl.BlockSpec((None, None, *sizes), index)


def read_tile(plan: BlockPlan, refs: Mapping, place: Place, *, swapped: bool) -> Tile:
    """The tile at a place with its operands, of rank 2 instead of 4.

    Args:
        refs: blocks of the operands.
        swapped: keys along the first axis and queries along the second: functions of
            a spec are elementwise, so both ways they see arrays that broadcast.
    """
    forms = operand_forms(plan)
    known = tiles.declarations(plan.request.spec)
    values = {}
    for name, ref in refs.items():
        if forms[name] == "marks":
            # What they say is only asked where the mask is.
            values[name] = ref[...]
        elif forms[name] == "diagonals":
            value = tables.bias_tile(plan, ref, place)
            values[name] = value.T if swapped else value
        else:
            value = read(forms[name], ref, place, swapped=swapped)
            values[name] = value != 0 if known[name].kind == "bool" else value
    queries, keys = _numbers(plan, place, swapped)
    return Tile(
        b=place.b,
        h=place.h,
        q=values.pop("q_positions", queries),
        k=values.pop("k_positions", keys),
        operands=values,
    )


def read(form: str, ref, place: Place, *, swapped: bool) -> jax.Array:
    """An operand's block, laid out to broadcast against a tile."""
    if form == "scalar":
        b = place.b if ref.shape[0] > 1 else 0
        h = place.h if ref.shape[1] > 1 else 0
        return ref[b, h]
    if form == "tile":
        value = ref[...]
        if value.dtype == jnp.bfloat16:
            value = value.astype(jnp.float32)
        return value.T if swapped else value
    along_lanes = swapped if form == "row" else not swapped
    return ref[...] if along_lanes else turn(ref[...])


def _numbers(plan: BlockPlan, place: Place, swapped: bool):
    """Which queries and keys a tile holds, as vectors that broadcast against it."""
    found = []
    for axis, first, size in (
        (swapped, place.i * plan.block_q, plan.block_q),
        (not swapped, place.j * plan.block_k, plan.block_k),
    ):
        shape = (1, size) if axis else (size, 1)
        steps = jax.lax.broadcasted_iota(jnp.int32, shape, int(axis))
        found.append(first + steps)
    return found


def visible(plan: BlockPlan, tile: Tile, place: Place, *, swapped: bool) -> jax.Array:
    """The whole mask of a tile, padding of queries and keys included; of full shape."""
    queries, keys = _numbers(plan, place, swapped)
    marks = tables.mark_tiles(plan, tile, place, swapped=swapped)
    marked = dataclasses.replace(tile, operands=tile.operands | marks)
    conditions = [tiles.visible(look_ups.inside(plan.request.spec), marked)]
    if plan.padded_keys:
        conditions.append(keys < plan.request.kv_len)
    if plan.num_q * plan.block_q != plan.request.q_len:
        conditions.append(queries < plan.request.q_len)
    shape = (plan.block_k, plan.block_q) if swapped else (plan.block_q, plan.block_k)
    mask = jnp.ones(shape, jnp.bool_)
    for condition in conditions:
        mask = mask if condition is None else mask & condition
    return mask
