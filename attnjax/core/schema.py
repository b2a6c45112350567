"""Configs are nested JSON dicts, checked against frozen dataclasses.

`resolve` fills in defaults and checks; `build` makes the dataclass instance. The
dict is what is stored, hashed and shown; the instance is what code reads.
"""

import contextlib
import dataclasses
import functools
import re
import typing
from typing import Annotated, Any

from attnjax.core.errors import UserError, unknown
from attnjax.core.values import (
    Mismatch,
    Text,
    is_union,
    json_value,
    mismatch_error,
    read_items,
    read_literal,
    scalar,
    show,
    type_name,
)

_DEFERRED = "resolved later, by its owner"

# The type of a group of groups that `resolve` hands on with their values untouched,
# text included: their owner resolves each with a dataclass of its own
# (config.model.mixers).
Deferred = Annotated[dict[str, Any], _DEFERRED]


def resolve(cls: type, mapping: Any, *, path: str = "config") -> dict:
    """Fill in the defaults of dataclass `cls` and check every key and value.

    Args:
        cls: a dataclass; nested dataclass fields are resolved too.
        mapping: what the user gave: a dict; entries may be `Text`.
        path: the dotted place of `mapping`, for messages.

    Returns:
        A dict of JSON values with every field of `cls`, tuples as lists.

    Raises:
        UserError: for an unknown key, a wrong type, or a missing required field.
    """
    given = _group(mapping, path)
    kinds = field_types(cls)
    for name in given:
        if name not in kinds:
            raise _unknown_key(cls, name, path)
    result = {}
    for field in dataclasses.fields(cls):
        where = f"{path}.{field.name}"
        kind = kinds[field.name]
        base = _default(field)
        if field.name in given:
            value = given[field.name]
        elif has_default(field):
            value = to_json(base)
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            value = {}
        else:
            raise UserError(
                f"{where}: is required ({type_name(kind)}). "
                f"Give it in the config file or as --{where}=VALUE"
            )
        result[field.name] = _check(kind, value, where, base)
    return result


def build(cls: type, mapping: dict, *, path: str = "config") -> Any:
    """An instance of `cls` from a resolved mapping; lists become tuples.

    A ValueError of a `__post_init__` becomes a UserError at `path`.
    """
    kinds = field_types(cls)
    values = {
        name: _build(kinds[name], value, f"{path}.{name}")
        for name, value in mapping.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def to_json(value: Any) -> Any:
    """A dataclass instance (or any config value) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a config value must be a JSON value; got {value!r}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> annotation of a dataclass, in order."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"a config schema must be a dataclass; got {cls!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> its text in the "Attributes:" part of a class docstring.

    Inherited fields have the texts of the class that declares them, unless the class
    itself says something else.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= _documented(base.__dict__.get("__doc__") or "")
    return {name: texts[name] for name in field_types(cls) if name in texts}


def _documented(docstring: str) -> dict[str, str]:
    """The entries of "Attributes:"."""
    doc = docstring.partition("Attributes:")[2]
    head = re.compile(r"^ {4,12}(\w[\w, ]*?)(?: \([^)]*\))?: +(.*)$")
    texts: dict[str, str] = {}
    current: list[str] = []
    indent = None
    for line in doc.splitlines():
        match = head.match(line)
        depth = len(line) - len(line.lstrip())
        if match and (indent is None or depth == indent):
            indent = depth
            current = [name.strip() for name in match[1].split(",")]
            texts.update({name: match[2].strip() for name in current})
        elif line.strip() and indent is not None and depth > indent:
            texts.update({name: f"{texts[name]} {line.strip()}" for name in current})
        elif line.strip() and indent is not None:
            break
    return texts


def has_default(field: dataclasses.Field) -> bool:
    """Whether a dataclass field may be left out."""
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _group(value: Any, path: str) -> dict:
    if isinstance(value, Text):
        with contextlib.suppress(ValueError):
            value = read_literal(value)
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: is a group of settings; got {show(value)}. "
            f"Set one of its keys, as in --{path}.KEY=VALUE"
        )
    return value


def _unknown_key(cls: type, name: str, path: str) -> UserError:
    error = unknown(path, "key", name, field_types(cls))
    places = [place for place in _places(cls, path) if place.endswith(f".{name}")]
    if places:
        return UserError(f"{error} It exists as {', '.join(places[:3])}.")
    return error


def _places(cls: type, path: str) -> list[str]:
    """Dotted paths of every field below `cls`."""
    places = []
    for name, kind in field_types(cls).items():
        places.append(f"{path}.{name}")
        inner = _dataclass_in(kind)
        if inner is not None:
            places.extend(_places(inner, f"{path}.{name}"))
    return places


def _dataclass_in(kind: Any) -> type | None:
    """The dataclass that `kind` is, or has among its alternatives."""
    for option in typing.get_args(kind) if is_union(kind) else (kind,):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _check(kind: Any, value: Any, path: str, base: Any = None) -> Any:
    """`value` checked against `kind`; `base` is the field's default."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        if _DEFERRED in args[1:]:
            entries = _group(value, path).items()
            return {name: _group(entry, f"{path}.{name}") for name, entry in entries}
        return _check(args[0], value, path, base)
    if is_union(kind):
        return _check_union(kind, value, path, base)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        group = _group(value, path)
        start = to_json(base) if isinstance(base, kind) else {}
        return resolve(kind, merge(start, group), path=path)
    if origin is dict or kind is dict:
        entry = args[1] if args else Any
        group = _group(value, path)
        return {
            str(name): _check(entry, item, f"{path}.{name}")
            for name, item in group.items()
        }
    if origin in (tuple, list) or kind in (tuple, list):
        return _check_sequence(kind, args or (Any, ...), value, path)
    try:
        if isinstance(value, dict) and kind is not Any:
            raise Mismatch(f"must be {type_name(kind)}, which has no keys")
        return scalar(kind, value)
    except Mismatch as error:
        raise mismatch_error(path, kind, value, error) from None


def _check_union(kind: Any, value: Any, path: str, base: Any) -> Any:
    options = typing.get_args(kind)
    if type(None) in options:
        try:
            return scalar(type(None), value)
        except Mismatch:
            options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _check(options[0], value, path, base)
    for option in sorted(options, key=lambda option: _fit(option, value)):
        try:
            return _check(option, value, path, base)
        except UserError:
            continue
    error = Mismatch(f"must be {type_name(kind)}")
    raise mismatch_error(path, kind, value, error)


def _fit(option: Any, value: Any) -> int:
    """The order in which a union's alternatives are tried: best first."""
    if isinstance(value, Text):
        sequence = typing.get_origin(option) in (tuple, list)
        listed = value.lstrip()[:1] == "[" or "," in value
        # Any text is a str and, as one item, a sequence: these are tried last.
        return (
            (3 if listed else 1) if option is str else (0 if listed else 2) * sequence
        )
    return 0 if option is type(value) else 1


def _check_sequence(kind: Any, args: tuple, value: Any, path: str) -> list:
    items = read_items(value) if isinstance(value, Text) else value
    if not isinstance(items, list | tuple):
        error = Mismatch(f"must be a {type_name(kind)}")
        raise mismatch_error(path, kind, value, error)
    open_ended = len(args) == 1 or args[-1] is Ellipsis
    kinds = [args[0]] * len(items) if open_ended else list(args)
    if len(kinds) != len(items):
        error = Mismatch(f"must have {len(kinds)} entries")
        raise mismatch_error(path, kind, value, error)
    pairs = enumerate(zip(kinds, items, strict=True))
    return [_check(item, entry, f"{path}[{i}]") for i, (item, entry) in pairs]


def merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it, group by group."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merge(old, value) if both else value
    return result


def _build(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _build(args[0], value, path)
    if isinstance(value, dict):
        inner = _dataclass_in(kind)
        if inner is not None:
            return build(inner, value, path=path)
        entry = args[1] if origin is dict and args else Any
        return {
            key: _build(entry, item, f"{path}.{key}") for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return tuple(_build(entry, item, path) for entry, item in _pairs(kind, value))
    return value


def _pairs(kind: Any, values: Any) -> list:
    """Each entry of a sequence with its type."""
    for option in typing.get_args(kind) if is_union(kind) else (kind,):
        args = typing.get_args(option)
        if typing.get_origin(option) in (tuple, list) and args:
            if len(args) == len(values) and args[-1] is not Ellipsis:
                return list(zip(args, values, strict=True))
            return [(args[0], value) for value in values]
    return [(Any, value) for value in values]


__all__ = [
    "Deferred",
    "Text",
    "build",
    "field_docs",
    "field_types",
    "has_default",
    "json_value",
    "merge",
    "resolve",
    "to_json",
]
