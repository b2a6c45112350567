"""Where layers lie in a stack, and moving them to another layout."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnjax.models import schedule
from attnjax.models.layout import (
    Layout,
    absolute_names,
    by_layer,
    named,
    relayout,
    stacked,
)


def layout_of(text):
    return Layout.of(schedule.parse(text))


def arrays_of(layout):
    """A stacked tree in which every number says its layer."""

    def one(layer):
        value = np.full((2, 3), layer, np.float32)
        return {"mixer": {"kernel": value}, "norm": {"scale": value[0]}}

    return stacked({i: one(i) for i in range(len(layout.names))}, layout)


def test_every_layer_has_a_place():
    layout = layout_of("(a*2 b)*2 c")
    assert layout.groups == ((("a", "a", "b"), 2), (("c",), 1))
    assert layout.places == [
        (0, 0, 0, "a"),
        (0, 1, 0, "a"),
        (0, 2, 0, "b"),
        (0, 0, 1, "a"),
        (0, 1, 1, "a"),
        (0, 2, 1, "b"),
        (1, 0, 0, "c"),
    ]
    assert layout.layers_of(0, 1) == [1, 4]
    assert layout.layers_of(1, 0) == [6]


def test_the_table_survives_json():
    layout = layout_of("(a*2 b)*2 c")
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_layers_come_back_from_the_stack(names):
    layout = Layout.of(names)
    layers = by_layer(arrays_of(layout), layout)
    assert sorted(layers) == list(range(len(names)))
    for layer, tree in layers.items():
        assert tree["mixer"]["kernel"].shape == (2, 3)
        assert np.all(tree["mixer"]["kernel"] == layer)
        assert np.all(tree["norm"]["scale"] == layer)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("ab"), min_size=1, max_size=10),
    st.randoms(use_true_random=False),
)
def test_a_move_to_other_groups_and_back_changes_nothing(names, random):
    here = Layout.of(names)
    there = Layout.of([random.choice("ab") for _ in names])
    stack = arrays_of(here)
    moved = relayout(stack, here, there)
    assert np.all(named(moved, there)["layers/000/mixer/kernel"] == 0)
    back = relayout(moved, there, here)
    before, after = named(stack, here), named(back, here)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])


def test_equal_groups_are_not_copied():
    layout = layout_of("a*3")
    stack = arrays_of(layout)
    assert relayout(stack, layout, layout_of("a*3")) is stack


def test_a_shorter_model_takes_the_layers_it_names():
    source, target = layout_of("a*4 b"), layout_of("a b")
    moved = relayout(arrays_of(source), source, target, keep=[2, 4])
    names = named(moved, target)
    assert np.all(names["layers/000/mixer/kernel"] == 2)
    assert np.all(names["layers/001/mixer/kernel"] == 4)


@pytest.mark.parametrize("keep", [None, [0, 1], [0, 1, 9], [0, 1, -1]])
def test_a_target_layer_without_a_source_is_refused(keep):
    source, target = layout_of("a*2"), layout_of("a*3")
    with pytest.raises(ValueError, match="every target layer needs a source layer"):
        relayout(arrays_of(source), source, target, keep=keep)


def test_layers_of_other_structure_do_not_stack():
    layers = {0: {"x": np.zeros(2)}, 1: {"y": np.zeros(2)}}
    with pytest.raises(ValueError, match="key"):
        stacked(layers, layout_of("a*2"))


def test_names_are_absolute():
    layout = layout_of("(a b)*2")
    assert absolute_names(("token_embedding", "table"), layout) == [
        "token_embedding/table"
    ]
    assert absolute_names(("layers", "group_0", "sub_1", "mlp", "up"), layout) == [
        "layers/001/mlp/up",
        "layers/003/mlp/up",
    ]
    assert set(named(arrays_of(layout), layout)) == {
        f"layers/{i:03d}/{rest}"
        for i in range(4)
        for rest in ("mixer/kernel", "norm/scale")
    }


def test_no_group_reaches_over_the_end_of_a_stage():
    layout = Layout.of_stages([("a", "a"), ("a", "b"), ("a", "b")])
    assert layout.names == ("a", "a", "a", "b", "a", "b")
    assert [pattern for pattern, _ in layout.groups] == [
        *(("a",), ("a",), ("b",), ("a",), ("b",))
    ]
    assert layout.layers_of(3, 0) == [4]
    assert Layout.from_json(layout.to_json()) == layout
