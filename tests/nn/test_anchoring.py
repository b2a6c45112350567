"""Anchors of grids (arXiv 2306.07470): what a circular shift changes, and what not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import nn
from attnjax.core.errors import UserError

GRID, STRIDE = (6, 4), (3, 2)


def image_of(grid, seed=0, width=3, dtype=np.float32):
    """[1, *grid, C]: no component is like another."""
    return np.random.default_rng(seed).normal(size=(1, *grid, width)).astype(dtype)


def shifted(x, grid):
    """x in every circular shift, [prod(grid), *grid, C], in row-major order."""
    axes = tuple(range(1, 1 + len(grid)))
    return np.concatenate([np.roll(x, s, axes) for s in np.ndindex(*grid)])


def both(x, stride, **options):
    """The turned grids and the starts."""
    found = jax.jit(lambda x: nn.anchored(x, stride, **options))(x)
    return tuple(np.asarray(a) for a in found)


def by_hand(x, stride):
    """The first place of the component with the largest norm, of x [*grid, C]."""

    def norm(at):
        pairs = zip(at, stride, strict=True)
        return np.linalg.norm(x[tuple(slice(a, None, p) for a, p in pairs)])

    return max(np.ndindex(*stride), key=norm)


@pytest.mark.parametrize(
    ("grid", "stride"), [((6,), (3,)), (GRID, STRIDE), ((2, 3, 4), (2, 1, 2))]
)
def test_shifted_grids_differ_by_whole_strides_once_anchored(grid, stride):
    x = image_of(grid)
    y, start = both(shifted(x, grid), stride)
    np.testing.assert_array_equal(start[0], by_hand(x[0], stride))
    axes = tuple(range(len(grid)))
    for row, shift in enumerate(np.ndindex(*grid)):
        steps = start[0] + shift - start[row]
        assert not (steps % stride).any()
        np.testing.assert_array_equal(y[row], np.roll(y[0], steps, axes))
    # Shifts by no multiple of the stride, too, are undone.
    assert len(np.unique(start, axis=0)) == np.prod(stride)


def test_an_invariant_anchor_undoes_every_shift():
    x = image_of(GRID)
    y, start = both(shifted(x, GRID), STRIDE, invariant=True)
    np.testing.assert_array_equal(y, np.broadcast_to(y[0], y.shape))
    assert len(np.unique(start, axis=0)) == np.prod(GRID)
    # It is the place of the largest norm of the component with the largest.
    a, c = by_hand(x[0], STRIDE)
    norms = (x[0] ** 2).sum(-1)[a::3, c::2]
    i, j = np.unravel_index(norms.argmax(), norms.shape)
    np.testing.assert_array_equal(start[0], [a + 3 * i, c + 2 * j])


def test_a_stride_of_one_and_a_grid_that_begins_at_its_anchor_stay_as_they_are():
    x = np.concatenate([image_of(GRID, seed) for seed in range(5)])
    y, start = both(x, (1, 1))
    np.testing.assert_array_equal(y, x)
    assert not start.any()
    y, start = both(x, STRIDE)
    assert start.any()
    again, start = both(y, STRIDE)
    np.testing.assert_array_equal(again, y)
    assert not start.any()


def test_the_gradient_is_turned_back_and_the_choice_has_none():
    x, weight = image_of(GRID), image_of(GRID, 1)
    y, start = both(x, STRIDE)
    assert start.any()
    found = jax.grad(lambda x: jnp.sum(weight * nn.anchored(x, STRIDE)[0]))(x)
    np.testing.assert_array_equal(found, np.roll(weight, start[0], (1, 2)))
    there = nn.turned(jnp.asarray(y), -jnp.asarray(start))
    np.testing.assert_array_equal(there, x)


def test_equal_norms_are_told_apart_by_what_lies_around():
    """Blank components, as margins of drawings are: the paper's first index would move
    with the shift."""
    x = np.zeros((1, 8, 8, 1), np.float32)
    x[0, 1, 1], x[0, 2, 5] = 1.0, -1.0
    for invariant in (False, True):
        y, start = both(shifted(x, (8, 8)), (4, 4), invariant=invariant)
        assert len(np.unique(start % 4, axis=0)) == 16
        assert len(np.unique(y, axis=0)) == (1 if invariant else 4)
    blank, start = both(np.ones((1, 4, 4, 2), np.float32), (2, 2))
    assert not start.any() and (blank == 1).all()


def test_norms_of_bfloat16_are_summed_in_float32():
    """The squares of a large and a small channel are the large one's in bfloat16."""
    pairs = [(16, 1), (32, 1), (32, 2), (64, 1), (64, 2), (64, 3)]
    x = np.zeros((6, 8, 2), np.float32)
    x[:, 1::2] = np.array(pairs)[:, None]
    x[:, ::2, 0] = x[:, 1::2, 0]
    y, start = nn.anchored(jnp.asarray(x, jnp.bfloat16), (2,))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(start, np.ones((6, 1)))


def test_strides_that_do_not_divide_the_grid_are_refused():
    x = jnp.zeros((1, *GRID, 1))
    for stride in ((4, 2), (0, 2), (3,)):
        with pytest.raises(UserError, match=r"must divide each axis .* grid=\(6, 4\)"):
            nn.anchor_of(x, stride)
