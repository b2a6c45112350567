"""Attention inside windows, with its rows laid open."""

import importlib

import numpy as np
import pytest
from grid_layers import close, made, tokens

from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import davit, halonet
from attnjax.mixers.slots.windows import Windows

LAYERS = {
    "maxvit": (
        (2, 4),
        {"parts": "grid", "window": (1, 2)},
        Windows((2, 4), (1, 2), "lattice"),
    ),
    "halonet": (
        (2, 4),
        {"block": (1, 2), "halo": 1, "relative": "scaled", "scale": 0.7},
        Windows((2, 4), (1, 2), halo=(1, 1)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_weights_see_the_weights_of_all_pairs_of_tokens(name):
    """And the layer gives what it gives without them."""
    grid, options, windows = LAYERS[name]
    s = made(importlib.import_module(f"attnjax.mixers.{name}"), grid, options)
    x, ctx = tokens(s, extra=2)
    y, out = s.forward(s.arrays, x, ctx.replace(hooks=(Hook("w", "weights"),)))
    close(y, s.y(x, ctx))
    weights = np.asarray(out.records["w"])
    assert weights.shape == (2, 6, x.shape[1], x.shape[1])
    close(weights.sum(-1), 1)
    sees = np.pad(windows.sees(), (2, 0), constant_values=True)
    np.testing.assert_array_equal((weights > 0).all((0, 1)), sees)
    assert not (weights > 0)[..., ~sees].any()


def test_no_hooks_on_weights_where_what_is_seen_are_no_tokens():
    s = made(halonet, (2, 4), {"border": "zero"})
    x, ctx = tokens(s, hooks=(Hook("w", "weights"),))
    with pytest.raises(UserError, match="halonet: has no hook 'weights'"):
        s.call(s.arrays, x, ctx)


def test_dropout_of_two_parts_is_not_the_same():
    """Without scores both parts are linear maps of what they read: of equal maps the
    same entries would fall out."""
    s = made(davit, (2, 2), {"order": "parallel"}, dropout=0.5)
    x, ctx = tokens(s, train=True)
    params = s.arrays[0]["spatial"]
    kept = []
    for zeroed in ("spatial", "channel"):
        own = dict(s.arrays[0])
        own[zeroed] = {**params, "out": {"kernel": 0 * params["out"]["kernel"]}}
        kept.append(np.asarray(s.forward((own, {}), x, ctx)[0]) != 0)
    assert (kept[0] != kept[1]).mean() > 0.3
