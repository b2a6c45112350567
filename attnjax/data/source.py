"""The contract between a source's file and the room, and how files are found."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from attnjax.core.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """What a source's file declares, as its module attribute `SOURCE`.

    The file also holds `Config` (a frozen dataclass) and `open_source(config)`,
    which returns a `Corpus` or, for text, a `TextSource` that the room tokenises.

    Attributes:
        summary: one line for people.
        argument: what follows the colon in `name`, "" if nothing may.
    """

    summary: str
    argument: str = ""


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Documents that are not tokenised yet.

    Attributes:
        label: short name for progress lines and cache folders.
        identity: JSON-able facts that change when the text may have changed
            (paths, sizes, times, versions): the key of the cache, not its proof.
        train: makes a new iterator over the documents to train on.
        eval: the same for the held-out documents.
        provenance: JSON-able facts for the run's manifest.
    """

    label: str
    identity: dict[str, Any]
    train: Callable[[], Iterator[str]]
    eval: Callable[[], Iterator[str]]
    provenance: dict[str, Any]


def _modules() -> list[str]:
    package = importlib.import_module("attnjax.data")
    found = pkgutil.iter_modules(package.__path__)
    return sorted(item.name for item in found if not item.ispkg)


def _load(prefix: str) -> ModuleType:
    return importlib.import_module(f"attnjax.data.{prefix}")


def known_sources() -> dict[str, SourceSpec]:
    """Every source by prefix: the files of this room that declare `SOURCE`."""
    loaded = {name: _load(name) for name in _modules()}
    return {n: m.SOURCE for n, m in loaded.items() if hasattr(m, "SOURCE")}


def source_module(name: str) -> ModuleType:
    """The file that serves `name` ("PREFIX" or "PREFIX:ARGUMENT").

    Raises:
        UserError: no file of this room is a source of that prefix, or the argument
            is missing or superfluous.
    """
    prefix, colon, argument = str(name).partition(":")
    module = _load(prefix) if prefix in _modules() else None
    if module is None or not hasattr(module, "SOURCE"):
        names = [
            f"{key}:{spec.argument}" if spec.argument else key
            for key, spec in known_sources().items()
        ]
        raise unknown("data", "source", name, names)
    spec = module.SOURCE
    if spec.argument and not argument:
        raise UserError(
            f"data: {prefix} needs an argument; got name={name!r}. "
            f"Write {prefix}:{spec.argument}."
        )
    if colon and not spec.argument:
        raise UserError(
            f"data: {prefix} takes no argument; got name={name!r}. Write {prefix}."
        )
    return module
