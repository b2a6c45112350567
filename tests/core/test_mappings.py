"""Flattening, comparing and hashing configs."""

import pytest

from attnjax.core.mappings import canonical, diff, digest, flatten, without

OLD = {"a": {"b": 1, "c": "x"}, "mesh": {"data": -1}, "d": {}}


def test_flatten_joins_keys_with_dots_and_keeps_empty_groups():
    assert flatten(OLD) == {"a.b": 1, "a.c": "x", "d": {}, "mesh.data": -1}


def test_diff_shows_what_goes_and_what_comes():
    new = {"a": {"b": 2}, "mesh": {"data": -1}, "d": {}, "e": None}
    assert diff(OLD, new) == ["- a.b = 1", "+ a.b = 2", '- a.c = "x"', "+ e = null"]
    assert diff(OLD, OLD) == []


def test_without_drops_keys_and_whole_groups():
    assert without(OLD, ["a.b", "mesh"]) == {"a": {"c": "x"}, "d": {}}
    assert without({"a": {"bc": 1}}, ["a.b"]) == {"a": {"bc": 1}}


def test_digest_depends_on_content_and_not_on_order():
    turned = {"d": {}, "mesh": {"data": -1}, "a": {"c": "x", "b": 1}}
    assert digest(OLD) == digest(turned)
    assert digest(OLD) != digest({**OLD, "a": {"b": 1, "c": "y"}})


def test_digest_ignores_what_is_excluded():
    other = {**OLD, "mesh": {"data": 8}}
    assert digest(OLD) != digest(other)
    assert digest(OLD, exclude=["mesh"]) == digest(other, exclude=["mesh"])


def test_canonical_refuses_nan():
    assert canonical({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"a": float("nan")})
