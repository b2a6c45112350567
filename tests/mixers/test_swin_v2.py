"""Facts of shifted windows with cosine scores (arXiv 2111.09883)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid_layers import (
    applied,
    close,
    coordinates,
    dependence,
    heads,
    made,
    out,
    tokens,
    wide,
)
from grid_layers import by_hand as attend_by_hand

from attnjax.conformance.subject import jitted
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import swin_v2
from attnjax.mixers.slots.windows import Windows, offsets

H, D = 6, 6

CASES = {
    "line": ((6,), {"window": 3}, 2),
    "plane": ((4, 6), {"window": (4, 3), "shifted": True, "bias_window": (4, 6)}, 0),
    "film": ((4, 2, 4), {"window": 2, "shifted": True}, 3),
}


def cut_by_hand(grid, size, shifted):
    """The window of each token: what was wrapped around would be in that before the
    first, which is one of its own."""
    steps = [
        w // 2 if shifted and w < n else 0 for n, w in zip(grid, size, strict=True)
    ]
    for at in coordinates(grid):
        yield [(i - s) // w for i, s, w in zip(at, steps, size, strict=True)]


def cosines(query, key, params):
    """Heads whose products over sqrt(D) are the scaled cosines."""
    factor = np.exp(np.minimum(params["logit_scale"], math.log(100)))
    query = query / np.linalg.norm(query, axis=-1, keepdims=True) * factor[:, None]
    return query * D**0.5, key / np.linalg.norm(key, axis=-1, keepdims=True)


def bias_by_hand(params, step, like):
    """The biases [H] of one offset, query - key."""
    read = [
        math.copysign(math.log(1 + abs(8 * x / (p - 1)), 8), x)
        for x, p in zip(step, like, strict=True)
    ]
    hidden = np.maximum(applied(params["bias_in"], np.array(read)), 0)
    return 16 / (1 + np.exp(-applied(params["bias_out"], hidden)))


@pytest.mark.parametrize("name", CASES)
def test_layer_and_reference_are_the_definition_on_a(name):
    grid, options, extra = CASES[name]
    s = made(swin_v2, grid, options, use_bias=True, num_kv_heads=3)
    x, ctx = tokens(s, extra=extra)
    params = wide(s.arrays[0])
    size = swin_v2.size_of(s.config, grid)
    like = options.get("bias_window", size)
    places, cut = coordinates(grid), list(cut_by_hand(grid, size, s.config.shifted))

    def keys_of(t):
        if t < extra:
            return list(range(len(cut) + extra))
        own = [extra + i for i, one in enumerate(cut) if one == cut[t - extra]]
        return [*range(extra), *own]

    def bias_of(h, t, seen):
        found = np.zeros(len(seen))
        for n, other in enumerate(seen):
            if min(other, t) >= extra:
                pair = zip(places[t - extra], places[other - extra], strict=True)
                found[n] = bias_by_hand(params, [a - c for a, c in pair], like)[h]
        return found

    query, key, value = heads(params, x, D)
    qkv = *cosines(query, key, params), value
    expected = attend_by_hand(qkv, keys_of, bias_of)
    close(s.y(x, ctx), out(params, expected))
    if not extra:
        built = s.build()
        table = np.stack(
            [bias_by_hand(params, step, like) for step in steps_of(size)], axis=-1
        )
        reference = functools.partial(swin_v2.reference, windows=built.windows)
        more = {"logit_scale": params["logit_scale"], "bias": table}
        close(jitted(reference)(query, key, value, **more), expected)


def steps_of(size):
    """query - key of each row of `offsets`."""
    return [
        [w - 1 - r for r, w in zip(row, size, strict=True)]
        for row in coordinates([2 * w - 1 for w in size])
    ]


def test_shifted_windows_do_not_see_what_was_wrapped_around():
    s = made(swin_v2, (6,), {"window": 2, "shifted": True})
    wanted = np.zeros((6, 6), bool)
    for part in ([0], [1, 2], [3, 4], [5]):
        wanted[np.ix_(part, part)] = True
    np.testing.assert_array_equal(dependence(s), wanted)
    np.testing.assert_array_equal(s.build().windows.sees(), wanted)


def test_a_window_of_a_whole_axis_is_not_shifted():
    shifted = swin_v2.windows_of(swin_v2.Config(window=4, shifted=True), (4, 8))
    assert shifted.shift == (0, 2)
    whole = swin_v2.windows_of(swin_v2.Config(window=8, shifted=True), (4, 8))
    assert whole == Windows((4, 8), (4, 8))


def test_turned_grids_are_folded_and_unfolded():
    shifted = swin_v2.Shifted((4, 6), (2, 3), shift=(1, 1))
    x = np.random.default_rng(0).normal(size=(2, 24, 3))
    folded = shifted.fold(x)
    np.testing.assert_array_equal(shifted.unfold(folded), x)
    image = x.reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(folded[:, 0, 0], image[:, 1, 1])
    np.testing.assert_array_equal(folded[:, 3, 5], image[:, 0, 0])


def test_the_factor_on_cosines_is_at_most_100():
    scales = jnp.log(jnp.array([10.0, 100.0, 200.0]))
    close(swin_v2.scale_of(scales), [10, 100, 100])
    gradient = jax.grad(lambda a: swin_v2.scale_of(a).sum())(scales)
    assert gradient[2] == 0 and abs(gradient[0] - 10) < 1e-4


def test_scores_read_directions_alone():
    """Widening the query's and key's maps changes nothing, and zero keys are finite."""
    s = made(swin_v2, (2, 4), {"window": 2})
    x, ctx = tokens(s)
    params = s.arrays[0]

    def run(factor):
        scaled = {k: jax.tree.map(lambda a: factor * a, params[k]) for k in names}
        return s.forward((params | scaled, {}), x, ctx)[0]

    names = ("query", "key")
    close(run(30.0), s.y(x, ctx))
    zero = np.asarray(jax.grad(lambda a: jnp.sum(swin_v2.unit(a)))(jnp.zeros((2, D))))
    assert np.isfinite(zero).all() and np.isfinite(run(0.0)).all()


def test_biases_read_offsets_alone_and_serve_other_windows():
    """A model of windows of 3: with windows of 5 its offsets have the same biases."""
    small = made(swin_v2, (3, 9), {"window": 3})
    large = made(swin_v2, (5, 5), {"window": 5, "bias_window": 3})
    params, _ = small.arrays
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, jax.eval_shape(lambda: large.init(0))[0]
    )
    read = swin_v2.coordinates((3, 3), (3, 3)).reshape(5, 5, 2)
    more = swin_v2.coordinates((5, 5), (3, 3)).reshape(9, 9, 2)
    np.testing.assert_array_equal(more[2:7, 2:7], read)
    close(read[0, 0], [math.log(9, 8)] * 2)
    close(read[4, 3], [-math.log(9, 8), -math.log(5, 8)])
    assert swin_v2.coordinates((1,), (1,)).tolist() == [[0.0]]
    # The place one step along both axes is the 5th of one, the 7th of the other.
    few, many = offsets((3, 3)), offsets((5, 5))
    assert few[0, 4] == few[4, 8] and many[0, 6] == many[6, 12]
    np.testing.assert_array_equal(
        more.reshape(-1, 2)[many[0, 6]], read.reshape(-1, 2)[few[0, 4]]
    )


def test_query_and_value_have_biases_and_the_key_has_none():
    s = made(swin_v2, (14, 14), {"window": 7, "bias_dim": 11}, use_bias=True)
    params, _ = jax.eval_shape(lambda: s.init(0))
    have = {name for name in ("query", "key", "value", "out") if "bias" in params[name]}
    assert have == {"query", "value", "out"}
    assert params["bias_in"]["kernel"].shape == (2, 11)
    assert params["bias_out"]["kernel"].shape == (11, H)
    start = s.init(0)[0]
    close(start["logit_scale"], np.full(H, math.log(10)))


def test_hooks_give_weights_of_all_pairs_in_the_grids_order():
    s = made(swin_v2, (2, 4), {"window": 2, "shifted": True})
    x, ctx = tokens(s, hooks=(Hook("a", "weights"),), extra=1)
    y, found = s.forward(s.arrays, x, ctx)
    plain, _ = s.forward(s.arrays, x, ctx.replace(hooks=()))
    close(y, plain)
    sees = np.pad(s.build().windows.sees(), (1, 0), constant_values=True)
    weights = np.asarray(found.records["a"])
    assert (weights[:, :, ~sees] == 0).all() and (weights[:, :, sees] > 0).all()


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"bias_window": 1}, "bias_window must be at least 2"),
        ({"bias_dim": 0}, "bias_dim must be at least 1; got 0"),
    ],
)
def test_settings_outside_their_rule_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        swin_v2.Config(**options)


def test_grids_that_do_not_fit_and_decoding_are_refused():
    with pytest.raises(UserError, match="got window=3 on axis 1 .* one of 1, 2, 4"):
        made(swin_v2, (3, 4), {"window": 3}).build()
    with pytest.raises(UserError, match=r"got bias_window=\(2, 2\) for 1 axes"):
        made(swin_v2, (4,), {"bias_window": (2, 2)}).build()
    with pytest.raises(UserError, match="needs the grid.* got a plain sequence"):
        made(swin_v2, None).build()
    s = made(swin_v2, (2, 4))
    x, ctx = tokens(s)
    with pytest.raises(UserError, match=r"made for one grid; got grid=\(4, 2\)"):
        s.call(s.arrays, x, ctx.replace(grid=(4, 2)))
    for call in (lambda m: m.init_state(2, 8), lambda m: m.step(x, None, ctx)):
        with pytest.raises(UserError, match="swin_v2: has no decode form"):
            call(s.build())
