"""Config values and their types: checking, and reading text from a command line.

A type is a dataclass field's annotation: int, float, bool, str, None, unions,
tuples, lists, Literal, dict[str, X], Any (JSON), or a dataclass (see `schema`,
which handles those and calls here for the rest).
"""

import ast
import json
import math
import types
import typing
from typing import Any, Literal, Union

from attnjax.core.errors import UserError, nearest

TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")
EXAMPLES = {int: "7", float: "3e-4", bool: "true", str: "name"}


class Text(str):
    """A value typed on a command line: its field's type says how to read it."""


class Mismatch(Exception):
    """A value that does not have the type asked for; the text is the rule."""


def is_union(kind: Any) -> bool:
    """Whether `kind` is X | Y or Optional[X]."""
    return typing.get_origin(kind) in (Union, types.UnionType)


def type_name(kind: Any) -> str:
    """How messages and tables call a type.

    Example:
        >>> type_name(tuple[int, ...] | None)
        'tuple of int or none'
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "none"
    if kind is Any:
        return "JSON value"
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if is_union(kind):
        return " or ".join(type_name(arg) for arg in args)
    if origin is typing.Annotated:
        return type_name(args[0])
    if origin in (tuple, list):
        if len(args) == 1 or args[-1] is Ellipsis:
            return f"tuple of {type_name(args[0])}"
        return f"tuple ({', '.join(type_name(arg) for arg in args)})"
    if origin is dict:
        return "group"
    return getattr(kind, "__name__", str(kind))


def example_text(kind: Any) -> str | None:
    """A value of this type as one would type it, or None if there is no short one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return str(args[0])
    if is_union(kind):
        return example_text(next(arg for arg in args if arg is not type(None)))
    if origin in (tuple, list) and args:
        items = args[:1] * 2 if len(args) == 1 or args[-1] is Ellipsis else args
        texts = [example_text(item) for item in items]
        return None if None in texts else ",".join(texts)
    return EXAMPLES.get(kind)


def show(value: Any, *, limit: int = 60) -> str:
    """A value as messages print it, cut to `limit` characters."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def scalar(kind: Any, value: Any) -> Any:
    """`value` as a plain int, float, bool, str or None.

    Args:
        kind: one of these types, Any, or a Literal.
        value: a Python value, or a `Text` to be read.

    Raises:
        Mismatch: when it is not one; the text is the rule that it breaks.
    """
    if kind is Any:
        return json_value(value)
    if typing.get_origin(kind) is Literal:
        return _literal(typing.get_args(kind), value)
    if kind not in _READERS:
        raise TypeError(f"a config field may not have the type {kind!r}")
    return _READERS[kind](value)


def json_value(value: Any) -> Any:
    """A free JSON value; a `Text` is read as JSON where it is JSON, else kept."""
    if isinstance(value, Text):
        try:
            return finite(read_literal(value))
        except ValueError:
            return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise Mismatch(f"must have str keys; got {show(key)}")
        return {key: json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return finite(value)
    raise Mismatch(f"must be a JSON value; got {show(value)}")


def finite(value: Any) -> Any:
    """`value`, unless it is a NaN or an infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Mismatch(f"must be finite; got {value}")
    return value


def read_literal(text: str) -> Any:
    """Read text as JSON or as a Python literal; `none` and `null` are None.

    Raises:
        ValueError: when it is neither.
    """
    word = text.strip()
    if word.lower() in ("none", "null"):
        return None
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        return json.loads(word)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"not a JSON value: {word!r}") from None
    if isinstance(value, bytes | complex | set):
        raise ValueError(f"not a JSON value: {word!r}")
    return value


def read_items(text: str) -> list:
    """Read "a,b", "[1, 2]" or "(1, 2)" as a list of items; "" is empty."""
    word = text.strip()
    if word[:1] in ("[", "("):
        try:
            value = read_literal(word)
        except ValueError:
            value = None
        if isinstance(value, list | tuple):
            return list(value)
        word = word[1:-1] if word[-1:] in ("]", ")") else word
    return [Text(item.strip()) for item in word.split(",") if item.strip()]


def _read_int(value: Any) -> int:
    if isinstance(value, Text):
        try:
            return int(value)
        except ValueError:
            value = _number(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Mismatch("must be an int")
    return value


def _read_float(value: Any) -> float:
    if isinstance(value, Text):
        value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mismatch("must be a float")
    return finite(float(value))


def _number(text: Text) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _read_bool(value: Any) -> bool:
    if isinstance(value, Text):
        word = value.strip().lower()
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
    if not isinstance(value, bool):
        raise Mismatch("must be a bool (true or false)")
    return value


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise Mismatch("must be a str")
    return str(value)


def _read_none(value: Any) -> None:
    if value is None or (isinstance(value, Text) and value.strip().lower() == "none"):
        return None
    raise Mismatch("must be none")


def _literal(options: tuple, value: Any) -> Any:
    for option in options:
        if isinstance(value, Text) and str(option).lower() == value.lower():
            return option
        if option == value and isinstance(option, bool) == isinstance(value, bool):
            return option
    names = [str(option) for option in options]
    raise Mismatch(f"unknown value {show(value)}. {nearest(str(value), names)}")


_READERS = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
    type(None): _read_none,
}


def mismatch_error(path: str, kind: Any, value: Any, error: Mismatch) -> UserError:
    """The one-line error for a value of the wrong type at a dotted path."""
    text = str(error)
    if "; got" in text or text.startswith("unknown"):
        return UserError(f"{path}: {text}")
    example = example_text(kind)
    # An entry of a sequence has no flag of its own.
    cure = f" Example: --{path}={example}" if example and "[" not in path else ""
    return UserError(f"{path}: {text}; got {show(value)}.{cure}")
