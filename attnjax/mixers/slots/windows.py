"""Windows of a grid, folded into the batch: attention inside them is attention of many
short rows, which any kernel takes.

An axis of length n is n / w runs of w places. Tokens of one run share a window of
`blocks`; tokens with one place in their run, w of them, share one of `lattice`, where
the runs are n / w long.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims, MixerSpec
from attnjax.mixers.requests import check_request

Kind = Literal["blocks", "lattice"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How one layer cuts its grid, static.

    Attributes:
        grid: lengths of its axes.
        size: w, tokens of a window along each axis.
        kind: "blocks", neighbours; "lattice", w tokens at equal distances over the
            whole axis.
        halo: h, further places on both sides of a block that its queries see.
        masked: whether places off the grid, in halos and in blocks that reach over
            its end, are left out. If not they are keys and values of zeros.
    """

    grid: tuple[int, ...]
    size: tuple[int, ...]
    kind: Kind = "blocks"
    halo: tuple[int, ...] | None = None
    masked: bool = True

    @property
    def runs(self) -> tuple[int, ...]:
        """Windows along each axis."""
        return tuple(-(-n // w) for n, w in zip(self.grid, self.size, strict=True))

    @property
    def whole(self) -> tuple[int, ...]:
        """The grid, filled up to whole windows behind the end of each axis."""
        return tuple(r * w for r, w in zip(self.runs, self.size, strict=True))

    @property
    def seen(self) -> tuple[int, ...]:
        """m, places that a query sees along each axis."""
        halo = self.halo or (0,) * len(self.grid)
        return tuple(w + 2 * h for w, h in zip(self.size, halo, strict=True))

    @property
    def count(self) -> int:
        """N, windows of a grid."""
        return math.prod(self.runs)

    # ---- tokens [B, prod(grid), ...] in row-major order

    def fill(self, x: jax.Array) -> jax.Array:
        """[B, prod(grid), ...] -> [B, prod(whole), ...], zeros behind each axis."""
        if self.whole == self.grid:
            return x
        rest = x.shape[2:]
        more = [(0, m - n) for n, m in zip(self.grid, self.whole, strict=True)]
        x = x.reshape(len(x), *self.grid, *rest)
        x = jnp.pad(x, [(0, 0), *more, *[(0, 0)] * len(rest)])
        return x.reshape(len(x), -1, *rest)

    def crop(self, x: jax.Array) -> jax.Array:
        """[B, prod(whole), ...] -> [B, prod(grid), ...]: undoes `fill`."""
        rest = x.shape[2:]
        x = x.reshape(len(x), *self.whole, *rest)
        x = x[(slice(None), *(slice(n) for n in self.grid))]
        return x.reshape(len(x), math.prod(self.grid), *rest)

    def fold(self, x: jax.Array) -> jax.Array:
        """[B, prod(grid), ...] -> [B, N, prod(w), ...], zeros behind the grid."""
        rest = x.shape[2:]
        x = self.fill(x).reshape(len(x), *self._pieces(), *rest)
        return self._moved(x, self._order()).reshape(
            len(x), self.count, math.prod(self.size), *rest
        )

    def unfold(self, x: jax.Array) -> jax.Array:
        """[B, N, prod(w), ...] -> [B, prod(grid), ...]: undoes `fold`."""
        rest = x.shape[3:]
        x = x.reshape(len(x), *self.runs, *self.size, *rest)
        x = self._moved(x, np.argsort(self._order()))
        return self.crop(x.reshape(len(x), -1, *rest))

    def fold_seen(self, x: jax.Array) -> jax.Array:
        """[B, prod(grid), ...] -> [B, N, prod(m), ...], what each window sees."""
        if self.halo is None:
            return self.fold(x)
        rest, rank = x.shape[2:], len(self.grid)
        x = x.reshape(len(x), *self.grid, *rest)
        for axis in range(rank):
            # Axes before this one are two by now.
            x = _haloed(x, 1 + 2 * axis, self.size[axis], self.halo[axis])
        order = (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
        x = self._moved(x, order)
        return x.reshape(len(x), self.count, math.prod(self.seen), *rest)

    def visible(self) -> np.ndarray | None:
        """Which places that a window sees are on the grid, bool [N, prod(m)]; None for
        all, or where those off the grid are seen too."""
        if not self.masked:
            return None
        rank = len(self.grid)
        found = np.ones((1,) * 2 * rank, bool)
        for axis, n in enumerate(self.grid):
            starts = np.arange(self.runs[axis]) * self.size[axis]
            before = (self.seen[axis] - self.size[axis]) // 2
            if self.kind == "lattice":  # Lattices are whole.
                return None
            place = starts[:, None] - before + np.arange(self.seen[axis])
            shape = [1] * 2 * rank
            shape[axis], shape[rank + axis] = place.shape
            found = found & ((place >= 0) & (place < n)).reshape(shape)
        return None if found.all() else found.reshape(self.count, -1)

    def _pieces(self) -> list[int]:
        """Each axis as two, in the order in which its places lie."""
        pairs = zip(self.runs, self.size, strict=True)
        blocks = self.kind == "blocks"
        return [n for r, w in pairs for n in ((r, w) if blocks else (w, r))]

    def _order(self) -> tuple[int, ...]:
        """The runs' axes of `_pieces`, then the windows'."""
        first, second = range(0, 2 * len(self.grid), 2), range(1, 2 * len(self.grid), 2)
        return (*first, *second) if self.kind == "blocks" else (*second, *first)

    def _moved(self, x: jax.Array, order) -> jax.Array:
        rest = range(1 + 2 * len(self.grid), x.ndim)
        return x.transpose(0, *(1 + int(axis) for axis in order), *rest)

    # ---- as definitions

    def token_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """The window and the place in it of each token, int [prod(grid)] both."""
        shape = (self.count, math.prod(self.size))
        own, place = np.indices(shape)
        both = np.stack([own, place], -1)[None]
        found = self.unfold(both)[0]
        return found[:, 0], found[:, 1]

    def sees(self) -> np.ndarray:
        """Which token sees which, bool [prod(grid), prod(grid)]."""
        if self.kind == "lattice":
            own, _ = self.token_windows()
            return own[:, None] == own
        halo = self.halo or (0,) * len(self.grid)
        each = []
        for n, w, h in zip(self.grid, self.size, halo, strict=True):
            start = np.arange(n)[:, None] // w * w
            key = np.arange(n)
            each.append((key >= start - h) & (key < start + w + h))
        return functools.reduce(np.kron, each)


@functools.lru_cache(maxsize=64)
def offsets(size: tuple[int, ...]) -> np.ndarray:
    """The row of a table of biases for each query and key of a window, int [L, L]:
    key - query + w - 1 along each axis, the axes in row-major order."""
    places = np.stack(np.unravel_index(np.arange(math.prod(size)), size), -1)
    steps = places[None] - places[:, None] + np.array(size) - 1
    lengths = tuple(2 * w - 1 for w in size)
    return np.ravel_multi_index(np.moveaxis(steps, -1, 0), lengths)


def _haloed(x: jax.Array, axis: int, block: int, halo: int) -> jax.Array:
    """Axis of length n -> axes [n / block, block + 2 halo]: each block with what lies
    on its sides, zeros outside."""
    runs, sides = x.shape[axis] // block, -(-halo // block)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (sides * block,) * 2
    x = jnp.pad(x, pad)
    x = x.reshape(*x.shape[:axis], runs + 2 * sides, block, *x.shape[axis + 1 :])
    parts = [
        jax.lax.slice_in_dim(x, shift, shift + runs, axis=axis)
        for shift in range(2 * sides + 1)
    ]
    x = jnp.concatenate(parts, axis + 1)
    left = sides * block - halo
    return jax.lax.slice_in_dim(x, left, left + block + 2 * halo, axis=axis + 1)


# ---- settings


def per_axis(value, rank: int, *, owner: str, name: str) -> tuple[int, ...]:
    """One number for all axes, or one for each, as one for each.

    Raises:
        UserError: where there are not as many as axes.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * rank
    if len(values) != rank:
        raise UserError(
            f"{owner}: {name} must have one value for each axis of the grid; got "
            f"{name}={value} for {rank} axes. Give one number for all, or as many as "
            "there are axes."
        )
    return values


def fitting(length: int | None, most: int = 8) -> int:
    """The largest divisor of an axis that is less than its length and at most `most`;
    where only 1 is, the whole axis. `most` for an axis of unknown length."""
    if length is None:
        return most
    divisors = (d for d in range(2, min(most, length - 1) + 1) if length % d == 0)
    return max(divisors, default=length)


def size_along(value, axes, *, owner: str, name: str) -> tuple[int, ...]:
    """A setting as one number for each axis, `fitting` where it is none.

    Args:
        value: one number for all, one for each, or None.
        axes: their lengths, None where unknown.
    """
    if value is None:
        return tuple(fitting(length) for length in axes)
    return per_axis(value, len(axes), owner=owner, name=name)


def axes_of(*values, grid: tuple[int, ...] | None) -> tuple[int | None, ...]:
    """Lengths of the axes of the grid, each None where there is none."""
    return grid or (None,) * rank_of(*values, grid=grid)


def rank_of(*values, grid: tuple[int, ...] | None) -> int:
    """Axes of the grid, or those that the settings are made for (2 where any)."""
    if grid is not None:
        return len(grid)
    return max((len(v) for v in values if isinstance(v, tuple)), default=2)


def check_numbers(name: str, value, least: int) -> None:
    """Raise ValueError unless `value` is one number from `least` on, or 1 to 3."""
    values = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(values) <= 3 or any(one < least for one in values):
        raise ValueError(
            f"{name} must be at least {least}, one number or one for each of 1 to 3 "
            f"axes; got {name}={value}."
        )


def check_divides(size, grid: tuple[int, ...], *, owner: str, name: str) -> None:
    """Raise UserError, with the sizes that would do, unless `size` divides the grid."""
    for axis, (w, n) in enumerate(zip(size, grid, strict=True)):
        if n % w:
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            near = sorted(sorted(divisors, key=lambda d: abs(d - w))[:3])
            lengths = sorted({max(n // w, 1) * w, -(-n // w) * w})
            raise UserError(
                f"{owner}: {name} must divide each axis of the grid; got {name}={w} "
                f"on axis {axis} of grid={tuple(grid)}. Use one of "
                f"{', '.join(map(str, near))}, or an axis of "
                f"{' or '.join(map(str, lengths))} tokens."
            )


def need_grid(dims: MixerDims, *, owner: str) -> tuple[int, ...]:
    """The grid that a layer is made for.

    Raises:
        UserError: where the model's tokens are a plain sequence.
    """
    if dims.grid is None:
        raise UserError(
            f"{owner}: needs the grid of the model's tokens; got a plain sequence. "
            "Use a model of images, or another mixer."
        )
    return tuple(dims.grid)


def check_request_on_grid(
    spec: MixerSpec, dims: MixerDims, x: jax.Array, ctx: Context, *, hooks=()
) -> None:
    """`check_request`, and that the tokens are those that the layer is made for."""
    check_request(spec, ctx, hooks=hooks)
    if ctx.grid != dims.grid:
        raise UserError(
            f"{spec.name}: the layer is made for one grid; got grid={ctx.grid}, made "
            f"for {dims.grid}. Build the model for it."
        )
    if ctx.grid is not None and x.shape[1] != ctx.extra_tokens + math.prod(ctx.grid):
        raise UserError(
            f"{spec.name}: tokens must be those of the grid, behind the extra ones; "
            f"got T={x.shape[1]}, grid={ctx.grid}, extra_tokens={ctx.extra_tokens}."
        )
