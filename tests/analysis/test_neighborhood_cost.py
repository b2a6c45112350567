"""The tables of Generalized Neighborhood Attention (arXiv 2504.16922)."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.analysis import neighborhood_cost as cost
from attnjax.core.errors import UserError
from attnjax.kernels import Neighborhood
from attnjax.mixers import neighborhood_attention as na

VIDEO, BOX = (30, 48, 80), (18, 24, 24)
# stride -> tiles of keys, tile speed-up, and end to end at 60.7 % of the time.
STRIDES = {
    (1, 1, 1): (275, 3.273, 1.73),
    (2, 1, 1): (250, 3.6, 1.78),
    (1, 1, 8): (165, 5.455, 1.98),
    (2, 1, 8): (150, 6.0, 2.02),
    (1, 8, 8): (99, 9.091, 2.17),
    (2, 8, 8): (90, 10.0, 2.20),
    (16, 8, 8): (81, 11.11, 2.23),
    BOX: (135, 6.667, 2.07),
}


def video(stride, **options):
    mask = Neighborhood(VIDEO, BOX, stride)
    return cost.simulate(mask, q_tile=(4, 8, 8), kv_tile=(2, 8, 8), **options)


@pytest.mark.parametrize(
    ("stride", "tiles", "speedup"),
    [((1, 1), 84, 6.095), ((16, 1), 60, 8.533), ((16, 16), 50, 10.24)],
)
def test_tiles_of_an_image_are_the_published_ones(stride, tiles, speedup):
    mask = Neighborhood((256, 256), (80, 80), stride)
    found = cost.simulate(mask, q_tile=(16, 16), kv_tile=(16, 8))
    assert found.worst == tiles and found.dense == 512
    assert found.speedup == pytest.approx(speedup, abs=5e-4)
    assert found.bound == pytest.approx(10.24)
    assert found.perfectly_sparse == (stride == (16, 16))


@pytest.mark.parametrize("stride", STRIDES)
def test_tiles_of_a_video_are_the_published_ones(stride):
    tiles, speedup, whole = STRIDES[stride]
    found = video(stride)
    assert found.worst == tiles and found.dense == 900
    assert found.speedup == pytest.approx(speedup, abs=5e-3)
    # One of them is 2.175, published as 2.17.
    assert cost.end_to_end(found.speedup, 0.607) == pytest.approx(whole, abs=5.1e-3)
    assert found.perfectly_sparse == (stride == (16, 8, 8))


def test_dynamic_tiling_of_a_video_is_the_published_one():
    found = video((1, 1, 1), dynamic=True)
    assert found.worst == 176 and round(found.speedup, 3) == 5.114


def test_dynamic_tiles_that_divide_window_and_stride_are_perfect():
    for tile_q, tile_kv in itertools.product((2, 3), (2, 4)):
        for stride in (tile_q, 2 * tile_q):
            mask = Neighborhood((48,), (8,), (stride,))
            tiles = {"q_tile": (tile_q,), "kv_tile": (tile_kv,)}
            found = cost.simulate(mask, **tiles, dynamic=True)
            assert found.perfectly_sparse and found.mean == found.worst == 8 // tile_kv


def visited(seen, q_side, kv_side):
    """Tiles of keys that hold a visible key, for each tile of queries."""
    size = len(seen)
    return [
        sum(
            seen[q : q + q_side, k : k + kv_side].any() for k in range(0, size, kv_side)
        )
        for q in range(0, size, q_side)
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_counts_are_those_of_the_mask_cut_into_tiles(causal):
    for stride, (q_side, kv_side) in itertools.product(
        (1, 2, 5), ((3, 2), (4, 4), (2, 5))
    ):
        mask = Neighborhood((23,), (5,), (stride,), causal=causal)
        found = cost.simulate(mask, q_tile=(q_side,), kv_tile=(kv_side,))
        seen = na.seen_along(23, 5, stride, causal=causal)
        trips = visited(seen, q_side, kv_side)
        assert (found.worst, found.mean) == (max(trips), np.mean(trips))
        assert found.bound == pytest.approx(23**2 / seen.sum())
        ideal = cost.flops(mask, num_heads=3, head_dim=4, value_dim=5)
        assert ideal == 2 * seen.sum() * 3 * 9


def test_dilated_classes_are_axes_of_their_own():
    mask = Neighborhood((10,), (2,), dilation=(3,))
    found = cost.simulate(mask, q_tile=(2,), kv_tile=(2,))
    trips = [n for size in (4, 3, 3) for n in visited(na.seen_along(size, 2), 2, 2)]
    assert (found.worst, found.mean) == (max(trips), np.mean(trips))
    assert found.bound == 5


def test_row_major_tiles_are_those_that_hold_a_visible_key():
    mask = Neighborhood((16, 16), (4, 4))
    place = jnp.arange(256, dtype=jnp.int32)
    places = {"q": place[:, None], "k": place[None]}
    seen = mask.visible(kernels.Tile(b=None, h=None, operands={}, **places))
    rows = cost.row_major(mask, block_q=32, block_kv=16)
    trips = visited(np.asarray(seen), 32, 16)
    assert (rows.worst, rows.mean) == (max(trips), np.mean(trips))
    assert (rows.dense, rows.bound) == (16, 16)


def test_rows_of_tokens_visit_more_tiles_than_boxes_of_a_large_grid():
    mask = Neighborhood((64, 64), (8, 8))
    boxes = cost.simulate(mask, q_tile=(4, 4), kv_tile=(4, 4))
    rows = cost.row_major(mask, block_q=16, block_kv=16)
    assert rows.dense == boxes.dense and rows.worst == 24
    assert rows.mean > 1.5 * boxes.mean


def test_tiles_of_another_rank_are_refused():
    mask = Neighborhood((8, 8), 2)
    with pytest.raises(
        UserError, match=r"q_tile must .* grid=\(8, 8\); got q_tile=\(2,"
    ):
        cost.simulate(mask, q_tile=(2,), kv_tile=(2, 2))
    with pytest.raises(UserError, match=r"kv_tile=\(0, 2\)"):
        cost.simulate(mask, q_tile=(2, 2), kv_tile=(0, 2))
    with pytest.raises(UserError, match="share must be in"):
        cost.end_to_end(2.0, 1.5)
