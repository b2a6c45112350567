"""Reading runs: of a sweep's directory, or of any folder that holds runs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnjax.core.errors import UserError
from attnjax.studies import evaluations, labels, ledger, places
from attnjax.studies.table import Table
from attnjax.training import disk, metrics

FORMAT = 1  # of sweep.json


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as tables see it.

    Attributes:
        labels: name -> value.
        hash: of its config, shortened.
        path: its directory.
        state: done, failed, running, pending, or unfinished (of a lone run).
        error: why it failed, or None.
        step: the newest in metrics.jsonl.
        config: resolved; None where the run never began.
        summary: summary.json of a finished run, else {}.
        rows: of metrics.jsonl.
    """

    labels: dict[str, Any]
    hash: str
    path: Path
    state: str
    error: str | None
    step: int
    config: dict | None
    summary: dict
    rows: list[dict]

    @property
    def unit(self) -> str:
        """What a finished run counted: "image" or "token"."""
        return "image" if "images_seen" in self.summary else "token"

    @property
    def is_done(self) -> bool:
        """Whether it has a summary to show."""
        return self.state == "done"

    @property
    def name(self) -> str:
        """Its labels as words."""
        return " ".join(f"{k}={v}" for k, v in self.labels.items()) or self.path.name


def collect(folder: str | Path) -> tuple[list[Run], Table | None]:
    """The runs of a folder in order, and its table where a sweep left one.

    Raises:
        UserError: the folder is missing or holds no runs; a file is damaged (named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"report: DIR must be a folder with runs; got {str(folder)!r}, which does "
            "not exist or is a file. Give the --workdir of a sweep."
        )
    if (folder / places.STUDY).is_file():
        return _of_sweep(folder)
    runs = [_read(path, {}) for path in _walk(folder)]
    if not runs:
        raise UserError(
            f"report: {str(folder)!r} holds no runs (directories with config.json). "
            "Give the --workdir of a sweep, or a folder above run directories."
        )
    return _labelled(runs, folder), None


def _of_sweep(folder: Path) -> tuple[list[Run], Table | None]:
    cure = "Run the sweep again; finished points stay."
    content = disk.read_json(folder / places.STUDY, owner="report", cure=cure)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"report: {str(folder / places.STUDY)!r} is not a sweep of format "
            f"{FORMAT}. {cure}"
        )
    runs = []
    for one in content.get("points", ()):
        if not isinstance(one, dict) or not {"hash", "labels"} <= one.keys():
            raise UserError(
                f"report: {str(folder / places.STUDY)!r} has a point without hash "
                f"or labels: {one!r}. {cure}"
            )
        path = places.run_directory(folder, one["hash"])
        state = ledger.current(folder, one["hash"])
        run = _read(path, one["labels"])
        word = "done" if run.is_done else state.state
        if word == "done" and not run.is_done:
            word = "pending"
        runs.append(
            dataclasses.replace(run, hash=one["hash"], state=word, error=state.error)
        )
    if not runs:
        raise UserError(f"report: the sweep in {str(folder)!r} has no points. {cure}")
    table = content.get("table")
    return runs, None if table is None else Table.from_json(table)


def _walk(folder: Path) -> Iterator[Path]:
    """Run directories at or below a folder, sorted; nothing inside a run."""
    if (folder / "config.json").is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield from _walk(child)


def _read(path: Path, labels: dict) -> Run:
    cure = "Restore it from a copy, or move the run away."

    def content(name: str) -> Any:
        file = path / name
        if not file.is_file():
            return None
        value = disk.read_json(file, owner="report", cure=cure)
        if not isinstance(value, dict):
            raise UserError(f"report: {str(file)!r} is not a JSON object. {cure}")
        return value

    config, manifest = content("config.json"), content("manifest.json") or {}
    log = path / "metrics.jsonl"
    rows = metrics.read(log) if log.is_file() else []
    rows += evaluations.rows(path)
    done = ledger.is_trained(path)
    summary = metrics.decode(content("summary.json")) if done else {}
    return Run(
        dict(labels),
        (manifest.get("config_hash") or "")[:16],
        path,
        "done" if done else "unfinished",
        None,
        max((row["step"] for row in rows), default=0),
        config,
        summary,
        rows,
    )


def _labelled(runs: list[Run], folder: Path) -> list[Run]:
    """Runs without a sweep are told apart by the config values in which they differ."""
    names = [str(run.path.relative_to(folder)) for run in runs]
    found = labels.from_configs([run.config or {} for run in runs], names)
    return [
        dataclasses.replace(run, labels=own)
        for run, own in zip(runs, found, strict=True)
    ]
