"""Facts of dual attention (arXiv 2204.03645)."""

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
    out,
    tokens,
    wide,
)

from attnjax import nn
from attnjax.conformance.subject import jitted
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention, davit
from attnjax.mixers.slots.windows import Windows

H, D = 6, 6
reference = jitted(davit.reference)


def channel(grid=(12,), options=None, **dims):
    return made(davit, grid, {"order": "channel", **(options or {})}, **dims)


def spatial(grid, options=None, **dims):
    return made(davit, grid, {"order": "spatial", **(options or {})}, **dims)


def channels_by_hand(query, key, value, scale):
    """One row of one head's map at a time."""
    found = np.zeros(query.shape)
    share = query.shape[2] // key.shape[2]
    for b, h, i in itertools.product(*(range(query.shape[n]) for n in (0, 2, 3))):
        products = value[b, :, h // share].T @ key[b, :, h // share, i]
        weights = np.exp(scale * (products - products.max()))
        found[b, :, h, i] = query[b, :, h] @ weights / weights.sum()
    return found


@pytest.mark.parametrize("by", ["head_dim", "tokens"])
def test_channels_are_the_definition(by):
    extra = 2
    s = channel((3, 5), {"channel_scale": by}, use_bias=True, num_kv_heads=3)
    x, ctx = tokens(s, extra=extra)
    params = wide(s.arrays[0])["channel"]
    qkv = heads(params, x, D)
    scale = (D if by == "head_dim" else 17) ** -0.5
    expected = channels_by_hand(*qkv, scale)
    close(s.y(x, ctx), out(params, expected))
    close(reference(*qkv, scale=scale), expected)


def test_permuting_tokens_permutes_what_channels_give():
    s, order = channel(), np.random.default_rng(0).permutation(12)
    x, ctx = tokens(s)
    close(s.y(x[:, order], ctx), s.y(x, ctx)[:, order])


def test_the_map_has_the_size_of_a_head_and_rows_that_sum_to_one():
    s = channel((3, 4), num_kv_heads=3)
    x, ctx = tokens(s, hooks=(Hook("map", "channel_map"),))
    found = s.forward(s.arrays, x, ctx)[1].records["map"]
    assert found.shape == (2, 3, D, D)
    close(found.sum(-1), np.ones((2, 3, D)))
    assert np.abs(found.sum(-2) - 1).max() > 1e-2
    for length in (1, 40):
        a = jnp.ones((2, length, 3, D))
        assert davit.channel_map(a, a, scale=1.0).shape == found.shape


def test_with_a_channel_for_each_head_the_layer_is_linear():
    s = channel(num_heads=20, num_kv_heads=20, head_dim=1)
    x, ctx = tokens(s)
    params = wide(s.arrays[0])["channel"]
    close(s.y(x, ctx), x @ params["query"]["kernel"] @ params["out"]["kernel"])


def test_without_keys_each_channel_is_the_mean_of_its_head():
    s = channel()
    x, ctx = tokens(s)
    params = dict(s.arrays[0]["channel"])
    zero = {"key": jax.tree.map(jnp.zeros_like, params["key"])}
    y, _ = s.forward(({"channel": params | zero}, {}), x, ctx)
    params = wide(params)
    query = heads(params, x, D)[0]
    close(y, out(params, np.broadcast_to(query.mean(-1, keepdims=True), query.shape)))


def test_doubling_the_tokens_doubles_the_products():
    """So the output is another; by the number of tokens they grow by sqrt(2)."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 5, H, D))
    twice = (np.concatenate([a, a], axis=1) for a in (query, key, value))
    found = reference(*twice, scale=D**-0.5)[:, :5]
    close(found, reference(query, key, value, scale=2 * D**-0.5))
    assert np.abs(found - reference(query, key, value, scale=D**-0.5)).max() > 1e-2


# ---- windows


@pytest.mark.parametrize(
    ("grid", "window", "extra"),
    [((5,), 3, 0), ((3, 5), (2, 3), 2), ((2, 3, 4), (1, 2, 3), 0)],
    ids=["line", "plane", "film"],
)
def test_windows_are_the_definition(grid, window, extra):
    s = spatial(grid, {"window": window}, use_bias=True, num_kv_heads=3)
    x, ctx = tokens(s, extra=extra)
    params, places = wide(s.arrays[0])["spatial"], coordinates(grid)
    size = np.broadcast_to(window, len(grid))

    def keys_of(t):
        if t < extra:
            return list(range(extra + len(places)))
        own = tuple(np.array(places[t - extra]) // size)
        same = [n for n, at in enumerate(places) if tuple(np.array(at) // size) == own]
        return [*range(extra), *(extra + n for n in same)]

    close(s.y(x, ctx), out(params, by_hand(heads(params, x, D), keys_of)))


def test_padding_that_is_not_left_out_is_tokens_of_zeros():
    """As in the released code: the grid is filled up at the end of each axis, and what
    fills it has the biases of the maps."""
    options = {"window": (2, 3), "mask_padding": False}
    s = spatial((3, 5), options, use_bias=True, num_kv_heads=3)
    x, ctx = tokens(s, extra=1)
    params = wide(s.arrays[0])["spatial"]
    filled = np.zeros((2, 4, 6, x.shape[-1]))
    filled[:, :3, :5] = x[:, 1:].reshape(2, 3, 5, -1)
    whole = np.concatenate([x[:, :1], filled.reshape(2, 24, -1)], axis=1)
    own = np.array([(i // 2, j // 3) for i, j in coordinates((4, 6))])

    def keys_of(t):
        if t == 0:
            return list(range(25))
        same = (own == own[t - 1]).all(axis=1)
        return [0, *(1 + np.flatnonzero(same))]

    found = out(params, by_hand(heads(params, whole, D), keys_of))
    kept = found[:, 1:].reshape(2, 4, 6, -1)[:, :3, :5].reshape(2, 15, -1)
    close(s.y(x, ctx), np.concatenate([found[:, :1], kept], axis=1))
    masked = spatial((3, 5), {"window": (2, 3)}, use_bias=True, num_kv_heads=3)
    other = masked.forward(s.arrays, x, ctx)[0]
    assert np.abs(other - s.y(x, ctx)).max() > 1e-2


def test_windows_of_the_whole_grid_are_full_attention():
    s = spatial((3, 4), {"window": 7})
    x, ctx = tokens(s)
    full = made(attention, (3, 4), head_dim=D, num_kv_heads=6)
    close(s.y(x, ctx), full.forward((s.arrays[0]["spatial"], {}), x, ctx)[0])


def test_nothing_passes_from_window_to_window_but_through_channels():
    s = spatial((3, 4), {"window": 2})
    np.testing.assert_array_equal(dependence(s), Windows((3, 4), (2, 2)).sees())
    assert dependence(made(davit, (3, 4))).all()


@pytest.mark.parametrize("order", ["spatial_channel", "channel_spatial", "parallel"])
def test_two_parts_are_those_of_layers_of_one(order):
    both = made(davit, (3, 4), {"order": order})
    x, ctx = tokens(both)
    params = both.arrays[0]

    def part(name, x):
        one = {"spatial": spatial, "channel": channel}[name]((3, 4))
        return np.asarray(one.forward(({name: params[name]}, {}), x, ctx)[0])

    first, second = davit.ORDERS[order]
    y, behind = part(first, x), x
    if order != "parallel":
        behind = x + y
        size = np.sqrt((behind * behind).mean(-1, keepdims=True) + 1e-6)
        behind = behind / size * np.asarray(params["between"]["scale"])
    close(both.y(x, ctx), y + part(second, behind), atol=1e-4)


# ---- positions by a convolution


@pytest.mark.parametrize(
    "grid", [(5,), (3, 4), (2, 3, 2)], ids=["line", "plane", "film"]
)
def test_the_convolution_is_a_sum_over_neighbours(grid):
    rng = np.random.default_rng(0)
    rank, shape = len(grid), (*grid, 2)
    x, kernel = rng.normal(size=shape), rng.normal(size=(*(3,) * rank, 2))
    padded = np.pad(x, [(1, 1)] * rank + [(0, 0)])
    expected = np.zeros(shape)
    for step in itertools.product(range(3), repeat=rank):
        near = tuple(slice(s, s + n) for s, n in zip(step, grid, strict=True))
        expected += padded[near] * kernel[step]
    flat = jnp.asarray(x.reshape(1, -1, 2)), jnp.asarray(kernel.reshape(-1, 2))
    close(nn.depthwise(*flat, grid), expected.reshape(1, -1, 2))


def test_parts_read_what_the_convolution_adds_and_extra_tokens_pass_by():
    s, alone = channel((3, 4), {"conv": True}), channel((3, 4))
    x, ctx = tokens(s, extra=2)
    params = dict(s.arrays[0])
    kernel, bias = params.pop("conv_kernel"), params.pop("conv_bias")
    added = nn.depthwise(jnp.asarray(x[:, 2:]), kernel, (3, 4)) + bias
    within = np.concatenate([x[:, :2], x[:, 2:] + added], axis=1)
    close(s.y(x, ctx), alone.forward((params, {}), within, ctx)[0])


# ---- refusals


def test_a_plain_sequence_is_refused_but_for_channels():
    for options in ({}, {"order": "spatial"}, {"order": "channel", "conv": True}):
        with pytest.raises(UserError, match="davit: needs the grid.* plain sequence"):
            made(davit, None, options).build()
    s = channel(None)
    x, ctx = tokens(s)
    assert s.y(x, ctx).shape == x.shape


def test_settings_and_requests_outside_their_rule_are_refused():
    with pytest.raises(ValueError, match="window must be at least 1"):
        davit.Config(window=(7, 0))
    with pytest.raises(UserError, match=r"got window=\(2, 2\) for 1 axes"):
        spatial((4,), {"window": (2, 2)}).build()
    s = made(davit, (3, 4))
    x, ctx = tokens(s)
    with pytest.raises(UserError, match=r"got grid=\(4, 3\), made for \(3, 4\)"):
        s.call(s.arrays, x, ctx.replace(grid=(4, 3)))
    with pytest.raises(UserError, match="davit: is not causal"):
        s.call(s.arrays, x, ctx.replace(causal=True))
    with pytest.raises(UserError, match="davit: has no decode form"):
        s.build().init_state(2, 12)
    options = {"output": ({"type": "attention_sink_survey"},)}
    with pytest.raises(UserError, match="davit: rows of the kernel are its own"):
        channel((3, 4), options).build()
