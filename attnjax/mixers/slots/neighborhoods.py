"""Neighbourhoods beside those of a whole grid: behind extra tokens, along a sequence
of any length, and their learned biases."""

import dataclasses

import jax
import jax.numpy as jnp

from attnjax import kernels
from attnjax.kernels import Coverage, Mask, Operand, ScoreStep, Span, Tile

BIAS = "neighborhood_bias"


@dataclasses.dataclass(frozen=True)
class BehindExtra(Mask):
    """A mask over the tokens of a grid that stand behind others: every token sees the
    extra ones, and they see every token.

    Attributes:
        inner: the grid's mask; the grid's first token is its position 0.
        extra: tokens before the grid, >= 1.
    """

    inner: Mask
    extra: int
    positional = True
    complete = True

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        """The grid holds the other tokens."""
        self.inner.check_lengths(q_len - self.extra, kv_len - self.extra)

    def visible(self, tile: Tile) -> jax.Array:
        """Extra query, extra key, or neighbours."""
        extra = jnp.int32(self.extra)
        places = dataclasses.replace(tile, q=tile.q - extra, k=tile.k - extra)
        return (tile.q < extra) | (tile.k < extra) | self.inner.visible(places)

    def coverage(self, span: Span) -> Coverage:
        """That of the grid where no extra token is in the tile."""
        if span.q_last < self.extra or span.k_last < self.extra:
            return Coverage.FULL
        if span.q_first < self.extra or span.k_first < self.extra:
            return Coverage.PARTIAL
        ends = (getattr(span, f.name) - self.extra for f in dataclasses.fields(span))
        return self.inner.coverage(Span(*ends))


@dataclasses.dataclass(frozen=True)
class CausalNeighborhood(Mask):
    """The causal neighbourhood of one axis that has no end: a query sees what it would
    see however many tokens follow.

    Of every d-th place, queries in groups of `stride` see the `window` places up to
    the last of their group, as far as these are not behind the query itself.

    Attributes:
        window, stride, dilation: 1 <= stride <= window, dilation >= 1.
    """

    window: int
    stride: int = 1
    dilation: int = 1
    positional = True
    complete = True

    def visible(self, tile: Tile) -> jax.Array:
        """start <= k <= q, in one residue class."""
        step = jnp.int32(self.dilation)
        same = jax.lax.rem(tile.q, step) == jax.lax.rem(tile.k, step)
        i, j = jax.lax.div(tile.q, step), jax.lax.div(tile.k, step)
        group = jax.lax.div(i, jnp.int32(self.stride))
        return same & (j <= i) & (j >= self._start(group))

    def _start(self, group):
        return (group + 1) * self.stride - self.window

    def coverage(self, span: Span) -> Coverage:
        """EMPTY outside the band of all windows, FULL inside every one."""
        d = self.dilation
        if span.k_first > span.q_last:
            return Coverage.EMPTY
        if span.k_last // d < self._start(span.q_first // d // self.stride):
            return Coverage.EMPTY
        inside = d == 1 and span.k_last <= span.q_first
        inside = inside and span.k_first >= self._start(span.q_last // self.stride)
        return Coverage.FULL if inside else Coverage.PARTIAL


@dataclasses.dataclass(frozen=True)
class NeighborhoodBias(ScoreStep):
    """s + table[h, offset], offset = (k - q) / dilation + window - 1 on each axis.

    Operand, with gradient: float [H, prod(2 window - 1)], the axes of the offsets in
    row-major order. Extra tokens have no bias.

    Attributes:
        grid: lengths of the axes; the first may be anything.
        window, dilation: one value for each axis.
        extra: tokens before the grid.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    extra: int = 0
    operands = (Operand(BIAS, "*", "float", trains=True, shape="hr"),)

    def apply(self, s: jax.Array, tile: Tile) -> jax.Array:
        """s + table[h, offset]."""
        table = tile.operands[BIAS].astype(s.dtype)
        q, k = tile.q - jnp.int32(self.extra), tile.k - jnp.int32(self.extra)
        on_grid = (q >= 0) & (k >= 0)
        place, size = jnp.int32(0), 1
        axes = list(zip(self.grid, self.window, self.dilation, strict=True))
        for axis, (length, window, dilation) in reversed(list(enumerate(axes))):
            q_at, k_at = q, k
            if axis:
                q_at, k_at = (jax.lax.rem(a, jnp.int32(length)) for a in (q, k))
                q, k = (jax.lax.div(a, jnp.int32(length)) for a in (q, k))
            steps = jax.lax.div(k_at - q_at, jnp.int32(dilation)) + window - 1
            # Beyond the window no key is visible; the table is not read outside.
            place = place + size * jnp.clip(steps, 0, 2 * window - 2)
            size = size * (2 * window - 1)
        bias = jnp.swapaxes(jnp.take(table, place[:, 0], axis=1), 0, 1)
        return s + jnp.where(on_grid, bias, 0)


def mask_of(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    *,
    extra: int = 0,
) -> Mask:
    """The mask of a grid's tokens behind `extra` others."""
    inner = kernels.Neighborhood(grid, window, stride, dilation, causal)
    return BehindExtra(inner, extra) if extra else inner
