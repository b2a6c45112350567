"""Windows of a grid, folded into the batch."""

import itertools
import math

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.mixers.slots import windows
from attnjax.mixers.slots.windows import Windows

CUTS = {
    "blocks of a line": Windows((6,), (3,)),
    "lattices of a line": Windows((6,), (3,), "lattice"),
    "blocks of a plane": Windows((4, 6), (2, 3)),
    "lattices of a plane": Windows((4, 6), (2, 3), "lattice"),
    "blocks of a film": Windows((2, 4, 3), (1, 2, 3)),
    "lattices of a film": Windows((2, 4, 3), (2, 2, 1), "lattice"),
    "blocks over the end": Windows((3, 5), (2, 3)),
}


def indices(cut):
    """Each token's number, [1, T, 1], from 1 on."""
    return 1 + np.arange(math.prod(cut.grid)).reshape(1, -1, 1)


@pytest.mark.parametrize("name", CUTS)
def test_folding_and_unfolding_gives_back_every_token(name):
    cut = CUTS[name]
    x = np.random.default_rng(0).normal(size=(2, math.prod(cut.grid), 3))
    x = x.astype(np.float32)
    folded = cut.fold(x)
    assert folded.shape == (2, cut.count, math.prod(cut.size), 3)
    np.testing.assert_array_equal(cut.unfold(folded), x)


@pytest.mark.parametrize("name", CUTS)
def test_a_token_is_in_the_window_and_at_the_place_of_its_coordinates(name):
    cut = CUTS[name]
    own, place = cut.token_windows()
    for t, at in enumerate(itertools.product(*map(range, cut.grid))):
        if cut.kind == "blocks":
            both = [divmod(i, w) for i, w in zip(at, cut.size, strict=True)]
        else:
            runs = zip(at, cut.grid, cut.size, strict=True)
            both = [divmod(i, n // w)[::-1] for i, n, w in runs]
        groups, inside = zip(*both, strict=True)
        assert own[t] == np.ravel_multi_index(groups, cut.runs)
        assert place[t] == np.ravel_multi_index(inside, cut.size)


def test_a_lattice_of_one_token_a_block_is_the_transpose_of_the_blocks():
    """G = H / P."""
    lattice = Windows((6, 6), (2, 2), "lattice")
    block, _ = Windows((6, 6), (3, 3)).token_windows()
    own, _ = lattice.token_windows()
    for one in range(lattice.count):
        assert sorted(block[own == one]) == [0, 1, 2, 3]


def test_what_fills_up_a_block_is_zero_and_not_visible():
    cut = CUTS["blocks over the end"]
    folded = cut.fold(indices(cut))[0, :, :, 0]
    np.testing.assert_array_equal(cut.visible(), folded > 0)
    assert CUTS["blocks of a plane"].visible() is None
    assert Windows((3, 5), (2, 3), masked=False).visible() is None


@pytest.mark.parametrize("block, halo", [(2, 1), (2, 3), (3, 0)])
def test_a_halo_is_what_lies_around_a_block(block, halo):
    cut = Windows((6, 6), (block,) * 2, halo=(halo,) * 2)
    seen = cut.fold_seen(indices(cut))[0, :, :, 0]
    grid = np.pad(indices(cut).reshape(6, 6), halo)
    each, m = range(6 // block), block + 2 * halo
    for n, (i, j) in enumerate(itertools.product(each, each)):
        around = grid[i * block : i * block + m, j * block : j * block + m]
        np.testing.assert_array_equal(seen[n], around.reshape(-1))
    visible = cut.visible()
    np.testing.assert_array_equal(True if visible is None else visible, seen > 0)


@pytest.mark.parametrize("name", CUTS)
def test_tokens_see_those_of_their_window(name):
    own, _ = CUTS[name].token_windows()
    np.testing.assert_array_equal(CUTS[name].sees(), own[:, None] == own)


def test_a_size_that_does_not_divide_is_refused_with_sizes_that_do():
    message = (
        r"maxvit: window must divide each axis of the grid; got window=5 on axis 1 of "
        r"grid=\(10, 12\). Use one of 3, 4, 6, or an axis of 10 or 15 tokens"
    )
    with pytest.raises(UserError, match=message):
        windows.check_divides((5, 5), (10, 12), owner="maxvit", name="window")


def test_a_size_that_is_left_out_fits_the_axis():
    lengths = {4: 2, 7: 7, 8: 4, 9: 3, 14: 7, 16: 8, 22: 2, 24: 8, 28: 7, 1: 1, 11: 11}
    assert {n: windows.fitting(n) for n in lengths} == lengths
    assert windows.size_along(None, (14, None), owner="maxvit", name="window") == (7, 8)


def test_settings_of_another_rank_are_refused():
    message = (
        r"window must have one value for each axis.* got window=\(2, 3\) for 3 axe"
    )
    with pytest.raises(UserError, match=message):
        windows.per_axis((2, 3), 3, owner="davit", name="window")
    with pytest.raises(ValueError, match="at least 1, one number or one for each"):
        windows.check_numbers("window", (2, 0), 1)
