"""Windows of biases by distance, and sums along diagonals, without the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels.mosaic_gpu import distances, hooks, steps
from attnjax.kernels.mosaic_gpu.steps import Grid
from attnjax.kernels.mosaic_gpu.tiles import BLOCK, ROWS

H200 = kernels.Target("gpu", "NVIDIA H200")
B, H, T, S = 2, 2, 200, 330
# (reach, positions of the first queries, blocks of threads that are enough, rows of a
# tile of keys).
CASES = {
    "near": (37, None, 1000, 64),
    "near, rows of the batch together": (37, None, 1, 128),
    "all": (500, None, 1, 64),
    "one bias": (0, None, 1000, 64),
    "after offsets": (11, (130, -3), 1, 64),
}


def grid_of(reach, first, step, *, transposed=False):
    mask = kernels.SlidingWindow(150)
    spec = kernels.AttentionSpec(mask, score=kernels.RelativeBias(reach))
    shapes = ((B, T, H, 64), (B, S, H, 64), (B, S, H, 64))
    qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    first = np.zeros(1, np.int32) if first is None else np.array(first, np.int32)
    place = {"q_positions": jnp.asarray(first[:, None] + np.arange(T), jnp.int32)}
    given = {"relative_bias": jnp.zeros((H, 2 * reach + 1))} | place
    request = kernels.make_request(*qkv, spec, given, H200)
    blocks = (step, BLOCK) if transposed else (BLOCK, step)
    return Grid(request, *blocks, transposed=transposed), place


@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("first", [None, (129, -6)], ids=["", "odd and even"])
def test_a_window_is_a_tile_of_the_table(first, transposed):
    grid, place = grid_of(37, first, 128, transposed=transposed)
    step, table = grid.request.spec.score[0], jnp.arange(75.0)[None] ** 2
    array = jax.jit(functools.partial(distances.windows, grid, step))(table, place)
    array = np.asarray(array)
    starts = np.asarray(distances.first_position(place))
    window = jax.jit(functools.partial(distances.window, grid, 37))
    for b, start in enumerate(starts):
        for q, k in np.ndindex(256 // ROWS, 384 // ROWS):
            q, k = q * ROWS, k * ROWS
            column = int(window(start, q, k))
            assert column % 2 == 0
            got = array[b % array.shape[0], 0, :, column : column + 128]
            rows, columns = np.arange(ROWS)[:, None], np.arange(128)
            away = columns - rows if transposed else rows - columns
            away = np.clip(start + q - k + away, -37, 37) + 37
            np.testing.assert_array_equal(got, table[0, away])


@pytest.mark.parametrize("name", CASES)
def test_tiles_along_diagonals_and_rows_beyond_make_the_gradient(name, monkeypatch):
    reach, first, enough, block_k = CASES[name]
    monkeypatch.setattr(distances, "ENOUGH_BLOCKS", enough)
    grid, place = grid_of(reach, first, block_k)
    step, operands = grid.request.spec.score[0], place if first else {}
    starts = np.broadcast_to(distances.first_position(place), (B,))
    # Whole numbers, summed without rounding.
    rng = np.random.default_rng(5)
    ds = rng.integers(-9, 9, (B, H, grid.q_len, grid.kv_len)).astype(np.float32)
    cover = steps.coverage(grid, hooks.pad_operands(grid, place))
    shape = (B, 1, grid.num_q, grid.num_k)
    seen = np.broadcast_to(np.asarray(cover) > 0, shape)
    ds *= seen.repeat(BLOCK, 2).repeat(block_k, 3)
    away = starts[:, None, None] + np.arange(grid.q_len)[:, None]
    away = np.clip(away - np.arange(grid.kv_len), -reach, reach) + reach
    wanted = sum(
        np.stack(
            [np.bincount(away[b].ravel(), x.ravel(), 2 * reach + 1) for x in ds[b]]
        )
        for b in range(B)
    )

    lowest, order, counts = distances.near_tiles(grid, step, cover, operands)
    order, counts = np.asarray(order), np.asarray(counts)
    groups, num, _ = order.shape
    sums = np.zeros((groups, H, num, BLOCK, block_k), np.float32)
    left = ds.copy()
    for g, n in np.ndindex(groups, num):
        for place_of in order[g, n, : counts[g, n]]:
            b, i = divmod(int(place_of), grid.num_q)
            b = g if groups > 1 else b
            j = BLOCK // block_k * i + n + lowest
            tile = (b, slice(None), slice(i * BLOCK, (i + 1) * BLOCK))
            tile = (*tile, slice(j * block_k, (j + 1) * block_k))
            sums[g, :, n] += ds[tile]
            left[tile] = 0
    ends = [np.zeros((B, H, grid.q_len), np.float32) for _ in range(2)]
    for b, i, j in np.ndindex(B, grid.num_q, grid.num_k):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        tile = left[b, :, rows, j * block_k : (j + 1) * block_k].sum(-1)
        base = starts[b] + i * BLOCK - j * block_k
        for end, total in zip(distances.beyond(grid, reach, base), ends, strict=True):
            total[b, :, rows] += tile * end
    given = (jnp.asarray(sums), [jnp.asarray(x) for x in ends], operands)
    collect = functools.partial(distances.collect, grid, step, lowest)
    got = jax.jit(collect)(*given)
    np.testing.assert_array_equal(got, wanted)
