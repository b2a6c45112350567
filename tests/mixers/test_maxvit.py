"""Facts of multi-axis attention (arXiv 2204.01697)."""

import functools

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

from attnjax.conformance.subject import jitted
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention, maxvit
from attnjax.mixers.slots.windows import Windows, offsets

H, D = 6, 6

CASES = {
    "line": ((6,), {"parts": "grid", "window": 3}, 0),
    "plane": ((4, 6), {"parts": "grid", "window": 1, "grid_size": (2, 3)}, 2),
    "film": ((2, 4, 3), {"parts": "block", "window": (2, 2, 3)}, 0),
}


def windows_by_hand(grid, size, part):
    """The window and the place in it of each token, tuples, from the paper's words."""
    for at in coordinates(grid):
        if part == "block":
            yield (
                [i // w for i, w in zip(at, size, strict=True)],
                [i % w for i, w in zip(at, size, strict=True)],
            )
        else:
            steps = [n // w for n, w in zip(grid, size, strict=True)]
            yield (
                [i % s for i, s in zip(at, steps, strict=True)],
                [i // s for i, s in zip(at, steps, strict=True)],
            )


@pytest.mark.parametrize("name", CASES)
def test_layer_and_reference_are_the_definition_on_a(name):
    grid, options, extra = CASES[name]
    part = options["parts"]
    s = made(maxvit, grid, options, use_bias=True, num_kv_heads=3)
    x, ctx = tokens(s, extra=extra)
    params = wide(s.arrays[0])[part]
    size = maxvit.size_of(s.config, part, grid)
    table = params["window_bias"].reshape(H, *(2 * w - 1 for w in size))
    cut = list(windows_by_hand(grid, size, part))

    def keys_of(t):
        if t < extra:
            return list(range(len(cut) + extra))
        own = cut[t - extra][0]
        same = [extra + s for s, (other, _) in enumerate(cut) if other == own]
        return [*range(extra), *same]

    def bias_of(h, t, seen):
        found = np.zeros(len(seen))
        for n, s in enumerate(seen):
            if min(s, t) >= extra:
                query, key = cut[t - extra][1], cut[s - extra][1]
                step = [c - a + w - 1 for a, c, w in zip(query, key, size, strict=True)]
                found[n] = table[(h, *step)]
        return found

    qkv = heads(params, x, D)
    expected = by_hand(qkv, keys_of, bias_of)
    close(s.y(x, ctx), out(params, expected))
    if not extra:
        cuts = Windows(grid, size, maxvit.KINDS[part])
        bias = jnp.asarray(params["window_bias"])
        reference = functools.partial(maxvit.reference, windows=cuts)
        close(jitted(reference)(*qkv, bias=bias), expected)


def plain(grid, **dims):
    return made(attention, grid, head_dim=D, num_kv_heads=H, **dims)


def of_part(name, **options):
    return {"parts": name, "relative_bias": False, **options}


@pytest.mark.parametrize("part", ["block", "grid"])
def test_a_window_of_the_whole_grid_is_full_attention(part):
    s = made(maxvit, (3, 4), of_part(part, window=(3, 4)))
    x, ctx = tokens(s)
    full = plain((3, 4)).forward((s.arrays[0][part], {}), x, ctx)[0]
    close(s.y(x, ctx), full)


def test_parts_run_one_behind_the_other_or_side_by_side():
    """Two full attentions, the second on the normed sum of x and the first."""
    grid, full = (3, 4), plain((3, 4))
    one = {"relative_bias": False, "window": grid}
    both = {
        parts: made(maxvit, grid, {"parts": parts, **one})
        for parts in ("block_grid", "grid_block", "parallel")
    }
    x, ctx = tokens(full)
    params, buffers = both["block_grid"].arrays

    def run(s):
        own = {k: params[k] for k in s.arrays[0]}
        return np.asarray(s.forward((own, buffers), x, ctx)[0])

    def part(name, x):
        return np.asarray(full.forward((params[name], {}), x, ctx)[0])

    def normed(x):
        scale = np.asarray(params["between"]["scale"])
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    for parts, (first, second) in list(maxvit.PARTS.items())[:2]:
        y = part(first, x)
        close(run(both[parts]), y + part(second, normed(x + y)), atol=1e-4)
    close(run(both["parallel"]), part("block", x) + part("grid", x), atol=1e-4)


def test_after_blocks_and_lattices_every_output_depends_on_every_input():
    grid = (4,)
    assert dependence(made(maxvit, grid, of_part("block_grid", window=2))).all()
    for part, kind in maxvit.KINDS.items():
        alone = dependence(made(maxvit, grid, of_part(part, window=2)))
        np.testing.assert_array_equal(alone, Windows(grid, (2,), kind).sees())


def test_permuting_whole_blocks_permutes_the_output():
    s = made(maxvit, (4, 6), {"parts": "block", "window": (2, 3)})
    x, ctx = tokens(s)
    cut, order = Windows((4, 6), (2, 3)), [2, 0, 3, 1]

    def permuted(a):
        return np.asarray(cut.unfold(cut.fold(a)[:, order]))

    close(s.y(permuted(x), ctx), permuted(s.y(x, ctx)))


def test_the_table_has_an_entry_for_each_head_and_offset():
    s = made(maxvit, (14, 14), {"parts": "grid", "window": 7})
    params, _ = jax.eval_shape(lambda: s.init(0))
    assert params["grid"]["window_bias"].shape == (H, 169)
    rows = offsets((7, 7))
    assert sorted(set(rows.reshape(-1))) == list(range(169))
    assert rows[0, 0] == 6 * 13 + 6 and rows[0, 1] == rows[0, 0] + 1


def test_without_scores_a_token_gets_the_mean_of_its_window():
    s = made(maxvit, (4, 6), {"parts": "grid", "window": (2, 3)})
    x, ctx = tokens(s)
    params = dict(s.arrays[0]["grid"])
    zero = jax.tree.map(
        jnp.zeros_like, {k: params[k] for k in ("query", "window_bias")}
    )
    y, _ = s.forward(({"grid": params | zero}, {}), x, ctx)
    value = heads(wide(params), x, D)[2].reshape(2, 24, -1)
    cut = Windows((4, 6), (2, 3), "lattice")
    folded = cut.fold(value)
    mean = np.broadcast_to(folded.mean(2, keepdims=True), folded.shape)
    close(y, cut.unfold(mean) @ wide(params)["out"]["kernel"])


def test_a_table_of_another_window_is_resized():
    """A linear table stays linear; from 2 * 2 - 1 to 2 * 3 - 1 entries."""
    table = jnp.arange(3.0)[None]
    found = maxvit.resized(table, (2,), (3,))
    close(found[0, 1:-1], [0.4, 1.0, 1.6])
    assert maxvit.resized(table, (2,), (2,)) is table
    s = made(maxvit, (6,), {"parts": "block", "window": 3, "bias_window": 2})
    assert s.arrays[0]["block"]["window_bias"].shape == (H, 3)


def test_hooks_name_their_part_where_there_are_two():
    s = made(maxvit, (2, 4))
    hooks = (Hook("a", "block.heads"), Hook("b", "grid.heads"), Hook("c", "grid.query"))
    x, ctx = tokens(s, hooks=hooks)
    _, found = s.forward(s.arrays, x, ctx)
    assert set(found.records) == {"a", "b", "c"}
    assert np.abs(found.records["a"] - found.records["b"]).max() > 1e-3
    with pytest.raises(UserError, match="has no hook 'heads'"):
        s.call(s.arrays, x, ctx.replace(hooks=(Hook("a", "heads"),)))


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"grid_size": (2, 2, 2, 2)}, "one for each of 1 to 3 axes"),
        ({"relative_bias": False, "bias_window": 2}, "bias_window is that of relative"),
        ({"parts": "block", "grid_size": 2}, "grid_size is that of parts with a grid"),
    ],
)
def test_settings_outside_their_rule_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        maxvit.Config(**options)


def test_grids_that_windows_do_not_divide_are_refused():
    with pytest.raises(UserError, match="got window=7 on axis 0 .* one of 1, 2, 4"):
        made(maxvit, (4, 4), {"window": 7}).build()
    with pytest.raises(UserError, match="got grid_size=3 on axis 1"):
        made(maxvit, (6, 4), {"grid_size": 3}).build()
    with pytest.raises(UserError, match=r"got window=\(2, 2\) for 1 axes"):
        made(maxvit, (4,), {"window": (2, 2)}).build()
    with pytest.raises(UserError, match="needs the grid.* got a plain sequence"):
        made(maxvit, None).build()


def test_requests_off_the_grid_and_decoding_are_refused():
    s = made(maxvit, (2, 4))
    x, ctx = tokens(s)
    with pytest.raises(UserError, match=r"made for one grid; got grid=\(4, 2\)"):
        s.call(s.arrays, x, ctx.replace(grid=(4, 2)))
    with pytest.raises(UserError, match="got T=8, .* extra_tokens=1"):
        s.call(s.arrays, x, ctx.replace(extra_tokens=1))
    for call in (lambda m: m.init_state(2, 8), lambda m: m.step(x, None, ctx)):
        with pytest.raises(UserError, match="maxvit: has no decode form"):
            call(s.build())


def test_output_options_that_change_scores_are_refused():
    options = {"output": ({"type": "attention_sink_survey"},)}
    with pytest.raises(UserError, match="maxvit: rows .* type='attention_sink_s"):
        made(maxvit, (2, 4), options).build()
