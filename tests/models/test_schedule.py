"""Layer schedules: what parses, what does not and where, and how groups are cut."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnjax.core.errors import UserError
from attnjax.models import schedule

NAMES = st.sampled_from(["a", "b", "window_16"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", "a"),
        ("a b", "a b"),
        ("a*3", "a a a"),
        ("a * 3", "a a a"),
        ("a*2b", "a a b"),
        ("(a)(b)", "a b"),
        ("(a*2 b)*2", "a a b a a b"),
        ("((a b)*2 c)*2 d", "a b a b c a b a b c d"),
        (" a\n  b ", "a b"),
        ("my-mixer.v2 other/file.py*2", "my-mixer.v2 other/file.py other/file.py"),
    ],
)
def test_a_schedule_expands_to_one_name_a_layer(text, names):
    assert schedule.parse(text) == tuple(names.split())


@pytest.mark.parametrize(
    ("text", "caret", "why"),
    [
        ("", 0, "the schedule is empty."),
        ("   ", 0, "the schedule is empty."),
        ("(a b", 0, "this '(' is never closed."),
        ("a (b (c)", 2, "this '(' is never closed."),
        ("a b)", 3, "this ')' closes nothing."),
        (")", 0, "this ')' closes nothing."),
        ("a ()", 2, "these parentheses hold nothing."),
        ("a*", 2, "expected a number after '*'."),
        ("a* b", 3, "expected a number after '*'."),
        ("a*(b)", 2, "expected a number after '*'."),
        ("a b*0", 4, "a repeat count must be at least 1."),
        ("a*2*3", 3, "expected a mixer name or '('; got '*'."),
        ("*2", 0, "expected a mixer name or '('; got '*'."),
        ("a 3", 2, "expected a mixer name or '('; got '3'."),
        ("a, b", 1, "unexpected ','."),
        ("a  +b", 3, "unexpected '+'."),
        ("a\nb)", 3, "this ')' closes nothing."),
        ("a (b*100 c)*1000000", 12, "layers or fewer"),
        ("a*99999999999999999999", 2, "layers or fewer"),
    ],
)
def test_a_schedule_that_does_not_parse_has_a_caret_under_the_place(text, caret, why):
    with pytest.raises(UserError) as caught:
        schedule.parse(text)
    first, shown, pointer, example = str(caught.value).split("\n")
    assert first.startswith("config.model.layers: ")
    assert why in first
    assert shown == "  " + re.sub(r"\s", " ", text)
    assert pointer == "  " + " " * caret + "^"
    assert schedule.parse(re.search('"(.*)"', example)[1])


def test_a_schedule_repeats_to_the_depth():
    assert schedule.expand("a b", 6) == ("a", "b") * 3
    assert schedule.expand("a b", None) == ("a", "b")
    assert schedule.expand(("a", "b"), 4) == ("a", "b", "a", "b")


@pytest.mark.parametrize("depth", [0, -2, 1, 3])
def test_a_depth_that_the_schedule_does_not_divide_is_refused(depth):
    with pytest.raises(
        UserError, match=rf"multiple of the schedule's 2 layers; got num_layers={depth}"
    ):
        schedule.expand("a b", depth)


def test_a_mistyped_depth_is_refused():
    with pytest.raises(UserError, match="must be at most 10000; got 1000000000"):
        schedule.expand("a", 10**9)


def test_an_empty_list_of_layers_is_refused():
    with pytest.raises(UserError, match="must name at least one layer"):
        schedule.expand((), None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a*12", [("a", 12)]),
        ("(a*7 b)*3", [("a a a a a a a b", 3)]),
        ("(a*2 b)*2 c", [("a a b", 2), ("c", 1)]),
        ("a b*3 c", [("a", 1), ("b", 3), ("c", 1)]),
        ("(a b)*2 (c d)*3", [("a b", 2), ("c d", 3)]),
        ("a b c", [("a", 1), ("b", 1), ("c", 1)]),
    ],
)
def test_repeats_become_one_group(text, expected):
    found = schedule.groups(schedule.parse(text))
    assert [(" ".join(pattern), count) for pattern, count in found] == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=30))
def test_groups_put_one_after_the_other_are_the_schedule(names):
    groups = schedule.groups(tuple(names))
    assert [n for pattern, count in groups for n in pattern * count] == names


@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6), st.integers(2, 5))
def test_a_repeated_pattern_is_one_group(pattern, count):
    found = schedule.groups(tuple(pattern) * count)
    assert len(found) == 1
    # The shortest pattern that covers everything.
    assert len(found[0][0]) <= len(pattern)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        NAMES,
        lambda inner: st.tuples(
            st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)
        ),
        max_leaves=8,
    )
)
def test_any_nesting_parses_to_its_expansion(tree):
    def text(node):
        if isinstance(node, str):
            return node
        items, count = node
        return f"({' '.join(map(text, items))})*{count}"

    def names(node):
        if isinstance(node, str):
            return (node,)
        items, count = node
        return tuple(n for item in items for n in names(item)) * count

    assert schedule.parse(text(tree)) == names(tree)
