"""Config files, and the overrides that a command line lays over them."""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnjax.core.errors import UserError
from attnjax.core.userfile import run_file, told_as_user_error
from attnjax.core.values import Text

OWNER = "--config"


def load_file(spec: str) -> dict:
    """The config that "FILE" or "FILE:ARGS" makes, as a dict of JSON values.

    FILE is Python and defines `get_config()` or `get_config(args)`, which returns
    an `ml_collections.ConfigDict` or a dict. References are followed, unset
    placeholders are None.

    Raises:
        UserError: the file is missing, fails, or returns what JSON cannot hold.
    """
    path, args = split_spec(spec)
    name = re.sub(r"\W", "_", Path(path).stem)
    module = run_file(path, owner=OWNER, module_name=f"attnjax_config_{name}")
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise UserError(
            f"{OWNER}: {path} must define get_config(), which returns the config."
        )
    arguments = _arguments(function, args, path)
    with told_as_user_error(path, owner=OWNER):
        config = function(*arguments)
        # Following a config's references runs the file's code too.
        plain = _plain(config, "config")
    if not isinstance(plain, dict):
        raise UserError(
            f"{OWNER}: get_config() of {path} must return a ConfigDict or a dict; "
            f"got {type(config).__name__}."
        )
    return plain


def split_spec(spec: str) -> tuple[str, str | None]:
    """ "FILE:ARGS" -> (FILE, ARGS); ARGS is None when there is no colon."""
    match = re.match(r"^(.*?\.py)(?::(.*))?$", spec, re.DOTALL)
    if match:
        return match[1], match[2]
    path, colon, args = spec.partition(":")
    return path, args if colon else None


def apply_overrides(mapping: dict, overrides: list[tuple[str, str]]) -> dict:
    """A copy of `mapping` with texts of a command line at dotted keys.

    Args:
        mapping: a config.
        overrides: (dotted key without the leading "config.", text), later ones win.

    Returns:
        The copy; the texts are `Text`, to be typed by `schema.resolve`, which also
        reports keys that do not exist.

    Raises:
        UserError: a key that goes through a value that is not a group.
    """
    return apply_values(mapping, [(dotted, Text(text)) for dotted, text in overrides])


def apply_values(mapping: dict, values: Iterable[tuple[str, Any]]) -> dict:
    """A copy of `mapping` with values at dotted keys; see `apply_overrides`."""
    result = _copy(mapping)
    for dotted, value in values:
        *groups, leaf = dotted.split(".")
        node = result
        for depth, group in enumerate(groups):
            entry = node.get(group)
            if entry is None or (isinstance(entry, Text) and entry.lower() == "none"):
                entry = node[group] = {}
            if not isinstance(entry, dict):
                place = ".".join(["config", *groups[: depth + 1]])
                raise UserError(
                    f"{place}: is a value, not a group; got --config.{dotted}. "
                    f"Set it as --{place}=VALUE"
                )
            node = entry
        node[leaf] = value
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return value


def _arguments(function: Any, args: str | None, path: str) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if args is not None:
        if not positional:
            raise UserError(
                f"{OWNER}: get_config() of {path} takes no arguments; got {args!r} "
                f"after the colon. Drop it."
            )
        return (args,)
    if positional and positional[0].default is inspect.Parameter.empty:
        if positional[0].kind is inspect.Parameter.VAR_POSITIONAL:
            return ()
        raise UserError(
            f"{OWNER}: get_config({positional[0].name}) of {path} needs an argument. "
            f"Give it as --config={path}:{positional[0].name.upper()}"
        )
    return ()


def _plain(value: Any, place: str) -> Any:
    """ConfigDicts, references and numpy scalars as plain JSON values."""
    from ml_collections import config_dict

    if isinstance(value, config_dict.FieldReference):
        value = value.get()
    if isinstance(value, config_dict.ConfigDict):
        value = _entries(value, place)
    if isinstance(value, dict):
        return {
            _key(key, place): _plain(entry, f"{place}.{key}")
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    raise UserError(
        f"{place}: must be a JSON value (number, text, bool, none, tuple or group); "
        f"got {type(value).__name__}. Functions and classes are reached by name."
    )


def _entries(value: Any, place: str) -> dict:
    from ml_collections import config_dict

    try:
        return dict(value.items())
    except config_dict.RequiredValueError as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}") from None


def _key(key: Any, place: str) -> str:
    if not isinstance(key, str) or "." in key:
        raise UserError(f"{place}: keys must be str without dots; got {key!r}.")
    return key
