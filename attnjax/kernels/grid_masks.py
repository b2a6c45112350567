"""Masks of regular patterns: every n-th key, and neighbourhoods on a grid of tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnjax.kernels.masks import Coverage, Mask, Span, Tile


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """A query attends to keys at distances that `stride` divides, on both sides.

    A causal window of W keys, every d-th one, is `Dilated(d) & SlidingWindow((W - 1) *
    d)`.

    Attributes:
        stride: >= 1.
    """

    stride: int
    positional = True
    complete = True

    def __post_init__(self):
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(
                f"Dilated: stride must be an integer >= 1; got stride={self.stride!r}."
            )

    def visible(self, tile: Tile) -> jax.Array:
        """stride divides q - k."""
        return jax.lax.rem(tile.q - tile.k, jnp.int32(self.stride)) == 0

    def coverage(self, span: Span) -> Coverage:
        """EMPTY where no multiple of the stride lies between the distances."""
        nearest, farthest = span.q_first - span.k_last, span.q_last - span.k_first
        if farthest // self.stride * self.stride < nearest:
            return Coverage.EMPTY
        return Coverage.FULL if self.stride == 1 else Coverage.PARTIAL


@dataclasses.dataclass(frozen=True)
class Neighborhood(Mask):
    """A query attends to the window around it on a grid of tokens, in 1 to 3
    dimensions (arXiv 2403.04690 and 2504.16922).

    Tokens are the grid's places in row-major order. Per axis of length L a query sees
    `window` places: itself, window // 2 before it and the rest behind, the whole
    window moved inward at a border so that it is never cut. With `causal` it sees the
    window that ends at itself, cut at the border. `stride` lets that many queries in
    a row share the window of their leader; `dilation` d splits the axis into d
    interleaved ones that do not see each other.

    Attributes:
        grid: lengths of the axes; positions are 0 .. prod(grid) - 1.
        window, stride, dilation, causal: one value for all axes, or one for each.
    """

    grid: tuple[int, ...]
    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    positional = True
    complete = True

    def __post_init__(self):
        if not 1 <= len(self.grid) <= 3:
            raise ValueError(
                f"Neighborhood: grid must have 1 to 3 axes; got grid={self.grid}."
            )
        for name in ("window", "stride", "dilation", "causal"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                object.__setattr__(self, name, (value,) * len(self.grid))
            elif len(value) != len(self.grid):
                raise ValueError(
                    f"Neighborhood: {name} must have one value for each axis of "
                    f"grid={self.grid}; got {name}={value}."
                )
        for axis in self._axes():
            axis.check()

    def _axes(self) -> "list[_Axis]":
        settings = (self.grid, self.window, self.stride, self.dilation, self.causal)
        return [_Axis(*values) for values in zip(*settings, strict=True)]

    def check_lengths(self, q_len: int, kv_len: int) -> None:
        """The grid holds all tokens."""
        size = math.prod(self.grid)
        if not q_len == kv_len == size:
            raise ValueError(
                "Neighborhood: T and S must be the number of places of the grid, or "
                f"come with positions; got T={q_len}, S={kv_len}, grid={self.grid} "
                f"of {size} places."
            )

    def visible(self, tile: Tile) -> jax.Array:
        """Visible along every axis."""
        q, k, result = tile.q, tile.k, None
        for axis in reversed(self._axes()):
            length = jnp.int32(axis.length)
            seen = axis.visible(jax.lax.rem(q, length), jax.lax.rem(k, length))
            q, k = jax.lax.div(q, length), jax.lax.div(k, length)
            result = seen if result is None else result & seen
        return result

    def coverage(self, span: Span) -> Coverage:
        """From the smallest boxes of the grid that hold the queries and the keys."""
        queries = _box(self.grid, span.q_first, span.q_last)
        keys = _box(self.grid, span.k_first, span.k_last)
        sides = zip(self._axes(), queries, keys, strict=True)
        return min(axis.coverage(*q, *k) for axis, q, k in sides)


def _box(grid: tuple[int, ...], first: int, last: int) -> list[tuple[int, int]]:
    """Ranges of coordinates, both ends included, of the places first .. last."""
    ranges, size, whole = [], math.prod(grid), False
    for length in grid:
        size //= length
        low, high = first // size % length, last // size % length
        ranges.append((0, length - 1) if whole else (low, high))
        whole = whole or low != high
    return ranges


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The rule of one axis."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def check(self) -> None:
        legal = self.window >= 1 and 1 <= self.stride <= self.window
        legal = legal and self.dilation >= 1
        if not legal or self.window * self.dilation > self.length:
            raise ValueError(
                "Neighborhood: each axis needs 1 <= stride <= window, dilation >= 1 "
                f"and window * dilation <= length; got {self}."
            )

    def visible(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """Whether query i sees key j."""
        length, same = self.length, True
        if self.dilation > 1:
            step = jnp.int32(self.dilation)
            own = jax.lax.rem(i, step)
            same = own == jax.lax.rem(j, step)
            i, j = jax.lax.div(i, step), jax.lax.div(j, step)
            length = self.length // self.dilation
            length = length + (own < self.length % self.dilation).astype(jnp.int32)
        start, end = self._ends(i, length)
        return same & (j >= start) & (j < end)

    def _ends(self, i, length):
        """First key and one past the last; arrays, or Python integers."""
        leader = i
        if self.stride > 1:
            steps = i // self.stride if isinstance(i, int) else None
            if steps is None:
                steps = jax.lax.div(i, jnp.int32(self.stride))
            back = self.stride - 1 if self.causal else self.stride // 2
            leader = _lower(steps * self.stride + back, length - 1)
        if self.causal:
            return _upper(leader - self.window + 1, 0), i + 1
        start = _upper(leader - self.window // 2, 0)
        start = _lower(start, length - self.window)
        return start, start + self.window

    def coverage(self, i_first: int, i_last: int, j_first: int, j_last: int):
        """What queries i_first .. i_last see of keys j_first .. j_last. Both ends of
        a window move forward with the query."""
        if self.dilation > 1:
            far = (self.window - 1) * self.dilation
            near = j_first - i_last <= far and i_first - j_last <= far
            return Coverage.PARTIAL if near else Coverage.EMPTY
        first, last = self._ends(i_first, self.length), self._ends(i_last, self.length)
        if j_last < first[0] or j_first >= last[1]:
            return Coverage.EMPTY
        if j_first >= last[0] and j_last < first[1]:
            return Coverage.FULL
        return Coverage.PARTIAL


def _lower(a, b):
    return min(a, b) if isinstance(a, int) else jnp.minimum(a, b)


def _upper(a, b):
    return max(a, b) if isinstance(a, int) else jnp.maximum(a, b)
