"""Nested config dicts as flat ones: for comparing, hashing and showing."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def flatten(mapping: dict, *, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty group stays as {}.

    Keys come in sorted order.
    """
    flat: dict[str, Any] = {}
    for key in sorted(mapping):
        value = mapping[key]
        if isinstance(value, dict) and value:
            flat.update(flatten(value, prefix=f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def without(mapping: dict, exclude: Iterable[str], *, prefix: str = "") -> dict:
    """`mapping` without the dotted keys or groups named in `exclude`."""
    gone = tuple(exclude)
    kept = {}
    for key, value in mapping.items():
        if f"{prefix}{key}" in gone:
            continue
        if isinstance(value, dict):
            value = without(value, gone, prefix=f"{prefix}{key}.")
        kept[key] = value
    return kept


def diff(old: dict, new: dict) -> list[str]:
    """What changes from `old` to `new`: "- key = v" and "+ key = v" lines by key."""
    before, after = flatten(old), flatten(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        was = _shown(before, key)
        now = _shown(after, key)
        if was == now:
            continue
        lines += [f"- {key} = {was}"] if was is not None else []
        lines += [f"+ {key} = {now}"] if now is not None else []
    return lines


def canonical(mapping: dict) -> str:
    """JSON with sorted keys and no spaces: equal configs give equal text."""
    return json.dumps(mapping, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(mapping: dict, *, exclude: Iterable[str] = ()) -> str:
    """sha256 hex of the canonical text, without the dotted names in `exclude`."""
    kept = without(mapping, exclude)
    return hashlib.sha256(canonical(kept).encode()).hexdigest()


def _shown(flat: dict, key: str) -> str | None:
    return json.dumps(flat[key]) if key in flat else None
