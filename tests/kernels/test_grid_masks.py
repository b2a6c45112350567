"""Regular patterns: dilated masks, and neighbourhoods against plain Python."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import Coverage, Dilated, Neighborhood, Span


def seen(mask, size):
    """[size, size] of what a mask without operands shows."""
    steps = jnp.arange(size, dtype=jnp.int32)
    zero = jnp.zeros((1, 1, 1, 1), jnp.int32)
    places = {"q": steps[None, None, :, None], "k": steps[None, None, None, :]}
    tile = kernels.Tile(b=zero, h=zero, operands={}, **places)
    return np.asarray(mask.visible(tile))[0, 0]


def along_axis(i, j, length, window, stride, dilation, causal):
    """The published rule of one axis, with Python's integers."""
    if i % dilation != j % dilation:
        return False
    group = i % dilation
    length = length // dilation + (group < length % dilation)
    i, j = i // dilation, j // dilation
    lead = stride - 1 if causal else stride // 2
    leader = min(i // stride * stride + lead, length - 1)
    if causal:
        return max(leader - window + 1, 0) <= j <= i
    start = min(max(leader - window // 2, 0), length - window)
    return start <= j < start + window


def by_rule(mask):
    places = list(itertools.product(*map(range, mask.grid)))
    settings = (mask.grid, mask.window, mask.stride, mask.dilation, mask.causal)
    axes = list(zip(*settings, strict=True))
    return np.array(
        [
            [
                all(
                    along_axis(*ij, *axis) for *ij, axis in zip(q, k, axes, strict=True)
                )
                for k in places
            ]
            for q in places
        ]
    )


GRIDS = {
    "line": Neighborhood((13,), 5),
    "even window": Neighborhood((8,), 4),
    "strided": Neighborhood((13,), 4, stride=3),
    "blocks": Neighborhood((12,), 4, stride=4),
    "dilated": Neighborhood((13,), 3, dilation=4),
    "causal": Neighborhood((13,), 4, causal=True),
    "causal, strided": Neighborhood((11,), 4, stride=2, causal=True),
    "plane": Neighborhood((4, 5), 3),
    "mixed plane": Neighborhood((5, 6), (2, 3), (1, 2), (1, 2), (True, False)),
    "film": Neighborhood((3, 4, 5), (2, 3, 3), causal=(True, False, False)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_neighbourhood_is_the_rule(name):
    mask = GRIDS[name]
    np.testing.assert_array_equal(seen(mask, int(np.prod(mask.grid))), by_rule(mask))


def test_neighbourhood_has_the_published_windows():
    def starts(*args, **options):
        return list(seen(Neighborhood((8,), *args, **options), 8).argmax(1))

    assert starts(3) == [0, 0, 1, 2, 3, 4, 5, 5]
    assert starts(4) == [0, 0, 0, 1, 2, 3, 4, 4]
    assert starts(4, stride=2) == [0, 0, 1, 1, 3, 3, 4, 4]
    assert starts(4, stride=4) == [0, 0, 0, 0, 4, 4, 4, 4]
    assert starts(4, stride=2, causal=True) == [0, 0, 0, 0, 2, 2, 4, 4]
    columns = seen(Neighborhood((8,), 3), 8).sum(0)
    assert list(columns) == [2, 3, 4, 3, 3, 4, 3, 2]


@pytest.mark.parametrize("name", [*GRIDS, "every third"])
def test_coverage_never_claims_what_is_not_so(name):
    mask = GRIDS.get(name, Dilated(3))
    size = 13 if name == "every third" else int(np.prod(mask.grid))
    visible = seen(mask, size)
    found = set()
    for q, k in itertools.product(range(0, size, 2), range(0, size, 3)):
        for q_size, k_size in ((1, 1), (1, 4), (4, 2), (7, 7)):
            part = visible[q : q + q_size, k : k + k_size]
            q_end, k_end = min(q + q_size, size) - 1, min(k + k_size, size) - 1
            claim = mask.coverage(Span(q, q_end, k, k_end))
            found.add(claim)
            assert claim != Coverage.EMPTY or not part.any()
            assert claim != Coverage.FULL or part.all()
    assert Coverage.EMPTY in found


def test_tiles_far_from_the_window_are_skipped():
    """16 x 16 places, a window of 3 x 3, tiles of 32 tokens: two rows each."""
    mask = Neighborhood((16, 16), 3)
    spans = [(i, i + 31) for i in range(0, 256, 32)]
    claims = np.array([[mask.coverage(Span(*q, *k)) for k in spans] for q in spans])
    near = abs(np.arange(8)[:, None] - np.arange(8)) <= 1
    np.testing.assert_array_equal(claims == Coverage.EMPTY, ~near)
    whole = Neighborhood((16, 16), 16)
    assert whole.coverage(Span(0, 255, 0, 255)) == Coverage.FULL


def test_settings_outside_their_rule_are_refused():
    with pytest.raises(ValueError, match="1 to 3 axes"):
        Neighborhood((2, 2, 2, 2), 2)
    with pytest.raises(ValueError, match="stride must have one value for each axis"):
        Neighborhood((4, 4), 2, stride=(1, 1, 1))
    with pytest.raises(ValueError, match="1 <= stride <= window"):
        Neighborhood((4,), 2, stride=3)
    with pytest.raises(ValueError, match="window . dilation <= length"):
        Neighborhood((4,), 3, dilation=2)
    with pytest.raises(
        ValueError, match="stride must be an integer >= 1; got stride=0"
    ):
        Dilated(0)


def test_grid_must_hold_the_tokens():
    q = jnp.ones((1, 6, 1, 8))
    mask = kernels.Causal() & Neighborhood((2, 4), 2)
    with pytest.raises(ValueError, match="number of places of the grid.*T=6, S=6"):
        kernels.attention(q, q, q, kernels.AttentionSpec(mask=mask))
