"""Masks by blocks: lists that are known, arrays, and what they refuse."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import BlockLists, BlockMask, Coverage, Span
from attnjax.kernels.choose_blocks import plan_blocks
from attnjax.kernels.tile_table import tile_table

LISTS = ((0,), (), (2, 0))
MARKS = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1]], bool)
T, S = 11, 13


def tile(q, k, operands, batch=1):
    steps = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    return kernels.Tile(b=steps, h=steps[:1], q=q, k=k, operands=operands)


def places():
    q = jnp.arange(T, dtype=jnp.int32)[None, None, :, None]
    return q, jnp.arange(S, dtype=jnp.int32)[None, None, None, :]


def wanted(marks=MARKS):
    return marks.repeat(4, 0)[:T].repeat(5, 1)[:, :S]


def test_lists_show_their_blocks():
    got = BlockLists(4, 5, LISTS).visible(tile(*places(), {}))
    np.testing.assert_array_equal(got[0, 0], wanted())


def test_marks_show_their_blocks_whatever_the_positions():
    mask, (q, k) = BlockMask(4, 5), places()
    operands = {"block_mask": jnp.asarray(MARKS)[None, None]}
    np.testing.assert_array_equal(mask.visible(tile(q, k, operands))[0, 0], wanted())
    both = jnp.stack([jnp.asarray(MARKS), ~jnp.asarray(MARKS)])[:, None]
    moved = jnp.concatenate([q, q[:, :, ::-1]])
    got = mask.visible(tile(moved, k, {"block_mask": both}, batch=2))
    np.testing.assert_array_equal(got[0, 0], wanted())
    np.testing.assert_array_equal(got[1, 0], wanted(~MARKS)[::-1])


def test_coverage_of_lists_is_exact():
    mask, visible = BlockLists(4, 5, LISTS), wanted()
    for q, k in itertools.product(range(T), range(S)):
        for size in (1, 3, 6):
            part = visible[q : q + size, k : k + size]
            last = min(q + size, T) - 1, min(k + size, S) - 1
            claim = mask.coverage(Span(q, last[0], k, last[1]))
            assert (claim == Coverage.EMPTY) == (not part.any())
            assert (claim == Coverage.FULL) == part.all()


def test_tiles_without_a_mark_are_skipped():
    x = jnp.ones((1, 16, 1, 4))
    marks = {"block_mask": jnp.asarray(np.eye(4, dtype=bool))[None, None]}
    spec = kernels.AttentionSpec(mask=BlockMask(4, 4))
    request = kernels.make_request(x, x, x, spec, marks, kernels.default_target())
    table = tile_table(plan_blocks(request, (4, 4)), marks)
    np.testing.assert_array_equal(table.num_full, 1)
    np.testing.assert_array_equal(table.num_partial, 0)
    np.testing.assert_array_equal(table.full[:, 0], range(4))


def test_marks_are_made_of_lists():
    indices = jnp.asarray([[0, 9], [1, 1], [2, 0]])
    got = kernels.mark_blocks(indices, jnp.asarray([1, 0, 2]), num_k=3)
    np.testing.assert_array_equal(got, MARKS)
    assert not kernels.mark_blocks(indices, jnp.zeros(3, int), num_k=3).any()


def test_blocks_outside_their_rule_are_refused():
    with pytest.raises(ValueError, match="BlockLists: block_q must be an integer >= 1"):
        BlockLists(0, 4, LISTS)
    with pytest.raises(ValueError, match="BlockMask: block_k must be an integer >= 1"):
        BlockMask(4, 2.5)
    with pytest.raises(ValueError, match="indices >= 0, one list"):
        BlockLists(4, 4, ((-1,),))
    x = jnp.ones((1, 8, 1, 4))
    with pytest.raises(ValueError, match="got 1 lists with indices up to 0"):
        kernels.attention(
            x, x, x, kernels.AttentionSpec(mask=BlockLists(4, 4, ((0,),)))
        )
    spec = kernels.AttentionSpec(mask=BlockMask(4, 4))
    with pytest.raises(ValueError, match=r"\[B, H, M, N\] = \(1, 1, 'any', 'any'\)"):
        marks = {"block_mask": jnp.ones((2, 1, 2, 2), bool)}
        kernels.attention(x, x, x, spec, marks)
