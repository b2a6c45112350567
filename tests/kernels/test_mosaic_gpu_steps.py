"""Which tiles the Hopper kernels visit, against the dense mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import tiles
from attnjax.kernels.mosaic_gpu import hooks, steps
from attnjax.kernels.mosaic_gpu.steps import Grid

H200 = kernels.Target("gpu", "NVIDIA H200")
B, T, H = 2, 300, 2


def every_third(b, h, q, k):
    return (q - k) % (3 + 0 * h) == 0


def packed():
    rows = [[1] * 140 + [2] * 100 + [0] * 60, [4] * 20 + [5] * 280]
    return jnp.asarray(rows, jnp.int32)


MASKS = {
    "full": (kernels.Full(), {}, "table"),
    "causal": (kernels.Causal(), {}, "causal"),
    "window": (kernels.SlidingWindow(70), {}, "table"),
    "prefix": (
        kernels.Causal() | kernels.Prefix(),
        {"prefix_len": jnp.asarray([1, 200], jnp.int32)},
        "table",
    ),
    "packed": (
        kernels.Causal() & kernels.Segments(),
        {"q_segment_ids": packed(), "k_segment_ids": packed()},
        "table",
    ),
    "function": (kernels.Causal() & kernels.MaskFn(every_third), {}, "table"),
    "kv mask": (kernels.Full(), {"kv_mask": packed() == 2}, "table"),
    "block lists": (
        kernels.Causal() & kernels.BlockLists(64, 128, ((0,), (0,), (1,), (), (0, 2))),
        {},
        "table",
    ),
    "block mask": (
        kernels.BlockMask(128, 128),
        {
            "block_mask": jnp.asarray([[1, 0, 0], [0, 0, 1], [1, 1, 1]], bool)[
                None, None
            ]
        },
        "table",
    ),
    "blocks and a window": (
        kernels.BlockMask(192, 128) & kernels.SlidingWindow(100)
        | kernels.BlockMask(192, 128) & kernels.MaskFn(every_third),
        {
            "block_mask": jnp.asarray(
                [[[[1, 0], [0, 1]], [[0, 1], [0, 0]]], [[[1, 1], [1, 0]]] * 2], bool
            ),
            "kv_mask": packed() > 0,
        },
        "table",
    ),
    "offset": (
        kernels.Causal(),
        {"q_positions": jnp.arange(T, dtype=jnp.int32)[None] - 130},
        "table",
    ),
}


def request_of(mask, operands, *, t=T, s=T):
    shape = jnp.zeros((B, t, H, 64), jnp.bfloat16)
    keys = jnp.zeros((B, s, 1, 64), jnp.bfloat16)
    spec = kernels.AttentionSpec(mask=mask)
    return kernels.make_request(shape, keys, keys, spec, operands, H200)


def dense(request, operands):
    tile = tiles.make_tile(request, operands, (0, request.q_len, 0, request.kv_len))
    mask = tiles.visible(request.spec, tile)
    shape = (B, H, request.q_len, request.kv_len)
    return np.broadcast_to(np.asarray(True if mask is None else mask), shape)


def visits(grid, operands):
    """{(b, h, i, j): whether it is visited without a mask}; a tile twice fails."""
    found, arrays = steps.make_steps(grid, hooks.pad_operands(grid, operands))
    refs = [np.asarray(x) for x in arrays]
    index = int if refs else jnp.int32
    seen = {}
    for b, h, owner in np.ndindex(B, H, grid.owners):
        full, count = map(int, found.bounds(refs, b, h, index(owner)))
        for n in range(count):
            j = int(found.block(refs, b, h, index(owner), index(n)))
            place = (b, h, j, owner) if grid.transposed else (b, h, owner, j)
            assert place not in seen
            seen[place] = n < full
    return seen


@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("name", MASKS)
def test_every_visible_pair_is_visited_and_full_tiles_hide_nothing(name, transposed):
    mask, operands, form = MASKS[name]
    request = request_of(mask, operands)
    blocks = (64, 128) if transposed else (128, 64)
    grid = Grid(request, *blocks, transposed=transposed)
    assert grid.form == form
    wanted, seen = dense(request, operands), visits(grid, operands)
    for place in np.ndindex(B, H, grid.num_q, grid.num_k):
        tile = tile_of(grid, wanted, *place)
        if tile.any():
            assert place in seen
            cut = (place[3] + 1) * grid.block_k > T and form == "table"
            assert not (seen[place] and cut)
        if seen.get(place):
            assert tile.all()


def tile_of(grid, wanted, b, h, i, j):
    rows = slice(i * grid.block_q, (i + 1) * grid.block_q)
    return wanted[b, h, rows, j * grid.block_k : (j + 1) * grid.block_k]


@pytest.mark.parametrize(
    "name", ["packed", "window", "function", "block mask", "blocks and a window"]
)
def test_tables_skip_every_empty_tile_of_each_row_and_head(name):
    mask, operands, _ = MASKS[name]
    request = request_of(mask, operands)
    grid = Grid(request, 128, 64)
    wanted = dense(request, operands)
    for place in visits(grid, operands):
        assert tile_of(grid, wanted, *place).any()


def test_plain_full_and_causal_attention_need_no_table():
    for mask, form in ((kernels.Full(), "full"), (kernels.Causal(), "causal")):
        request = request_of(mask, {}, t=256, s=256)
        for transposed in (False, True):
            grid = Grid(request, 128, 128, transposed=transposed)
            assert grid.form == form
            assert steps.make_steps(grid, {})[1] == ()
