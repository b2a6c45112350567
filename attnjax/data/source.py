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
    Sources of images live in `attnjax.data.images` and return an `ImageCorpus`.

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


TEXT, IMAGES = "attnjax.data", "attnjax.data.images"
_MODELS = {TEXT: "text, for config.model.name=lm", IMAGES: "images, for vit and dit"}


def _modules(package: str) -> list[str]:
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(item.name for item in found if not item.ispkg)


def known_sources(package: str = TEXT) -> dict[str, SourceSpec]:
    """Every source by prefix: the files of a package that declare `SOURCE`."""
    names = _modules(package)
    loaded = {name: importlib.import_module(f"{package}.{name}") for name in names}
    return {n: m.SOURCE for n, m in loaded.items() if hasattr(m, "SOURCE")}


def source_module(name: str, package: str = TEXT) -> ModuleType:
    """The file that serves `name` ("PREFIX" or "PREFIX:ARGUMENT").

    Args:
        name: `config.data.name`.
        package: `TEXT` or `IMAGES`, where the file is.

    Raises:
        UserError: no file of the package is a source of that prefix, or the argument
            is missing or superfluous.
    """
    prefix, colon, argument = str(name).partition(":")
    known = prefix in _modules(package)
    module = importlib.import_module(f"{package}.{prefix}") if known else None
    if module is None or not hasattr(module, "SOURCE"):
        raise _unknown(name, prefix, package)
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


def _unknown(name: str, prefix: str, package: str) -> UserError:
    """The error for a prefix that is no source, or one of the other kind."""
    names = [
        f"{key}:{spec.argument}" if spec.argument else key
        for key, spec in known_sources(package).items()
    ]
    error = unknown("data", "source", name, names)
    other = IMAGES if package == TEXT else TEXT
    if prefix in known_sources(other):
        return UserError(f"{error} {prefix} is a source of {_MODELS[other]}.")
    return error
