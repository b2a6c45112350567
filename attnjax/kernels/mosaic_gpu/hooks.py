"""Masks, scores and their operands as a kernel sees them: one tile of one head.

Tiles are [queries, keys], or [keys, queries] in the dk/dv kernel; the spec's own
functions run on them unchanged. Operands that do not vary along the tile are numbers,
the others are spread over it, so that every function stays elementwise.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attnjax.kernels import tiles
from attnjax.kernels.masks import Mask, Tile
from attnjax.kernels.mosaic_gpu import distances
from attnjax.kernels.mosaic_gpu.by_blocks import BLOCK_MASK, block_lists, seen, table_of
from attnjax.kernels.mosaic_gpu.inline import inline
from attnjax.kernels.mosaic_gpu.shim import Machine
from attnjax.kernels.mosaic_gpu.steps import Grid
from attnjax.kernels.operands import as_rank4
from attnjax.kernels.tile_math import LOW

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Held:
    """One operand in global memory.

    Attributes:
        name: its name.
        kind: "number" [b, h], "row" [b, h, T], "column" [b, h, S], "tile"
            [b, h, T, S], transposed where the kernel's tiles are, "blocks"
            [b, h, NQ, NK] of a mask by blocks, or "window" [b, h, 64, W] of a bias by
            distance; b and h may be 1.
        per_batch, per_head: whether it differs along those axes.
        is_bool: stored as int32, read as a boolean.
        reach: of a bias by distance.
    """

    name: str
    kind: str
    per_batch: bool
    per_head: bool
    is_bool: bool
    reach: int = 0


def pad_operands(grid: Grid, operands: Arrays) -> dict[str, jax.Array]:
    """Lengthen the operands' t and s axes to whole tiles, with zeros."""
    known = tiles.declarations(grid.request.spec)
    longer = {"t": grid.q_len, "s": grid.kv_len}
    padded = {}
    for name, array in operands.items():
        width = [(0, 0)] * array.ndim
        for axis, letter in enumerate(known[name].axes):
            if letter in longer and array.shape[axis] > 1:
                width[axis] = (0, longer[letter] - array.shape[axis])
        padded[name] = jnp.pad(array, width) if any(map(any, width)) else array
    return padded


def hold(grid: Grid, operands: Arrays) -> tuple[tuple[Held, ...], list[jax.Array]]:
    """Arrange padded operands for a kernel."""
    known = tiles.declarations(grid.request.spec)
    held, arrays = [], []
    lists = block_lists(grid.request.spec.mask)
    operands = {
        **operands,
        **{n: jnp.asarray(table_of(mask)) for n, mask in lists.items()},
    }
    by_distance = distances.steps_of(grid.request.spec)
    for name in sorted(operands):
        if name in by_distance:
            step = by_distance[name]
            array = distances.windows(grid, step, operands[name], operands)
            many = (n > 1 for n in array.shape[:2])
            held.append(Held(name, "window", *many, False, step.reach))
            arrays.append(array)
            continue
        blocks = name in lists or name == BLOCK_MASK
        axes = "bhts" if blocks else known[name].axes
        array = as_rank4(operands[name], axes)
        is_bool = array.dtype == jnp.bool_
        whole = is_bool or jnp.issubdtype(array.dtype, jnp.integer)
        array = array.astype(jnp.int32 if whole else jnp.float32)
        b, h, t, s = array.shape
        kind = ("number", "column", "row", "tile")[2 * (t > 1) + (s > 1)]
        if blocks:
            kind = "blocks"
        elif kind != "tile":
            array = array.reshape(b, h, -1)
        elif grid.transposed:
            array = array.swapaxes(2, 3)
        held.append(Held(name, kind, b > 1, h > 1, is_bool))
        arrays.append(array)
    return tuple(held), arrays


class _OnDemand(dict):
    """Operand tiles that are read when a function asks for them."""

    def __init__(self, load, known: Arrays | None = None):
        super().__init__(known or {})
        self._load = load

    def __missing__(self, name):
        self[name] = self._load(name)
        return self[name]

    def __or__(self, other):
        return _OnDemand(self._load, {**self, **other})


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The spec's functions on tiles of one kernel.

    Attributes:
        grid: how the call is cut.
        held: its operands, in the order of `refs`.
        refs: their references.
        machine: the warpgroup's operations.
        head: (batch index, query head).
    """

    grid: Grid
    held: tuple[Held, ...]
    refs: tuple
    machine: Machine
    head: tuple

    def numbers(self) -> dict[str, jax.Array]:
        """Operands that do not vary along the tile, read once."""
        return {
            x.name: self._read(x, None, None) for x in self.held if x.kind == "number"
        }

    def start(self):
        """Position of the row's first query."""
        x = next((x for x in self.held if x.name == "q_positions"), None)
        if x is None:
            return jnp.int32(0)
        return self.refs[self.held.index(x)][self.head[0] if x.per_batch else 0, 0, 0]

    def tile(self, numbers: Arrays, shape, q_first, k_first) -> Tile:
        """The tile whose first query and key are given."""
        machine, swap = self.machine, self.grid.transposed
        by_name = {x.name: x for x in self.held}
        firsts = {"row": q_first, "column": k_first}

        def load(name):
            return self._read(by_name[name], shape, firsts)

        def indices(name, first, axis):
            if name in by_name:
                return load(name)
            return machine.iota(shape, axis) + first

        return Tile(
            b=self.head[0],
            h=self.head[1],
            q=indices("q_positions", q_first, 1 if swap else 0),
            k=indices("k_positions", k_first, 0 if swap else 1),
            operands=_OnDemand(load, numbers),
        )

    def _read(self, x: Held, shape, firsts):
        ref = self.refs[self.held.index(x)]
        b = self.head[0] if x.per_batch else 0
        h = self.head[1] if x.per_head else 0
        if x.kind == "number":
            value = ref[b, h, 0]
        elif x.kind == "window":
            place = (self.start(), firsts["row"], firsts["column"])
            first = distances.window(self.grid, x.reach, *place)
            index = (b, h, slice(None), pl.ds(first, shape[1]))
            value = self.machine.tile(ref, index)
        elif x.kind == "tile":
            names = ("column", "row") if self.grid.transposed else ("row", "column")
            spans = [pl.ds(firsts[n], m) for n, m in zip(names, shape, strict=True)]
            value = self.machine.tile(ref, (b, h, *spans))
        else:
            axis = int((x.kind == "column") != self.grid.transposed)
            span = pl.ds(firsts[x.kind], shape[axis])
            value = self.machine.vector(ref, (b, h, span), axis)
            value = self.machine.spread(value, shape, axis)
        return value != 0 if x.is_bool else value

    def thin(self, name: str, shape, axis: int, first):
        """An operand of rows as `thin.evaluate` takes it: (its shape, its values).

        Args:
            axis: along which rows run; `first` is the tile's first one.
        """
        x = next(x for x in self.held if x.name == name)
        if x.kind == "number":
            return (1, 1), self._read(x, None, None)
        ref = self.refs[self.held.index(x)]
        b = self.head[0] if x.per_batch else 0
        h = self.head[1] if x.per_head else 0
        span = pl.ds(first, shape[axis])
        one = (shape[0], 1) if axis == 0 else (1, shape[1])
        return one, self.machine.vector(ref, (b, h, span), axis)

    def _look_up(self, shape, q_first, k_first, mask: Mask):
        """Whether the block that holds the tile is seen: blocks are whole tiles."""
        names = {node: name for name, node in block_lists(self._mask).items()}
        name = names.get(mask, BLOCK_MASK)
        x = next(x for x in self.held if x.name == name)
        ref = self.refs[self.held.index(x)]
        b = self.head[0] if x.per_batch else 0
        h = self.head[1] if x.per_head else 0
        i = jax.lax.div(q_first, jnp.int32(mask.block_q))
        j = jax.lax.div(k_first, jnp.int32(mask.block_k))
        rows, columns = ref.shape[2:]
        marked = ref[b, h, jnp.minimum(i, rows - 1), jnp.minimum(j, columns - 1)]
        inside = (i < rows) & (j < columns)
        return jnp.broadcast_to((marked != 0) & inside, shape)

    @property
    def _mask(self) -> Mask:
        return self.grid.request.spec.mask

    def visible(self, tile: Tile, shape, q_first, k_first) -> jax.Array | None:
        """The whole mask of a tile: the spec's, of keys, and of padding."""
        request, swap = self.grid.request, self.grid.transposed
        look_up = functools.partial(self._look_up, shape, q_first, k_first)
        parts = [seen(request.spec.mask, tile, look_up)]
        if "kv_mask" in {x.name for x in self.held}:
            parts.append(tile.operands["kv_mask"])
        if self.grid.kv_len != request.kv_len and self.grid.form == "table":
            keys = self.machine.iota(shape, 0 if swap else 1) + k_first
            parts.append(keys < request.kv_len)
        if self.grid.hides_queries:
            queries = self.machine.iota(shape, 1 if swap else 0) + q_first
            parts.append(queries < request.q_len)
        parts = [part for part in parts if part is not None]
        mask = None
        for part in parts:
            mask = part if mask is None else mask & part
        return None if mask is None else jnp.broadcast_to(mask, shape)

    def scores(self, numbers, raw: jax.Array, own_first, first_of, n, *, masked: bool):
        """Scaled products to scores, low where masked; and the mask, if any.

        Args:
            own_first: first row that the warpgroup owns.
            first_of: step -> first streamed row.
            n: the step.
        """
        spec = self.grid.request.spec
        if not masked and not spec.score:
            return raw, None
        tile, mask = self.place(numbers, raw.shape, own_first, first_of, n, masked)
        chain = tiles.score_chain(spec, tile)
        s = inline(lambda x: chain(x, {}), raw) if spec.score else raw
        return self.hide(s, mask), mask

    def place(self, numbers, shape, own_first, first_of, n, masked: bool):
        """The tile of step n, and its mask or None."""
        firsts = (own_first, first_of(n))
        firsts = firsts[::-1] if self.grid.transposed else firsts
        tile = self.tile(numbers, shape, *firsts)
        return tile, self.visible(tile, shape, *firsts) if masked else None

    def hide(self, s: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Scores, low where masked."""
        return s if mask is None else jnp.where(mask, s, LOW)

    def score_pull(self, raw: jax.Array, tile: Tile | None):
        """Scores, and the function from their cotangent to that of `raw` and, by name,
        of the trained operands, spread over the tile.

        Scores are elementwise, so each derivative is a tangent of ones: forward mode
        stays within the operations that the functions use themselves.
        """
        spec = self.grid.request.spec
        if not spec.score:
            return raw, lambda ds: (ds, {})
        chain = tiles.score_chain(spec, tile)
        trained = {
            x.name: jnp.broadcast_to(tile.operands[x.name], raw.shape)
            for x in spec.score_operands
        }
        ones = jnp.ones_like(raw)

        def slope(name, x):
            def of_one(x):
                if name is None:
                    return chain(x, trained)
                return chain(raw, {**trained, name: x})

            return inline(lambda x, one: jax.jvp(of_one, (x,), (one,)), x, ones)

        s, d_s = slope(None, raw)

        def pull(ds):
            found = {name: ds * slope(name, x)[1] for name, x in trained.items()}
            return ds * d_s, found

        return s, pull
