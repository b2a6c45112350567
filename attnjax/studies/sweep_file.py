"""From a sweep file to checked points, each with its resolved config and directory."""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from attnjax.core import config as configs
from attnjax.core import mappings
from attnjax.core.errors import UserError
from attnjax.core.userfile import read_source, run_file, told_as_user_error
from attnjax.studies import evaluations, groups, judges, ledger, selection, worker
from attnjax.studies.evaluations import Evaluation
from attnjax.studies.places import FOLDERS, STUDY, config_path, run_directory
from attnjax.studies.points import Point, find_config
from attnjax.studies.table import Table
from attnjax.training import disk, experiment, identity, members

OWNER = "--sweep"
FORMAT = 1
_HASH_LETTERS = 16


@dataclasses.dataclass(frozen=True)
class Planned:
    """A point with everything settled.

    Attributes:
        hash: of the resolved config, as far as it is the run's identity; the name of
            its directory.
        labels: name -> value.
        source: the config file as the sweep gives it.
        overrides: dotted key -> value.
        config: resolved.
        vectorize, evaluations: see `Point`.
    """

    hash: str
    labels: Mapping[str, Any]
    source: str
    overrides: Mapping[str, Any]
    config: dict
    vectorize: bool | Literal["auto"] = False
    evaluations: Sequence[Evaluation] = ()

    @property
    def name(self) -> str:
        """Its labels as words."""
        return " ".join(f"{k}={v}" for k, v in self.labels.items()) or self.hash


@dataclasses.dataclass(frozen=True)
class Element:
    """Points that one process runs, and the words that start it."""

    points: tuple[Planned, ...]
    command: list[str]


@dataclasses.dataclass(frozen=True)
class Study:
    """The points and the table of one sweep file, and the directory they live in.

    Attributes:
        workdir: absolute.
        file: the sweep file.
        points: all of them, in order.
        table: of the report; None: a default one.
        only: "LABEL=VALUE,..." of the points that are asked for (`selection`); None:
            all.
    """

    workdir: Path
    file: Path
    points: tuple[Planned, ...]
    table: Table | None
    only: str | None = None

    @property
    def asked(self) -> tuple[Planned, ...]:
        """The points that `only` names: those to be run.

        Raises:
            UserError: it names none.
        """
        if self.only is None:
            return self.points
        chosen = selection.selected(self.only, [one.labels for one in self.points])
        return tuple(itertools.compress(self.points, chosen))

    @cached_property
    def by_hash(self) -> dict[str, Planned]:
        """hash -> point."""
        return {one.hash: one for one in self.points}

    def run_directory(self, point: Planned) -> Path:
        """Where a point's run is."""
        return run_directory(self.workdir, point.hash)

    def command(self, point: Planned) -> list[str]:
        """The words that run a point, and those it may take along, in a process."""
        if point.vectorize:
            how = point.vectorize
            return groups.command(self.workdir, point.hash, vectorize=how)
        return worker.command(self.workdir, point.hash)

    def elements(self, points: Sequence[Planned]) -> list[Element]:
        """Points as the processes that run them: those to be trained together in one.

        What is not in `points` is not run, so the elements do not meet.
        """
        found: list[list[Planned]] = []
        rooms: dict[tuple, list[Planned]] = {}
        for point in points:
            if point.vectorize:
                kind = (members.common(point.config), point.vectorize)
                room = rooms.get(kind)
                if room is not None and len(room) < groups.LARGEST:
                    room.append(point)
                    continue
                rooms[kind] = room = [point]
                found.append(room)
            else:
                found.append([point])
        return [Element(tuple(some), self._together(some)) for some in found]

    def _together(self, points: Sequence[Planned]) -> list[str]:
        first, *rest = points
        if not rest:
            return worker.command(self.workdir, first.hash)
        others = [one.hash for one in rest]
        how = first.vectorize
        return groups.command(self.workdir, first.hash, vectorize=how, beside=others)

    def write(self) -> None:
        """Put the points' configs and sweep.json into the directory.

        Raises:
            UserError: the directory is a run's, or the disk is full or forbidden.
        """
        if (self.workdir / "manifest.json").exists():
            raise UserError(
                f"--workdir: {str(self.workdir)!r} is the directory of one run. Give "
                "the sweep one of its own."
            )
        with disk.disk_errors("workdir"):
            for folder in FOLDERS:
                (self.workdir / folder).mkdir(parents=True, exist_ok=True)
        # One driver at a time: atomic writes of one name use one temporary file.
        with ledger.locked(self.workdir / ".lock"), disk.disk_errors("workdir"):
            for one in self.points:
                path = config_path(self.workdir, one.hash)
                if not path.is_file():
                    disk.write_json(path, one.config)
                evaluations.write_wanted(self.workdir, one.hash, one.evaluations)
            disk.write_json(self.workdir / STUDY, self._content())

    def _content(self) -> dict:
        return {
            "format": FORMAT,
            "sweep": self.file.name,
            "sha256": hashlib.sha256(self.file.read_bytes()).hexdigest(),
            "table": None if self.table is None else self.table.to_json(),
            "points": [
                {
                    "hash": one.hash,
                    "config": one.source,
                    "overrides": dict(one.overrides),
                    "labels": dict(one.labels),
                    **({"vectorize": one.vectorize} if one.vectorize else {}),
                    **_evaluations(one),
                }
                for one in self.points
            ],
        }


def _evaluations(one: Planned) -> dict:
    asked = [evaluation.to_json() for evaluation in one.evaluations]
    return {"evaluations": asked} if asked else {}


def load(path: str | Path, workdir: str | Path, *, only: str | None = None) -> Study:
    """Run a sweep file and settle its points; nothing is written.

    Args:
        path: the sweep file.
        workdir: the sweep's directory.
        only: see `Study`.

    Raises:
        UserError: the file is missing, fails, has no sweep(), gives no points, two
            with the same labels or the same config, one whose config does not hold
            (named by its labels), a table that does not fit, or an `only` that no
            point has.
    """
    path = Path(path)
    read_source(path, owner=OWNER)
    module = run_file(path, owner=OWNER, module_name="attnjax_sweep_file")
    points = _points(module, path)
    settled, cache = [], {}
    for number, one in enumerate(points):
        settled.append(_settle(one, path, number, cache))
    _refuse_equals(settled)
    with _at(path):
        settled = judges.settle(settled)
    together = {one.name: one.config for one in settled if one.vectorize}
    if together:
        with _at(path):
            groups.check(together)
    table = _table(module, path)
    if table is not None:
        with _at(path):
            table.check([one.labels for one in settled])
            table.check_splits(e.name for one in settled for e in one.evaluations)
    study = Study(Path(workdir).absolute(), path, tuple(settled), table, only)
    _ = study.asked  # What it names wrongly is told now.
    return study


def _points(module: Any, path: Path) -> list[Point]:
    function = getattr(module, "sweep", None)
    if not callable(function):
        raise UserError(
            f"{OWNER}: {path} must define sweep(), which returns the points. "
            "attnjax.studies has helpers: point, grid, zipped, concat, seeds."
        )
    with _at(path), told_as_user_error(path, owner=OWNER):
        points = function()
    if not isinstance(points, list | tuple) or not all(
        isinstance(one, Point) for one in points
    ):
        raise UserError(
            f"{OWNER}: sweep() of {path} must return a list of attnjax.studies.Point; "
            f"got {_kind(points)}."
        )
    if not points:
        raise UserError(f"{OWNER}: sweep() of {path} gives no points.")
    return list(points)


@contextlib.contextmanager
def _at(path: Path) -> Iterator[None]:
    """Put the sweep file's name before a mistake in what it says."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if text.startswith(f"{OWNER}:"):
            raise
        raise UserError(f"{OWNER}: {path}: {text}") from None


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        odd = next(one for one in value if not isinstance(one, Point))
        return f"a list with a {type(odd).__name__}"
    return type(value).__name__


def _settle(one: Point, path: Path, number: int, cache: dict) -> Planned:
    labels = " ".join(f"{k}={v}" for k, v in one.labels.items())
    where = f"point {number}" + (f" ({labels})" if labels else "")
    file, args = configs.split_spec(one.config)
    try:
        if one.config not in cache:
            found = find_config(file, path)
            spec = str(found or file) + ("" if args is None else f":{args}")
            cache[one.config] = configs.load_file(spec)
        given = configs.apply_values(cache[one.config], one.overrides.items())
        config = experiment.resolve(given)
        evaluations.check(one.evaluations, config)
    except UserError as error:
        raise UserError(f"{OWNER}: {where}: {error}") from None
    digest = mappings.digest(config, exclude=identity.EXCLUDES)
    return Planned(
        digest[:_HASH_LETTERS],
        one.labels,
        one.config,
        one.overrides,
        config,
        one.vectorize,
        one.evaluations,
    )


def _refuse_equals(points: list[Planned]) -> None:
    labels: dict[str, int] = {}
    hashes: dict[str, Planned] = {}
    for number, one in enumerate(points):
        shown = mappings.canonical(dict(one.labels))
        if shown in labels:
            raise UserError(
                f"{OWNER}: labels must differ; points {labels[shown]} and {number} "
                f"both have {one.name}. Add a label, or drop one."
            )
        labels[shown] = number
        if one.hash in hashes:
            raise UserError(
                f"{OWNER}: points must have different configs; {hashes[one.hash].name} "
                f"and {one.name} are the same run. Drop one, or change what its "
                "overrides mean to change."
            )
        hashes[one.hash] = one


def _table(module: Any, path: Path) -> Table | None:
    function = getattr(module, "table", None)
    if function is None:
        return None
    with _at(path), told_as_user_error(path, owner=OWNER):
        table = function()
    if not isinstance(table, Table):
        raise UserError(
            f"{OWNER}: table() of {path} must return an attnjax.studies.Table; got "
            f"{type(table).__name__}."
        )
    return table
