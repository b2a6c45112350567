"""Anchors: where a grid begins, told by what is on it, so that shifts do not matter.

The places a, a + p, a + 2p, ... along each axis of a grid are a polyphase component of
it, a in [0, p). A circular shift moves components about and turns each in itself; the
one of the largest norm stays the one of the largest norm. Turned so that this one
begins at place 0, the grid and the shifted grid differ by a multiple of p:

    anchored(roll(x, s)) = roll(anchored(x), k p)   for some whole k.

Source: Ding et al., "Reviving Shift Equivariance in Vision Transformers", arXiv
2306.07470 (adaptive polyphase anchoring); the authors' released code.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.errors import UserError

# The base of a polynomial hash modulo 2^32: odd, its bits all over the word.
_BASE = 0x9E3779B1
# Another such word, to weigh and to mix by.
_FACTOR = 0x5BD1E995


def anchored(
    x: jax.Array, stride: tuple[int, ...], *, invariant: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The grid turned to its anchor, and the anchor: see `anchor_of`.

    Args:
        x: [B, *grid, C].
        stride: p of each axis; it divides the axis.
        invariant: whether all of a shift is undone, not all but multiples of p.

    Returns:
        [B, *grid, C] in the dtype of x, and int32 [B, axes]. The gradient of x is the
        cotangent turned back; which component is chosen has none.
    """
    start = anchor_of(x, stride, invariant=invariant)
    return turned(x, start), start


def anchor_of(
    x: jax.Array, stride: tuple[int, ...], *, invariant: bool = False
) -> jax.Array:
    """The place that a grid begins at, int32 [B, axes]: below p along each axis, or
    with `invariant` anywhere.

    It is the first place of the component with the largest L2 norm over places and
    channels; with `invariant`, the place of that component whose channels have the
    largest norm. Norms are of float32 or wider, and summed as whole numbers, so that
    the same values in another order have the same sum. Where norms are equal, what
    lies around decides, by a hash of it; the first place counts where that is the same
    seen from several, as on a constant image.

    Args:
        x, stride, invariant: as of `anchored`.

    Raises:
        UserError: where the stride does not divide the grid.
    """
    _check(x, stride)
    energy, content = _whole_numbers(jax.lax.stop_gradient(x), stride)
    start = _first_of_largest(
        _by_component(energy, stride), _by_component(content, stride)
    )
    if not invariant:
        return start
    # Of the places of the chosen component alone, seen with all that lies around.
    both = turned(jnp.stack([energy, content], axis=-1), start)
    kept = tuple(slice(None, None, p) for p in stride)
    place = _first_of_largest(both[..., 0], both[..., 1], kept=kept)
    sides = jnp.asarray(energy.shape[1:], jnp.int32)
    return (start + place * jnp.asarray(stride, jnp.int32)) % sides


def turned(x: jax.Array, start: jax.Array) -> jax.Array:
    """y[b, i, ...] = x[b, (i + start[b]) mod n, ...] along each axis of the grid.

    Args:
        x: [B, *grid, C].
        start: int [B, axes]; its negative turns back.
    """
    batch, grid, width = x.shape[0], x.shape[1:-1], x.shape[-1]
    flat = x.reshape(batch, math.prod(grid), width)
    return _taken(flat, _order(start, grid), _order(-start, grid)).reshape(x.shape)


@jax.custom_vjp
def _taken(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """x [B, T, C] with its places in the order [B, T], which `back` undoes."""
    del back
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _taken_forward(x, order, back):
    return _taken(x, order, back), (order, back)


def _taken_backward(orders, cotangent):
    # Taken as well: the transpose of a gather, a scatter, is slow.
    order, back = orders
    return _taken(cotangent, back, order), None, None


_taken.defvjp(_taken_forward, _taken_backward)


def _order(start: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """The place, in row-major order, that each place of a turned grid is taken from,
    int32 [B, prod(grid)]."""
    order = jnp.zeros((len(start), 1), jnp.int32)
    for axis, length in enumerate(grid):
        places = jnp.arange(length, dtype=jnp.int32)
        places = (places + start[:, axis, None].astype(jnp.int32)) % length
        order = (order[:, :, None] * length + places[:, None]).reshape(len(start), -1)
    return order


def _whole_numbers(
    x: jax.Array, stride: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """What anchors are told by, of each place, both int32 [B, *grid]: the squared norm
    of its channels as a share of the largest, whose sum over a component is at most
    2^30; and a number that the sum of its channels changes too."""
    steps = 2**30 * math.prod(stride) // math.prod(x.shape[1:-1])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    energy = _shares(jnp.sum(x * x, axis=-1), steps)
    total = _shares(jnp.sum(x, axis=-1), steps)
    return energy, energy + total * jnp.int32(_FACTOR)


def _shares(values: jax.Array, steps: int) -> jax.Array:
    """[B, *grid] as shares of the largest absolute value, in so many steps, int32."""
    size = jnp.abs(values)
    largest = jnp.max(size, axis=tuple(range(1, size.ndim)), keepdims=True)
    share = values / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return jnp.round(share * jnp.asarray(steps, share.dtype)).astype(jnp.int32)


def _by_component(energy: jax.Array, stride: tuple[int, ...]) -> jax.Array:
    """[B, *grid] summed over the places of each component: [B, *stride]."""
    pairs = zip(energy.shape[1:], stride, strict=True)
    pieces = [side for n, p in pairs for side in (n // p, p)]
    split = energy.reshape(len(energy), *pieces)
    return jnp.sum(split, axis=tuple(range(1, split.ndim, 2)), dtype=jnp.int32)


def _first_of_largest(
    score: jax.Array, content: jax.Array, *, kept: tuple[slice, ...] = ()
) -> jax.Array:
    """Where int32 [B, *grid] is largest, int32 [B, axes]: of the places `kept`, and
    counted in these. Of equal ones the content around decides, then the order."""
    index = (slice(None), *kept)
    score, around = score[index], _seen_from(content)[index].reshape(len(score), -1)
    flat = score.reshape(len(score), -1)
    is_largest = flat == jnp.max(flat, axis=1, keepdims=True)
    least = jnp.iinfo(jnp.int32).min
    best = jnp.argmax(jnp.where(is_largest, around, least), axis=1)
    places = jnp.unravel_index(best, score.shape[1:])
    return jnp.stack(places, axis=-1).astype(jnp.int32)


def _seen_from(score: jax.Array) -> jax.Array:
    """A number for each place of int32 [B, *grid] that all numbers make, in the order
    in which they lie behind it around the torus; int32 with overflow."""
    # Products alone would never bring what only high bits tell down to the low ones.
    score = (score ^ (score >> 15)) * jnp.int32(_FACTOR)
    score = score ^ (score >> 13)
    for axis in range(1, score.ndim):
        length = score.shape[axis]
        steps = (np.arange(length) - np.arange(length)[:, None]) % length
        # The next axis has a base of its own.
        powers = _powers(_BASE + 2 * axis, length)[steps]
        rows = jnp.moveaxis(score, axis, -1)[..., None, :]
        rows = jnp.sum(rows * jnp.asarray(powers), axis=-1, dtype=jnp.int32)
        score = jnp.moveaxis(rows, -1, axis)
    return score


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^32, as int32."""
    found = [pow(base, i, 2**32) for i in range(count)]
    return np.asarray(found, np.uint32).astype(np.int32)


def _check(x: jax.Array, stride: tuple[int, ...]) -> None:
    grid = x.shape[1:-1]
    if len(stride) != len(grid) or any(
        p < 1 or n % p for n, p in zip(grid, stride, strict=False)
    ):
        raise UserError(
            "anchor: the stride must divide each axis of the grid; got stride="
            f"{tuple(stride)}, grid={tuple(grid)}. Use divisors of its axes."
        )
