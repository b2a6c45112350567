"""Facts of halo attention (arXiv 2103.12731)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid_layers import (
    by_hand,
    close,
    coordinates,
    dependence,
    heads,
    made,
    one_row,
    out,
    tokens,
    wide,
)

from attnjax.conformance.subject import jitted
from attnjax.core.errors import UserError
from attnjax.mixers import attention, halonet, neighborhood_attention

H, D = 6, 6


def layer(grid, block, halo, **options):
    given = {"block": block, "halo": halo, "num_kv_heads": 3, **options}
    return made(halonet, grid, given, use_bias=True)


def windows_by_hand(s, qkv, tables, extra):
    """The tokens of the grid, [B, prod(grid), H, D], one query at a time: it sees the
    extra tokens, and the window of its block cut out of keys with zeros around."""
    query, key, value = qkv
    config, grid, rank = s.config, s.dims.grid, len(s.dims.grid)
    block, halo = (np.broadcast_to(n, rank) for n in (config.block, config.halo))
    around, seen = [(h, h) for h in halo], block + 2 * halo
    on_grid = np.pad(np.ones(grid, bool), around) | (config.border == "zero")
    factor = D**-0.5 if config.relative == "scaled" else 1.0

    def padded(a):
        rows = a[:, extra:].reshape(len(a), *grid, *a.shape[2:])
        return np.pad(rows, [(0, 0), *around, (0, 0), (0, 0)])

    keys, values = padded(key), padded(value)
    found = np.zeros(query[:, extra:].shape)
    for t, at in enumerate(coordinates(grid)):
        first = at // block * block
        window = tuple(slice(i, i + m) for i, m in zip(first, seen, strict=True))
        kept = on_grid[window].reshape(-1)
        for b, h in itertools.product(range(len(query)), range(query.shape[2])):
            own, shared = query[b, extra + t, h], h // (query.shape[2] // key.shape[2])
            bias = np.zeros(seen)
            for axis, table in enumerate(tables):
                row = np.arange(seen[axis]) - at[axis] % block[axis] + seen[axis] - 1
                shape = [-1 if axis == other else 1 for other in range(rank)]
                bias = bias + factor * (table[row] @ own).reshape(shape)
            bias = np.concatenate([np.zeros(extra), bias.reshape(-1)[kept]])
            own_rows = (
                np.concatenate([a[b, :extra, shared], rest])
                for a, rest in (
                    (key, keys[b][window][..., shared, :].reshape(-1, D)[kept]),
                    (value, values[b][window][..., shared, :].reshape(-1, D)[kept]),
                )
            )
            found[b, t, h] = one_row(own, *own_rows, bias)
    return found


CASES = {
    "line": ((6,), {"block": 2, "halo": 3, "relative": "scaled"}, 0),
    "plane": ((4, 3), {"block": (2, 3), "halo": 1}, 2),
    "plane with zeros around": ((4, 3), {"block": 1, "halo": 1, "border": "zero"}, 0),
    "film": ((2, 4, 2), {"block": (1, 2, 2), "halo": (1, 1, 0)}, 0),
    "plane without embeddings": ((4, 3), {"block": (2, 1), "relative": "none"}, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_is_the_definition_on_a(name):
    grid, options, extra = CASES[name]
    s = layer(grid, **{"block": 2, "halo": 1, **options})
    x, ctx = tokens(s, extra=extra)
    params = wide(s.arrays[0])
    tables = [params[k] for k in sorted(params) if k.startswith("relative")]
    qkv = heads(params, x, D)
    expected = windows_by_hand(s, qkv, tables, extra)
    y = s.y(x, ctx)
    close(y[:, extra:], out(params, expected))
    if extra:
        everything = list(range(x.shape[1]))
        close(y[:, :extra], out(params, by_hand(qkv, lambda t: everything))[:, :extra])


def test_the_form_of_a_mask_is_that_of_windows():
    grid = (4, 6)
    s = layer(grid, block=2, halo=1)
    x, ctx = tokens(s)
    params = wide(s.arrays[0])
    tables = [jnp.asarray(params[f"relative_{axis}"]) for axis in (0, 1)]
    cut = halonet.windows_of(s.config, grid)
    reference = functools.partial(halonet.reference, windows=cut)
    found = jitted(reference)(*heads(params, x, D), tables=tables)
    close(s.y(x, ctx), out(params, np.asarray(found, np.float64)))


# ---- who sees whom


def test_the_field_of_a_query_is_not_centred_on_it():
    """From h + i before it to b + h - 1 - i behind, on both axes."""
    grid, b, h = (2, 9), 3, 1
    s = layer(grid, block=(1, b), halo=(0, h))
    depends = dependence(s)
    for t, (row, column) in enumerate(coordinates(grid)):
        i = column % b
        seen = range(column - h - i, column + b + h - i)
        expected = [9 * row + j for j in seen if 0 <= j < 9]
        assert list(np.flatnonzero(depends[t])) == expected


def test_blocks_of_one_are_attention_to_a_centred_window():
    """Where the window of neighbourhood attention is not moved inward, its layer."""
    s = layer((5, 5), block=1, halo=1, relative="none")
    x, ctx = tokens(s)
    near = made(
        neighborhood_attention,
        (5, 5),
        {"window": 3, "stride": 1},
        head_dim=D,
        use_bias=True,
    )
    inside = [t for t, at in enumerate(coordinates((5, 5))) if {0, 4}.isdisjoint(at)]
    close(s.y(x, ctx)[:, inside], near.forward(s.arrays, x, ctx)[0][:, inside])


def test_a_block_of_the_whole_grid_without_a_halo_is_full_attention():
    s = layer((3, 4), block=(3, 4), halo=0, relative="none")
    x, ctx = tokens(s)
    full = made(attention, (3, 4), head_dim=D, use_bias=True)
    close(s.y(x, ctx), full.forward(s.arrays, x, ctx)[0])


def test_a_shift_by_a_block_shifts_the_output_and_one_by_less_does_not():
    s = layer((8,), block=2, halo=2)
    x, ctx = tokens(s)
    y = s.y(x, ctx)
    by_two, by_one = (s.y(np.roll(x, n, axis=1), ctx) for n in (2, 1))
    # Blocks at 2 and 4 whose windows reach no border, before and after.
    close(by_two[:, 4:6], y[:, 2:4])
    assert np.abs(by_one[:, 4:5] - y[:, 3:4]).max() > 1e-2


def test_rows_of_the_embeddings_are_offsets_from_the_first_query():
    rows = halonet.relative_rows(2, 1)
    assert (rows[0, 0], rows[1, 0], rows[0, 3]) == (3, 2, 6)
    assert rows.min() == 2  # m - b: those below are never read.
    s = layer((16, 16), block=8, halo=3)
    params, _ = jax.eval_shape(lambda: s.init(0))
    tables = [params[name].shape for name in ("relative_0", "relative_1")]
    assert tables == [(27, D)] * 2


def test_rotary_positions_are_of_the_product_with_keys_alone():
    """The embeddings read the query before it is turned, so that a shift by a block
    still shifts the output."""
    options = {"block": 2, "halo": 2, "positions": "rope"}
    s = made(halonet, (8,), options)
    x, ctx = tokens(s)
    y = s.y(x, ctx)
    close(s.y(np.roll(x, 2, axis=1), ctx)[:, 4:6], y[:, 2:4])
    plain = made(halonet, (8,), options | {"positions": "none"})
    assert np.abs(plain.forward(s.arrays, x, ctx)[0] - y).max() > 1e-2


# ---- refusals


def test_blocks_that_look_back_are_a_setting_of_neighborhood_attention():
    seen = neighborhood_attention.seen_along(9, 5, 3, causal=True)
    for i in range(9):
        assert list(np.flatnonzero(seen[i])) == list(
            range(max(i // 3 * 3 - 2, 0), i + 1)
        )
    message = "halonet: has no decode form.*causal=true, stride=3, window=5"
    mixer = layer((9,), block=3, halo=2).build()
    for call in (lambda: mixer.init_state(2, 9), lambda: mixer.step(None, None, None)):
        with pytest.raises(UserError, match=message):
            call()


def test_settings_and_requests_outside_their_rule_are_refused():
    for options, message in (
        ({"block": 0}, "block must be at least 1"),
        ({"halo": (1, -1)}, "halo must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            halonet.Config(**options)
    with pytest.raises(
        UserError, match="got block=8 on axis 0 of grid=.4, 4.. Use one"
    ):
        layer((4, 4), block=8, halo=1).build()
    with pytest.raises(UserError, match=r"got halo=\(1, 1\) for 1 axes"):
        layer((4,), block=2, halo=(1, 1)).build()
    with pytest.raises(UserError, match="halonet: needs the grid.* plain sequence"):
        layer(None, block=2, halo=1).build()
    s = layer((3, 4), block=1, halo=1)
    x, ctx = tokens(s)
    with pytest.raises(UserError, match="got T=12, .* extra_tokens=2"):
        s.call(s.arrays, x, ctx.replace(extra_tokens=2))
    with pytest.raises(UserError, match="halonet: is not causal"):
        s.call(s.arrays, x, ctx.replace(causal=True))
    options = {"output": ({"type": "attention_sink_survey"},)}
    with pytest.raises(UserError, match="halonet: rows of the kernel are its own"):
        layer((4,), block=2, halo=1, **options).build()
