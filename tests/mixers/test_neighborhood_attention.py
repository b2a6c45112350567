"""Facts of neighbourhood attention (arXiv 2403.04690 and 2504.16922)."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.conformance import samples
from attnjax.conformance.subject import jitted, subject
from attnjax.core.errors import UserError
from attnjax.mixers import attention
from attnjax.mixers import neighborhood_attention as na
from attnjax.mixers.slots import neighborhoods

H, K, D = 6, 3, 6
PLAIN = {"rope": None}


def layer(grid, *, dims=PLAIN, **options):
    """A layer made for a grid, or for sequences."""
    return subject(na, {"stride": 1, **options}, {"grid": grid, **dims})


def full(dims=PLAIN, **options):
    return subject(attention, options, {"head_dim": D, **dims})


def tokens(s, length, **changes):
    return samples.sample(s, None, length=length, **changes)


def on_grid(s, grid, **changes):
    extra = changes.get("extra_tokens", 0)
    return tokens(s, extra + math.prod(grid), grid=grid, causal=False, **changes)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


# ---- an oracle of its own: lists of keys, one softmax at a time, float64


def keys_of(i, length, window, stride, dilation, causal, *, endless=False):
    """The keys of query i along one axis, by the centre of its window."""
    own = list(range(i % dilation, length, dilation))
    place, left = own.index(i), window // 2
    right = left + window % 2 - 1
    group = range(place // stride * stride, (place // stride + 1) * stride)
    group = group if endless else [p for p in group if p < len(own)]
    if causal:
        return own[max(group[-1] - window + 1, 0) : place + 1]
    middle = min(place // stride * stride + stride // 2, len(own) - 1)
    centre = min(max(middle, left), len(own) - 1 - right)
    return own[centre - left : centre + right + 1]


def by_hand(query, key, value, grid, axes, bias=None):
    """[B, T, H, D] float64 of heads [B, T, H or K, D] in row-major order."""
    places = list(itertools.product(*map(range, grid)))
    out = np.zeros(query.shape)
    rows, heads = range(query.shape[0]), range(query.shape[2])
    for t, place in enumerate(places):
        sides = zip(place, grid, *axes, strict=True)
        seen = list(itertools.product(*(keys_of(*side) for side in sides)))
        index = [places.index(one) for one in seen]
        for b, h in itertools.product(rows, heads):
            shared = h // (query.shape[2] // key.shape[2])
            scores = key[b, index, shared] @ query[b, t, h] / query.shape[3] ** 0.5
            if bias is not None:
                steps = (np.array(seen) - place) // np.array(axes.dilation)
                at = steps + np.array(axes.window) - 1
                scores = scores + bias[(h, *at.T)]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ value[b, index, shared]
    return out


def projected(s, x):
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), s.arrays[0])
    heads = (
        (x @ params[name]["kernel"]).reshape(*x.shape[:2], -1, D)
        for name in ("query", "key", "value")
    )
    return *heads, params


GRIDS = {
    "line": ((11,), {"window": 4, "stride": 3, "dilation": 2}),
    "plane": (
        (5, 4),
        {"window": (4, 3), "stride": (3, 1), "causal": (True, False)},
    ),
    "film": (
        (4, 3, 5),
        {"window": (2, 3, 2), "stride": (1, 2, 1), "dilation": (1, 1, 2)},
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_layer_and_reference_are_the_definition_on_a(name):
    grid, options = GRIDS[name]
    s = layer(grid, relative_bias=True, **options)
    x, ctx = on_grid(s, grid)
    query, key, value, params = projected(s, x)
    axes = na.axes_of(s.config, len(grid))
    bias = params["neighborhood_bias"].reshape(H, *(2 * w - 1 for w in axes.window))
    expected = by_hand(query, key, value, grid, axes, bias)
    heads = na.reference(query, key, value, grid=grid, axes=axes, bias=jnp.array(bias))
    close(heads, expected)
    close(s.y(x, ctx), expected.reshape(*x.shape[:2], -1) @ params["out"]["kernel"])


def test_causal_sequence_is_the_definition_without_an_end():
    options = {"window": 4, "stride": 3, "dilation": 2, "causal": True}
    s = layer(None, relative_bias=True, **options)
    x, ctx = tokens(s, 11)
    query, key, value, params = projected(s, x)
    bias, axes = params["neighborhood_bias"], na.axes_of(s.config, 1)
    # On a line of 12 places each class holds two whole groups of three.
    query, key, value = (
        np.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (query, key, value)
    )
    expected = by_hand(query, key, value, (12,), axes, bias)[:, :11]
    close(s.y(x, ctx), expected.reshape(2, 11, -1) @ params["out"]["kernel"])


# ---- which key is seen


def starts(*args, **options):
    return list(na.seen_along(8, *args, **options).argmax(1))


def test_windows_start_where_the_published_tables_say():
    assert starts(3) == [0, 0, 1, 2, 3, 4, 5, 5]
    assert starts(4) == [0, 0, 0, 1, 2, 3, 4, 4]
    assert starts(4, 2) == [0, 0, 1, 1, 3, 3, 4, 4]
    assert starts(4, 4) == [0, 0, 0, 0, 4, 4, 4, 4]
    assert starts(4, 2, causal=True) == [0, 0, 0, 0, 2, 2, 4, 4]


def test_the_mask_is_not_symmetric():
    seen = na.seen_along(8, 3)
    assert list(seen.sum(0)) == [2, 3, 4, 3, 3, 4, 3, 2]
    assert (seen != seen.T).any()


def line_settings():
    for length, w, d in itertools.product((7, 8, 12), range(2, 8), (1, 2, 3)):
        if w * d <= length:
            yield from ((length, w, s, d) for s in range(1, w + 1))


def test_the_reference_mask_is_the_oracle_and_the_kernel_mask():
    place = jnp.arange(12, dtype=jnp.int32)
    for (length, w, s, d), causal in itertools.product(line_settings(), (False, True)):
        seen = na.seen_along(length, w, s, d, causal)
        for i in range(length):
            expected = keys_of(i, length, w, s, d, causal)
            assert list(np.flatnonzero(seen[i])) == expected
    for options in ((12, 5, 3, 2), (7, 4, 4, 1)):
        tile = kernels.Tile(
            b=None,
            h=None,
            q=place[: options[0], None],
            k=place[None, : options[0]],
            operands={},
        )
        mask = kernels.Neighborhood((options[0],), *options[1:])
        np.testing.assert_array_equal(mask.visible(tile), na.seen_along(*options))


def test_each_query_sees_its_whole_window_and_itself():
    for length, w, s, d in line_settings():
        seen = na.seen_along(length, w, s, d)
        assert (seen.sum(1) == w).all() and seen.diagonal().all()
    axes = na.Axes((3, 2, 2), (2, 2, 1), (1, 2, 1), (False,) * 3)
    seen = na.seen_on((3, 5, 3), axes)
    assert (seen.sum(1) == 12).all() and seen.diagonal().all()


def test_a_stride_of_the_window_gives_blocks():
    for length, w in ((8, 4), (12, 3), (12, 6)):
        blocks = np.arange(length) // w
        seen = na.seen_along(length, w, w)
        np.testing.assert_array_equal(seen, blocks[:, None] == blocks)


def test_the_last_part_of_a_block_is_moved_back_to_a_whole_window():
    seen = na.seen_along(10, 4, 4)
    assert [list(np.flatnonzero(row)) for row in seen[8:]] == [[6, 7, 8, 9]] * 2


def test_early_queries_of_a_causal_group_see_fewer_keys():
    seen = na.seen_along(12, 4, 3, causal=True)
    leader = np.arange(12) // 3 * 3 + 2
    counts = np.minimum(np.arange(12) + 1, 4 - (leader - np.arange(12)))
    np.testing.assert_array_equal(seen.sum(1), counts)


def test_dilation_classes_have_their_own_lengths():
    """Ten places, every third: 4, 3 and 3 of them."""
    seen = na.seen_along(10, 2, dilation=3)
    for own, count in enumerate((4, 3, 3)):
        part = seen[own::3, own::3]
        assert part.shape == (count, count)
        np.testing.assert_array_equal(part, na.seen_along(count, 2))
    assert seen.sum() == 20


# ---- what the layer is equal to


def test_dilation_is_interleaving():
    s, one = layer((12,), window=3, dilation=4), layer((3,), window=3)
    x, ctx = on_grid(s, (12,))
    parts, inner = x.reshape(2, 3, 4, -1), on_grid(one, (3,), batch=8)[1]
    apart = one.y(parts.swapaxes(1, 2).reshape(8, 3, -1), inner)
    close(s.y(x, ctx), apart.reshape(2, 4, 3, -1).swapaxes(1, 2).reshape(x.shape))


@pytest.mark.parametrize("stride", [1, (3, 4)])
def test_a_window_of_the_whole_grid_is_full_attention(stride):
    s = layer((3, 4), window=(3, 4), stride=stride)
    x, ctx = on_grid(s, (3, 4))
    close(s.y(x, ctx), full().y(x, ctx))


def test_a_causal_window_of_the_whole_length_is_causal_attention():
    for stride in (1, 2, 5, 7):
        seen = na.seen_along(7, 7, stride, causal=True)
        np.testing.assert_array_equal(seen, np.tri(7, dtype=bool))


def test_a_causal_window_on_a_sequence_is_a_sliding_window():
    s = layer(None, window=4, causal=True)
    x, ctx = tokens(s, 12)
    close(s.y(x, ctx), full(window=4).y(x, ctx))


def test_the_last_causal_group_of_an_axis_sees_more_than_on_a_longer_one():
    """Query 5, window and stride 4: from 2 on six places, from 4 on eight."""
    for length, first in ((6, 2), (8, 4)):
        assert na.seen_along(length, 4, 4, causal=True)[5].argmax() == first
        endless = na.seen_along(length, 4, 4, causal=True, endless=True)
        assert endless[5].argmax() == 4


def test_along_a_sequence_what_a_token_sees_does_not_change_with_its_length():
    s = layer(None, window=4, stride=4, causal=True)
    x, ctx = tokens(s, 8)
    short = ctx.replace(
        positions=ctx.positions[:, :6], embeddings=ctx.embeddings[:, :6]
    )
    close(s.y(x[:, :6], short), s.y(x, ctx)[:, :6])


# ---- tokens before the grid


def test_additional_keys_merged_by_log_sums_are_one_softmax():
    """And the extra tokens themselves see everything."""
    grid, extra = (3, 4), 2
    rng = np.random.default_rng(0)
    shape = (2, extra + 12, 2, 4)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    settings = ((3, 2), (2, 1), (1, 1), (False, False))

    def spec(mask):
        return kernels.AttentionSpec(mask=mask, return_lse=True)

    @jitted
    def both(q, k, v):
        own, grid_kv = q[:, extra:], (k[:, extra:], v[:, extra:])
        mask = neighborhoods.mask_of(grid, *settings)
        near, lse = kernels.attention(own, *grid_kv, spec(mask))
        more, more_lse = kernels.attention(
            own, k[:, :extra], v[:, :extra], spec(kernels.Full())
        )
        share = jax.nn.sigmoid(more_lse - lse)[..., None]
        merged = near - share * (near - more)
        whole = neighborhoods.mask_of(grid, *settings, extra=extra)
        return merged, kernels.attention(q, k, v, spec(whole))

    merged, (whole, _) = both(q, k, v)
    close(whole[:, extra:], merged, atol=1e-6)
    axes = na.Axes(*settings)
    close(whole, na.reference(q, k, v, grid=grid, axes=axes, extra=extra), atol=1e-6)


def test_devices_that_share_the_tokens_give_what_one_gives():
    """Two of them around a ring, behind extra tokens, with biases."""
    grid, extra, window, dilation = (3, 4), 2, (3, 2), (1, 2)
    settings = (window, (2, 1), dilation, (False, False))
    spec = kernels.AttentionSpec(
        mask=neighborhoods.mask_of(grid, *settings, extra=extra),
        score=(neighborhoods.NeighborhoodBias(grid, window, dilation, extra),),
    )
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(2, extra + 12, 2, 4)) for _ in range(3)]
    arrays = [jnp.asarray(a, jnp.float32) for a in (*arrays, rng.normal(size=(2, 15)))]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("sequence",))

    def shared(q, k, v, bias):
        cuts = kernels.Cuts(batch=(), heads=None, sequence="sequence")
        given = {neighborhoods.BIAS: bias}
        return kernels.sharded_attention(q, k, v, spec, given, mesh=mesh, cuts=cuts)

    *qkv, bias = arrays
    seen = [np.asarray(a, np.float64) for a in qkv]
    axes, table = na.Axes(*settings), bias.reshape(2, 5, 3)
    own = na.reference(*seen, grid=grid, axes=axes, extra=extra, bias=table)
    close(jitted(shared)(*arrays), own)


def test_coverage_of_a_mask_never_claims_what_is_not_so():
    places = jnp.arange(14, dtype=jnp.int32)
    tile = kernels.Tile(b=None, h=None, q=places[:, None], k=places[None], operands={})
    masks = [
        neighborhoods.mask_of((3, 4), (3, 2), (2, 1), (1, 2), (False,) * 2, extra=2),
        neighborhoods.CausalNeighborhood(4),
        neighborhoods.CausalNeighborhood(4, 3),
        neighborhoods.CausalNeighborhood(3, 2, 2),
    ]
    for mask in masks:
        visible, found = np.asarray(mask.visible(tile)), set()
        for q, k, size in itertools.product(range(14), range(14), (1, 2, 5)):
            q_last, k_last = min(q + size, 14) - 1, min(k + 4, 14) - 1
            part = visible[q : q_last + 1, k : k_last + 1]
            claim = mask.coverage(kernels.Span(q, q_last, k, k_last))
            found.add(claim)
            assert claim != kernels.Coverage.EMPTY or not part.any()
            assert claim != kernels.Coverage.FULL or part.all()
        assert kernels.Coverage.EMPTY in found


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window >= 2"),
        ({"window": 3, "stride": 4}, "stride <= window.*got window=3, stride=4"),
        ({"dilation": 0}, "dilation >= 1"),
        ({"window": (3, 3), "stride": (1, 1, 1)}, "one for each of 1 to 3 axes"),
        ({"window": (3, 3, 3, 3)}, "one for each of 1 to 3 axes"),
        ({"window": (3, 2), "stride": 3}, "1 <= stride <= window"),
    ],
)
def test_settings_outside_their_rule_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        na.Config(**options)


def test_a_window_larger_than_the_grid_is_refused_when_the_layer_is_built():
    message = r"got window=5, dilation=1 on axis 1 of grid=\(6, 4\). Use .* at most 4"
    with pytest.raises(UserError, match=message):
        layer((6, 4), window=5).build()
    with pytest.raises(UserError, match=r"window=3, dilation=2 on axis 0 .* most 2"):
        layer((5,), window=3, dilation=2).build()
    with pytest.raises(UserError, match=r"window=\(3, 3\) for 1 axes"):
        layer((9,), window=(3, 3)).build()


def test_a_plain_sequence_is_refused_unless_the_layer_is_causal():
    with pytest.raises(UserError, match="plain sequence with causal=False"):
        layer(None, window=3).build()
    dims = {"rope": None, "prefix_tokens": 2}
    with pytest.raises(UserError, match="config.model.prefix of 2 tokens"):
        layer(None, dims=dims, causal=True).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (4, 3)}, r"made for one grid; got grid=\(4, 3\), made for \(3, 4\)"),
        ({"extra_tokens": 1}, r"got T=12, grid=\(3, 4\), extra_tokens=1"),
        ({"causal": True}, "is not causal; got causal=True"),
    ],
)
def test_requests_off_the_grid_are_refused(changes, message):
    s = layer((3, 4), window=2)
    x, ctx = on_grid(s, (3, 4))
    with pytest.raises(UserError, match=message):
        s.call(s.arrays, x, ctx.replace(**changes))


def test_a_causal_layer_on_a_grid_takes_no_documents_and_does_not_decode():
    s = layer((3, 4), window=2, causal=True)
    x, ctx = tokens(s, 12, grid=(3, 4))
    ids = ctx.replace(segment_ids=np.ones((2, 12), np.int32))
    with pytest.raises(UserError, match="got segment_ids on grid="):
        s.call(s.arrays, x, ids)
    with pytest.raises(UserError, match="no decode form on a grid"):
        s.build().init_state(2, 12)
