"""Which tiles a block of rows visits: full ones first, then those that need the mask.

Plain causal and full attention know it in closed form; everything else reads a table
made before the kernel, one for each row of the batch and each head where the mask's
arrays differ.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels import tiles
from attnjax.kernels.block_masks import BlockMask
from attnjax.kernels.masks import And, Causal, Coverage, Full, Mask, Or, Span
from attnjax.kernels.mosaic_gpu.by_blocks import nodes
from attnjax.kernels.mosaic_gpu.tiles import BLOCK
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]


def padded_length(length: int) -> int:
    """Tokens as the kernels see them: whole blocks, so whole tiles of any step."""
    return -(-length // BLOCK) * BLOCK


@dataclasses.dataclass(frozen=True)
class Grid:
    """How queries and keys are cut for one kernel.

    Attributes:
        request: the call.
        block_q, block_k: rows of a tile of queries and of keys.
        transposed: blocks of keys own the work and step over queries.
    """

    request: Request
    block_q: int
    block_k: int
    transposed: bool = False

    @property
    def q_len(self) -> int:
        """Queries with padding."""
        return padded_length(self.request.q_len)

    @property
    def kv_len(self) -> int:
        """Keys with padding."""
        return padded_length(self.request.kv_len)

    @property
    def num_q(self) -> int:
        """Tiles of queries; the last ones may be padding."""
        return self.q_len // self.block_q

    @property
    def num_k(self) -> int:
        """Tiles of keys; the last ones may be padding."""
        return self.kv_len // self.block_k

    @property
    def owners(self) -> int:
        """Blocks that own the work."""
        return self.num_k if self.transposed else self.num_q

    @property
    def streamed(self) -> int:
        """Tiles of the other side."""
        return self.num_q if self.transposed else self.num_k

    @property
    def hides_queries(self) -> bool:
        """Whether padded queries are masked: only where scores may be infinite."""
        finite = all(step.finite for step in self.request.spec.score)
        return self.q_len != self.request.q_len and not finite

    @property
    def form(self) -> str:
        """How the steps are known: "full", "causal" or "table"."""
        request = self.request
        if "kv_mask" in request.operand_names or self.hides_queries:
            return "table"
        if isinstance(request.spec.mask, Full) and self.kv_len == request.kv_len:
            return "full"
        square = request.static_positions and request.q_len == request.kv_len
        return "causal" if isinstance(request.spec.mask, Causal) and square else "table"


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a kernel asks: how many tiles, and which one comes n-th.

    Attributes:
        grid: the cut.
        per_batch, per_head: whether the table differs between rows of the batch and
            between query heads.
    """

    grid: Grid
    per_batch: bool = False
    per_head: bool = False

    def bounds(self, refs, b, h, i):
        """(tiles that need no mask, all tiles) of owner i: int32 scalars."""
        grid = self.grid
        if grid.form == "full":
            return jnp.int32(grid.streamed), jnp.int32(grid.streamed)
        if grid.form == "causal":
            return _causal_bounds(grid, i)
        counts = refs[1]
        b, h = self._row(b, h)
        return counts[b, h, i, 0], counts[b, h, i, 1]

    def block(self, refs, b, h, i, n):
        """Index of owner i's n-th tile."""
        if self.grid.form == "full":
            return n
        if self.grid.form == "causal":
            return jnp.int32(self.grid.num_q - 1) - n if self.grid.transposed else n
        return refs[0][(*self._row(b, h), i, n)]

    def _row(self, b, h):
        return b if self.per_batch else 0, h if self.per_head else 0


def _causal_bounds(grid: Grid, i):
    if not grid.transposed:
        size, step = grid.block_q, grid.block_k
        seen = jax.lax.div((i + 1) * size + (step - 1), jnp.int32(step))
        full = jax.lax.div(i * size + 1, jnp.int32(step))
        seen = jnp.minimum(seen, grid.num_k)
        return jnp.minimum(full, seen), seen
    size, step = grid.block_k, grid.block_q
    first = jax.lax.div(i * size, jnp.int32(step))
    full = jax.lax.div((i + 1) * size - 1 + (step - 1), jnp.int32(step))
    last = jnp.int32(grid.num_q)
    return jnp.maximum(last - full, 0), jnp.maximum(last - first, 0)


def make_steps(grid: Grid, operands: Arrays) -> tuple[Steps, tuple]:
    """The steps and the arrays that the kernel takes for them.

    Args:
        operands: padded to whole tiles; positions, not offsets.
    """
    if grid.form != "table":
        return Steps(grid), ()
    cover = coverage(grid, operands)
    if grid.transposed:
        cover = cover.swapaxes(2, 3)
    xp = np if isinstance(cover, np.ndarray) else jnp
    order = xp.argsort(-cover, axis=3, stable=True).astype(np.int32)
    counts = xp.stack([(cover == 2).sum(3), (cover > 0).sum(3)], 3).astype(np.int32)
    found = Steps(grid, *(n > 1 for n in cover.shape[:2]))
    return found, (jnp.asarray(order), jnp.asarray(counts))


def coverage(grid: Grid, operands: Arrays):
    """int8 [1 or B, 1 or H, num_q, num_k]: `Coverage` of every tile; numpy if it is
    known."""
    request = grid.request
    mask = request.spec.mask
    known = request.static_positions or not mask.positional
    static = _static_coverage(grid, known)[:, None]
    if known and mask.complete and "kv_mask" not in operands:
        return static
    if not any(isinstance(node, BlockMask) for node in nodes(mask)):
        return jnp.minimum(_device_coverage(grid, operands), static)
    cover = _by_parts(grid, mask, operands)
    if "kv_mask" in operands:
        plain = _with_mask(grid, Full())
        cover = jnp.minimum(cover, _device_coverage(plain, operands))
    return jnp.minimum(cover, static)


def _with_mask(grid: Grid, mask: Mask) -> Grid:
    spec = dataclasses.replace(grid.request.spec, mask=mask)
    return dataclasses.replace(
        grid, request=dataclasses.replace(grid.request, spec=spec)
    )


def _by_parts(grid: Grid, mask: Mask, operands: Arrays):
    """Coverage of a mask with blocks of an array in it, without a look at its places:
    of tiles that both sides of `&` leave partial it is an upper bound."""
    if isinstance(mask, And | Or):
        sides = (_by_parts(grid, x, operands) for x in (mask.first, mask.second))
        return (jnp.minimum if isinstance(mask, And) else jnp.maximum)(*sides)
    if isinstance(mask, BlockMask):
        return _block_coverage(grid, mask, operands[mask.operands[0].name])
    alone = _with_mask(grid, mask)
    if mask.complete and (grid.request.static_positions or not mask.positional):
        return _static_coverage(alone, True)[:, None]
    read = {name: x for name, x in operands.items() if name != "kv_mask"}
    return _device_coverage(alone, read)


def _block_coverage(grid: Grid, mask: BlockMask, table: jax.Array) -> jax.Array:
    """From the marks [b, h, NQ, NK] of the blocks that a tile touches."""
    seen = full = jnp.pad(table, ((0, 0), (0, 0), (0, 1), (0, 1)))
    sides = (
        (2, grid.num_q, grid.block_q, grid.request.q_len, mask.block_q),
        (3, grid.num_k, grid.block_k, grid.request.kv_len, mask.block_k),
    )
    for axis, count, tile, length, block in sides:
        first = np.arange(count) * tile
        last = np.maximum(np.minimum(first + tile, length) - 1, first) // block
        most = (tile - 1) // block + 2
        touched = np.minimum(first[:, None] // block + np.arange(most), last[:, None])
        touched = np.minimum(touched, table.shape[axis])
        seen = jnp.take(seen, touched, axis=axis).any(axis + 1)
        full = jnp.take(full, touched, axis=axis).all(axis + 1)
    return seen.astype(jnp.int8) + full.astype(jnp.int8)


@functools.lru_cache(maxsize=64)
def _static_coverage(grid: Grid, known: bool) -> np.ndarray:
    """What lengths, and positions where they are known, say alone."""
    mask, request = grid.request.spec.mask, grid.request
    cover = np.full((1, grid.num_q, grid.num_k), Coverage.FULL, np.int8)
    for i in range(grid.num_q):
        for j in range(grid.num_k):
            span = _span(grid, i, j)
            if span.q_first > span.q_last or span.k_first > span.k_last:
                cover[0, i, j] = Coverage.EMPTY
            elif known and mask.complete:
                cover[0, i, j] = mask.coverage(span)
    if request.kv_len % grid.block_k:
        last = request.kv_len // grid.block_k
        cover[:, :, last] = np.minimum(cover[:, :, last], Coverage.PARTIAL)
    if grid.hides_queries and request.q_len % grid.block_q:
        last = request.q_len // grid.block_q
        cover[:, last] = np.minimum(cover[:, last], Coverage.PARTIAL)
    return cover


def _span(grid: Grid, i: int, j: int) -> Span:
    return Span(
        q_first=i * grid.block_q,
        q_last=min((i + 1) * grid.block_q, grid.request.q_len) - 1,
        k_first=j * grid.block_k,
        k_last=min((j + 1) * grid.block_k, grid.request.kv_len) - 1,
    )


def _device_coverage(grid: Grid, operands: Arrays) -> jax.Array:
    """Evaluate the mask, one row of tiles at a time."""
    request = grid.request
    known = tiles.declarations(request.spec)
    operands = {name: x for name, x in operands.items() if name in known}

    def row(i):
        place = (i * grid.block_q, grid.block_q, 0, grid.kv_len)
        tile = tiles.make_tile(request, operands, place)
        mask = tiles.visible(request.spec, tile)
        mask = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
        shape = (*mask.shape[:2], grid.block_q, grid.kv_len)
        mask = jnp.broadcast_to(mask, shape)
        # Padding neither shows a tile nor keeps it from being full: tiles that hold
        # any are partial by their lengths.
        inside = (
            (i * grid.block_q + jnp.arange(grid.block_q) < request.q_len)[:, None]
        ) & (jnp.arange(grid.kv_len) < request.kv_len)
        cut = (-1, shape[1], grid.block_q, grid.num_k, grid.block_k)
        seen = (mask & inside).reshape(cut).any((2, 4))
        full = (mask | ~inside).reshape(cut).all((2, 4))
        return seen.astype(jnp.int8) + (seen & full).astype(jnp.int8)

    rows = jax.lax.map(row, jnp.arange(grid.num_q, dtype=jnp.int32))
    return jnp.moveaxis(rows, 0, 2)
