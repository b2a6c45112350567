"""Command lines of the front doors: flags from a dataclass, plus the config's own.

A front door describes its flags as a frozen dataclass: field names are the flags
(a trailing underscore is dropped, so `from_` is --from), annotations their types,
the "Attributes:" of the docstring their help. A field made with `positional()` is
given without a dash. Values are read by the same code as config values.
"""

import dataclasses
import inspect
import textwrap
import typing
from typing import Any

from attnjax.core.errors import UserError, nearest
from attnjax.core.schema import (
    build,
    field_docs,
    field_types,
    has_default,
    resolve,
)
from attnjax.core.values import Text, is_union, type_name


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Attributes:
        config: what followed --config ("FILE" or "FILE:ARGS"), or None.
        overrides: (dotted key without "config.", text) in the order given.
        flags: an instance of the front door's dataclass.
    """

    config: str | None
    overrides: tuple[tuple[str, str], ...]
    flags: Any


def positional(*, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is given on the command line without a dash."""
    return dataclasses.field(default=default, metadata={"positional": True})


def parse_command_line(
    argv: list[str],
    options: type,
    *,
    program: str,
    config: bool = True,
    overrides: bool = True,
) -> CommandLine:
    """Read a command line.

    Args:
        argv: without the program's name.
        options: the frozen dataclass of the flags.
        program: as in "attnjax.train", for the help text.
        config: whether --config FILE is a flag.
        overrides: whether --config.a.b=value are.

    Returns:
        The parsed line. --help prints the help and exits with 0.

    Raises:
        UserError: an unknown flag, a missing value, or a value of the wrong type.
    """
    if any(word in ("--help", "-h") for word in argv):
        print(help_text(options, program=program, config=config, overrides=overrides))
        raise SystemExit(0)
    parser = _Parser(options, config=config, overrides=overrides)
    parser.read(list(argv))
    return parser.result()


def help_text(
    options: type, *, program: str, config: bool = True, overrides: bool = True
) -> str:
    """What --help prints: usage, then each flag with its type, default and help."""
    kinds, docs = field_types(options), field_docs(options)
    usage = [f"usage: python -m {program}"]
    rows = []
    if config:
        usage.append("--config FILE[:ARGS]")
        rows.append(("--config FILE[:ARGS]", "a Python file with get_config()"))
    if overrides:
        usage.append("[--config.KEY=VALUE ...]")
        rows.append(("--config.KEY=VALUE", "changes one config value; `none` resets"))
    for field in dataclasses.fields(options):
        kind, flag = kinds[field.name], flag_name(field)
        value = "" if kind is bool else f" {_metavar(kind)}"
        shown = field.name.upper() if is_positional(field) else f"--{flag}{value}"
        usage.append(f"[{shown}]" if has_default(field) else shown)
        rows.append((shown, _help_line(field, kind, docs.get(field.name, ""))))
    summary = inspect.cleandoc(options.__doc__ or "").partition("Attributes:")[0]
    width = max(len(left) for left, _ in rows) if rows else 0
    # A flag and its value stay on one line.
    joined = " ".join(word.replace(" ", "\0") for word in usage)
    wrapped = textwrap.fill(joined, 88, subsequent_indent="    ").replace("\0", " ")
    lines = [wrapped, "", summary.strip(), ""]
    lines += [f"  {left:<{width}}  {right}".rstrip() for left, right in rows]
    return "\n".join(lines)


def flag_name(field: dataclasses.Field) -> str:
    """The flag of a field: its name without a trailing underscore."""
    return field.name.removesuffix("_")


def is_positional(field: dataclasses.Field) -> bool:
    """Whether a field is given without a dash."""
    return bool(field.metadata.get("positional"))


def _help_line(field: dataclasses.Field, kind: Any, doc: str) -> str:
    default = field.default
    if default in (None, dataclasses.MISSING, "") or default is False:
        return doc
    shown = repr(default) if isinstance(default, str) else default
    return f"{doc} [{type_name(kind)}, default {shown}]".strip()


def _metavar(kind: Any) -> str:
    if is_union(kind):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(str(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        if args[-1] is ...:
            return f"{_metavar(args[0])},..."
        return " ".join(_metavar(arg) for arg in args)
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "VALUE")


def _num_values(kind: Any) -> int:
    """How many words follow a flag: 0 for bool, n for a tuple of n, else 1."""
    if kind is bool:
        return 0
    if is_union(kind):
        return max(_num_values(k) for k in typing.get_args(kind))
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and args and args[-1] is not Ellipsis:
        return len(args)
    return 1


def _is_numbers(kind: Any) -> bool:
    """Whether a tuple is of numbers, in which a comma can only stand between two."""
    if is_union(kind):
        return any(_is_numbers(k) for k in typing.get_args(kind))
    args = typing.get_args(kind)
    is_tuple = typing.get_origin(kind) is tuple
    return is_tuple and all(arg in (int, float) for arg in args)


class _Parser:
    """Reads words from left to right into flag values."""

    def __init__(self, options: type, *, config: bool, overrides: bool):
        self.options = options
        self.kinds = field_types(options)
        fields = dataclasses.fields(options)
        self.flags = {flag_name(f): f.name for f in fields if not is_positional(f)}
        self.positionals = [f.name for f in fields if is_positional(f)]
        self.takes_config = config
        self.takes_overrides = overrides
        self.config: str | None = None
        self.changes: list[tuple[str, str]] = []
        self.values: dict[str, Any] = {}

    def read(self, words: list[str]) -> None:
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                self._positional(word)
                continue
            name, equals, value = word[2:].partition("=")
            given = value if equals else None
            if name == "config" and self.takes_config:
                self.config = self._value(name, given, words)
            elif name.startswith("config.") and self.takes_overrides:
                text = self._value(name, given, words)
                self.changes.append((name.removeprefix("config."), text))
            else:
                self._flag(name.replace("-", "_"), given, words)

    def result(self) -> CommandLine:
        for field in dataclasses.fields(self.options):
            if field.name not in self.values and not has_default(field):
                self._missing(field)
        values = resolve(self.options, self.values, path=PATH)
        return CommandLine(
            config=self.config,
            overrides=tuple(self.changes),
            flags=build(self.options, values, path=PATH),
        )

    def _flag(self, name: str, given: str | None, words: list[str]) -> None:
        if name not in self.flags:
            known = [f"--{flag}" for flag in self.flags]
            known += ["--config"] if self.takes_config else []
            known += ["--config.KEY"] if self.takes_overrides else []
            hint = nearest(f"--{name}", known)
            if name.split(".")[0] in CONFIG_GROUPS and self.takes_overrides:
                hint = f"Config values are set as --config.{name}=VALUE"
            raise UserError(f"command line: unknown flag '--{name}'. {hint}")
        field = self.flags[name]
        kind = self.kinds[field]
        count = _num_values(kind)
        if count == 0:
            value: Any = Text("true" if given is None else given)
        elif count == 1 or given is not None:
            value = Text(self._value(name, given, words))
        elif words and "," in words[0] and _is_numbers(kind):
            value = Text(words.pop(0))
        else:
            value = [Text(self._value(name, None, words)) for _ in range(count)]
        self._store(field, f"--{name}", value)

    def _positional(self, word: str) -> None:
        left = [name for name in self.positionals if name not in self.values]
        if not left:
            raise UserError(
                f"command line: does not know what to do with {word!r}. "
                f"Flags begin with two dashes: --NAME=VALUE"
            )
        self._store(left[0], left[0].upper(), Text(word))

    def _store(self, field: str, shown: str, value: Any) -> None:
        """Check one value now, so that the message names the flag as typed."""
        kind = self.kinds[field]
        holder = dataclasses.make_dataclass("Flag", [("value", kind)])
        try:
            resolve(holder, {"value": value}, path=PATH)
        except UserError as error:
            text = str(error).replace(f"--{PATH}.value", shown)
            raise UserError(text.replace(f"{PATH}.value", shown)) from None
        self.values[field] = value

    def _value(self, name: str, given: str | None, words: list[str]) -> str:
        if given is not None:
            return given
        if not words or words[0].startswith("--"):
            raise UserError(
                f"--{name}: needs a value; got none. Give it as --{name}=VALUE"
            )
        return words.pop(0)

    def _missing(self, field: dataclasses.Field) -> None:
        shown = field.name.upper()
        if not is_positional(field):
            shown = f"--{flag_name(field)}"
        doc = field_docs(self.options).get(field.name, "").rstrip(".")
        raise UserError(f"{shown}: is required{': ' if doc else ''}{doc}.")


PATH = "flags"
CONFIG_GROUPS = ("model", "data", "task", "optim", "train", "eval", "mesh")
