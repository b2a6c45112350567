"""Which layers of a hybrid keep the standard mixer."""

import pytest

from attnjax.core.errors import UserError
from attnjax.models import hybrids


def kept(name, depth=24):
    """Layers, counted from 1, that keep the standard mixer."""
    names = hybrids.hybrid(name, depth, simple="simple")
    return {i for i, layer in enumerate(names, start=1) if layer == "attention"}


def test_the_nine_schedules_of_24_layers_are_those_of_the_paper():
    assert kept("even") == set(range(2, 25, 2)) and len(kept("even")) == 12
    assert kept("odd") == set(range(1, 24, 2))
    assert kept("top") == set(range(1, 13))
    assert kept("middle") == {*range(1, 7), *range(19, 25)}
    assert kept("bottom") == set(range(13, 25))
    assert kept("quarter") == {4, 8, 12, 16, 20, 24}
    assert kept("first") == {1} and kept("last") == {24}
    assert kept("bilateral") == {1, 24}
    assert kept("uniform") == set()


def test_skipping_the_simple_layers_keeps_the_standard_ones():
    names = hybrids.hybrid("even", 6, simple="simple", standard="full")
    assert names == ("simple", "full") * 3
    assert hybrids.skipped(names, simple="simple") == (1, 3, 5)


def test_an_unknown_schedule_lists_the_nearest():
    with pytest.raises(UserError, match="unknown schedule 'evne'.*even"):
        hybrids.hybrid("evne", 4, simple="simple")
