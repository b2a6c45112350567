"""Resolving configs: defaults, types, command-line text, and every refusal."""

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnjax.core.errors import UserError
from attnjax.core.schema import (
    Deferred,
    build,
    field_docs,
    merge,
    resolve,
    to_json,
)
from attnjax.core.values import Text, example_text, type_name


@dataclasses.dataclass(frozen=True)
class Optim:
    """How parameters are updated.

    Attributes:
        name: the rule,
            by its published name.
        learning_rate: at the peak.
        low, high: bounds.
    """

    name: Literal["adamw", "lion"] = "adamw"
    learning_rate: float = 1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None
    low: int = 0
    high: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int
    nested: Optim
    optim: Optim = Optim(learning_rate=2.0)
    rope: Optim | None = None
    unroll: int | Literal["all"] = 1
    layers: str | tuple[str, ...] = "attention"
    widths: tuple[int, ...] = ()
    causal: bool = True
    mixers: Deferred = dataclasses.field(default_factory=dict)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def resolved(**changes):
    return resolve(Config, {"steps": 3, **changes})


def refused(match, **changes):
    with pytest.raises(UserError, match=match):
        resolved(**changes)


def test_defaults_fill_every_field():
    result = resolved()
    assert set(result) == {field.name for field in dataclasses.fields(Config)}
    assert result["nested"] == to_json(Optim()) | {"learning_rate": 1.0}
    assert result["rope"] is None


def test_a_default_instance_gives_its_own_values_as_defaults():
    assert resolved(optim={"clip": 1})["optim"]["learning_rate"] == 2.0


def test_an_optional_group_is_filled_once_one_of_its_keys_is_given():
    assert resolved(rope={"clip": 2})["rope"] == {**resolved()["nested"], "clip": 2.0}


def test_the_result_is_json_and_resolving_it_again_changes_nothing():
    result = resolved(layers=("a", "b"), widths=(1, 2), rope={"betas": (0, 1)})
    assert json.loads(json.dumps(result)) == result
    assert resolve(Config, result) == result


def test_ints_are_floats_where_a_float_is_asked_for():
    value = resolved(optim={"learning_rate": 3})["optim"]["learning_rate"]
    assert value == 3.0
    assert isinstance(value, float)
    assert isinstance(resolved()["nested"]["learning_rate"], float)


def test_a_value_of_a_unions_own_type_stays_as_it_is():
    @dataclasses.dataclass(frozen=True)
    class Either:
        number: float | int = 1.0
        switch: int | bool = 0

    result = resolve(Either, {"number": 3, "switch": True})
    assert (type(result["number"]), result["switch"]) == (int, True)


def test_a_literal_of_one_is_not_true():
    @dataclasses.dataclass(frozen=True)
    class Rank:
        rank: Literal[1, 2] = 1

    assert resolve(Rank, {"rank": Text("2")}) == {"rank": 2}
    with pytest.raises(UserError, match="unknown value True"):
        resolve(Rank, {"rank": True})


def test_build_makes_nested_instances_and_tuples():
    config = build(Config, resolved(rope={"clip": 1.5}, widths=[3, 5]))
    assert config.rope == Optim(clip=1.5)
    assert config.rope.betas == (0.9, 0.95)
    assert config.widths == (3, 5)
    hash(config.optim)


def test_build_reports_what_post_init_refuses():
    @dataclasses.dataclass(frozen=True)
    class Even:
        size: int = 2

        def __post_init__(self):
            if self.size % 2:
                raise ValueError(f"size must be even; got size={self.size}")

    @dataclasses.dataclass(frozen=True)
    class Outer:
        even: Even = Even()

    with pytest.raises(UserError, match=r"config\.even: size must be even; got size=3"):
        build(Outer, resolve(Outer, {"even": {"size": 3}}))


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "7", 7),
        ("steps", "-7", -7),
        ("steps", "1_000", 1000),
        ("steps", "1e3", 1000),
        ("causal", "true", True),
        ("causal", "False", False),
        ("causal", "0", False),
        ("causal", "1", True),
        ("unroll", "all", "all"),
        ("unroll", "2", 2),
        ("widths", "3,5", [3, 5]),
        ("widths", "[3, 5]", [3, 5]),
        ("widths", "(3,)", [3]),
        ("widths", "", []),
        ("layers", "[a, b]", ["a", "b"]),
        ("layers", "(a*3 b)*2", "(a*3 b)*2"),
        ("layers", "a,b", ["a", "b"]),
        ("layers", '["a"]', ["a"]),
        ("rope", "none", None),
        ("free", '{"a": [1, null, true]}', {"a": [1, None, True]}),
        ("free", "{'a': 1}", {"a": 1}),
        ("sizes", '{"a": 1}', {"a": 1}),
    ],
)
def test_text_is_read_by_the_type_of_its_field(field, text, value):
    result = resolved(**{field: Text(text)})[field]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1", 1.0), (".5", 0.5), ("-2", -2.0)]
)
def test_text_is_read_as_float(text, value):
    assert resolved(optim={"clip": Text(text)})["optim"]["clip"] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("none", None), ("true", True), ("word", "word"), ("[1,2]", [1, 2])],
)
def test_free_values_are_read_as_json_where_they_are_json(text, value):
    assert resolved(free={"a": Text(text)})["free"]["a"] == value


def test_a_deferred_group_keeps_its_text_for_its_owner():
    kept = resolved(mixers={"local": {"window": Text("256")}})["mixers"]
    assert isinstance(kept["local"]["window"], Text)


def test_a_deferred_group_may_be_given_as_text():
    kept = resolved(mixers={"local": Text('{"type": "a", "window": 3}')})["mixers"]
    assert kept == {"local": {"type": "a", "window": 3}}


@settings(max_examples=50, deadline=None)
@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_numbers_survive_a_command_line(whole, real, flag):
    result = resolved(
        steps=Text(str(whole)),
        causal=Text(str(flag)),
        optim={"clip": Text(repr(real))},
    )
    assert (result["steps"], result["causal"]) == (whole, flag)
    assert result["optim"]["clip"] == real


def test_unknown_keys_are_refused_with_the_nearest():
    refused(
        r"config\.optim: unknown key 'lerning_rate'\. Did you mean learning_rate\?",
        optim={"lerning_rate": 1},
    )


def test_an_unknown_key_that_exists_elsewhere_says_where():
    refused(r"It exists as config\.nested\.clip, config\.optim\.clip", clip=1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optim": {"learning_rate": Text("fast")}}, "must be a float; got 'fast'"),
        ({"optim": {"learning_rate": True}}, "must be a float; got True"),
        ({"optim": {"clip": Text("inf")}}, r"optim\.clip: must be finite; got inf"),
        ({"optim": {"clip": float("nan")}}, "must be finite; got nan"),
        ({"steps": Text("1.5")}, r"must be an int; got '1\.5'"),
        ({"steps": 1.5}, r"must be an int; got 1\.5"),
        ({"steps": True}, "must be an int; got True"),
        ({"steps": None}, "must be an int; got None"),
        ({"causal": Text("maybe")}, r"must be a bool \(true or false\); got 'maybe'"),
        ({"causal": 1}, r"must be a bool \(true or false\); got 1"),
        ({"optim": {"name": "adamv"}}, "unknown value 'adamv'. Did you mean adamw"),
        ({"optim": {"name": {}}}, "must be 'adamw' or 'lion', which has no keys"),
        ({"optim": {"betas": Text("1")}}, "must have 2 entries; got '1'"),
        ({"optim": {"betas": ("a", 1)}}, r"betas\[0\]: must be a float; got 'a'\.$"),
        ({"widths": 3}, "must be a tuple of int; got 3"),
        ({"optim": Text("3")}, "is a group of settings; got 3"),
        ({"mixers": 3}, r"config\.mixers: is a group of settings; got 3"),
        ({"mixers": {"a": 3}}, r"config\.mixers\.a: is a group of settings; got 3"),
        ({"unroll": Text("some")}, "must be int or 'all'; got 'some'"),
        ({"layers": 3}, "must be str or tuple of str; got 3"),
        ({"sizes": {"a": "x"}}, r"config\.sizes\.a: must be an int; got 'x'"),
        ({"free": {"a": print}}, r"free\.a: must be a JSON value; got <built-in"),
        ({"free": {"a": {1: 2}}}, "must have str keys; got 1"),
    ],
)
def test_wrong_types_are_refused_with_rule_and_value(changes, match):
    refused(match, **changes)


def test_a_wrong_type_ends_with_an_example_that_works():
    refused(
        r"Example: --config\.optim\.learning_rate=3e-4$",
        optim={"learning_rate": Text("fast")},
    )


def test_a_missing_required_field_is_refused():
    with pytest.raises(UserError, match=r"config\.steps: is required \(int\)"):
        resolve(Config, {})


def test_a_schema_that_is_no_dataclass_is_a_fault():
    with pytest.raises(TypeError, match="must be a dataclass"):
        resolve(int, {})


def test_a_field_type_outside_the_vocabulary_is_a_fault():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        size: complex = 1j

    with pytest.raises(TypeError, match="may not have the type"):
        resolve(Odd, {"size": 1})


def test_to_json_refuses_what_json_cannot_hold():
    with pytest.raises(TypeError, match="must be a JSON value"):
        to_json({"a": print})


def test_field_docs_come_from_the_attributes_part():
    assert field_docs(Optim) == {
        "name": "the rule, by its published name.",
        "learning_rate": "at the peak.",
        "low": "bounds.",
        "high": "bounds.",
    }


def test_inherited_fields_keep_their_docs():
    @dataclasses.dataclass(frozen=True)
    class Own(Optim):
        """A rule of its own.

        Attributes:
            learning_rate: everywhere.
            extra: more.
        """

        extra: int = 1

    docs = field_docs(Own)
    assert docs == field_docs(Optim) | {
        "learning_rate": "everywhere.",
        "extra": "more.",
    }


def test_merge_goes_group_by_group():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}


@pytest.mark.parametrize(
    ("kind", "name", "example"),
    [
        (int, "int", "7"),
        (tuple[int, ...] | None, "tuple of int or none", "7,7"),
        (tuple[int, str], "tuple (int, str)", "7,name"),
        (Literal["a", "b"], "'a' or 'b'", "a"),
        (dict[str, int], "group", None),
        (Any, "JSON value", None),
    ],
)
def test_types_have_readable_names(kind, name, example):
    assert type_name(kind) == name
    assert example_text(kind) == example
