"""Starting from another run's parameters, by name."""

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.models.layout import Layout
from attnjax.training import transfer

THREE, TWO = Layout.of(("a", "a", "a")), Layout.of(("a", "a"))


def params(layout: Layout, *, start: float = 0.0, width: int = 2) -> dict:
    depth = len(layout.names)
    values = start + np.arange(depth * width, dtype=np.float32).reshape(depth, width)
    return {
        "head": {"kernel": np.full((2, 3), start)},
        "layers": {"group_0": {"sub_0": {"mlp": {"up": values}}}},
    }


def up(tree) -> np.ndarray:
    return tree["layers"]["group_0"]["sub_0"]["mlp"]["up"]


def test_names_are_those_of_absolute_layers():
    names = transfer.all_named(params(TWO), TWO)
    assert sorted(names) == ["head/kernel", "layers/000/mlp/up", "layers/001/mlp/up"]


def test_equal_models_are_taken_over_whole():
    source = params(TWO, start=5.0)
    got, report = transfer.transfer(params(TWO), TWO, transfer.all_named(source, TWO))
    np.testing.assert_array_equal(up(got), up(source))
    assert (len(report.matched), report.fresh, report.unused) == (3, (), ())


def test_layers_can_be_chosen():
    source = transfer.all_named(params(THREE, start=5.0), THREE)
    got, report = transfer.transfer(params(TWO), TWO, source, layers=(2, 0))
    np.testing.assert_array_equal(up(got), up(params(THREE, start=5.0))[[2, 0]])
    assert report.unused == ("layers/001/mlp/up",)


def test_what_the_other_run_lacks_stays_as_it_was():
    source = transfer.all_named(params(TWO, start=5.0), TWO)
    got, report = transfer.transfer(params(THREE), THREE, source)
    np.testing.assert_array_equal(up(got)[2], up(params(THREE))[2])
    assert report.fresh == ("layers/002/mlp/up",)
    assert "newly initialised (1): layers/002/mlp/up" in "\n".join(report.lines())


def test_other_shapes_are_shown():
    source = transfer.all_named(params(TWO, width=4), TWO)
    with pytest.raises(UserError, match=r"- layers/000/mlp/up \(4,\)\n\+ .* \(2,\)"):
        transfer.transfer(params(TWO), TWO, source)


def test_a_run_with_nothing_in_common_is_refused():
    with pytest.raises(UserError, match=r"has no parameter of this model; got x, y"):
        transfer.transfer(params(TWO), TWO, {"x": np.ones(1), "y": np.ones(1)})


def test_number_of_chosen_layers_must_fit():
    source = transfer.all_named(params(TWO), TWO)
    with pytest.raises(UserError, match=r"one layer for each of 2; got 1 \(\[0\]\)"):
        transfer.transfer(params(TWO), TWO, source, layers=(0,))
