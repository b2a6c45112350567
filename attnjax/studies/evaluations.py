"""Evaluations of a finished point on other data, contexts or layers.

A point asks for them by name; its worker does them after the training, as
`python -m attnjax.evaluate` would. They are no part of the run's identity: one that is
asked for later is all that the same sweep command does then. A name is a split like
"eval": its loss is the metric "<name>/loss". The samples of a denoiser are judged by
another point of the sweep, a classifier: "<name>/frechet", "<name>/named" and so on
(`analysis.sample_quality.judged`).

DIR/configs/<hash>.evaluations.json holds what is asked for, the run's evaluations.json
what was found.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnjax.core import mappings
from attnjax.core.errors import UserError
from attnjax.studies.places import evaluations_path
from attnjax.training import disk, identity, metrics
from attnjax.training.signals import StopSignal

FOUND = "evaluations.json"
_SPLITS = ("train", "eval")  # what a training writes itself
_NOT_METRICS = ("data", "seq_len", "image_size", "corruption", "severity")
PER_CLASS = 100  # samples for a judge
_CURE = "Delete it; run the sweep again."


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of the trained model.

    Attributes:
        name: of its metrics: "<name>/loss".
        overrides: dotted config keys without "config." -> JSON values; they may change
            the data and how the model is run, not what parameters it has.
        keep_layers: the layers (from 0) that stay; None keeps all.
        judge: labels that belong to one point of the sweep alone: the classifier that
            looks at samples of this denoiser (in a settled point: its hash). None: no
            samples are drawn.
        samples: how they are drawn: "per_class" (default 100) and settings of
            `LoadedDenoiser.draw_settings`.
    """

    name: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep_layers: tuple[int, ...] | None = None
    judge: Mapping[str, Any] | str | None = None
    samples: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        name = self.name
        if not isinstance(name, str) or not name.isidentifier() or name in _SPLITS:
            raise UserError(
                "sweep: the name of an evaluation must be letters, digits and _, not "
                f"{' or '.join(_SPLITS)}; got name={name!r}."
            )
        if self.keep_layers is not None:
            object.__setattr__(self, "keep_layers", tuple(self.keep_layers))
        if self.samples and self.judge is None:
            raise UserError(
                "sweep: the samples of an evaluation are drawn for a judge; got "
                f"samples={dict(self.samples)!r} without one. Add judge={{label: "
                "value}, the labels of a classifier's point."
            )

    def to_json(self) -> dict:
        """Its fields as JSON values."""
        kept = None if self.keep_layers is None else list(self.keep_layers)
        found = {
            "name": self.name,
            "overrides": dict(self.overrides),
            "keep_layers": kept,
        }
        if self.judge is not None:
            found |= {"judge": self.judge, "samples": dict(self.samples)}
        return found


def check(wanted: Sequence[Evaluation], config: dict) -> None:
    """Refuse evaluations that a run of this config cannot have.

    Raises:
        UserError: two of one name; an override that does not hold.
    """
    names = [one.name for one in wanted]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"sweep: evaluations must have different names; got {name!r} twice."
            )
    # Here, since what reads a ledger needs no models.
    from attnjax.training import experiment

    for one in wanted:
        try:
            experiment.changed(config, tuple(one.overrides.items()))
        except UserError as error:
            raise UserError(f"evaluation {one.name}: {error}") from None


def write_wanted(workdir: Path, point_hash: str, wanted: Iterable[Evaluation]) -> None:
    """Leave what a point's worker is to evaluate; no file where that is nothing."""
    path = evaluations_path(workdir, point_hash)
    content = [one.to_json() for one in wanted]
    if not content:
        path.unlink(missing_ok=True)
    elif not path.is_file() or _read(path) != content:
        disk.write_json(path, content)


def missing(run: Path) -> list[Evaluation]:
    """What is asked for of a point's run and was not found yet.

    Args:
        run: the point's run directory; one outside a sweep misses nothing.

    Raises:
        UserError: a file is damaged.
    """
    path = evaluations_path(run.parent.parent, run.name)
    if not path.is_file():
        return []
    found = _found(run)
    return [
        _of_json(asked)
        for asked in _read(path)
        if found.get(asked["name"], {}).get("asked") != _identity(asked, run)
    ]


def rows(run: Path) -> list[dict]:
    """What was found, as lines of metrics.jsonl with the name as their split.

    Raises:
        UserError: the file is damaged.
    """
    return [metrics.decode(one["row"]) for one in _found(run).values()]


def judges(run: Path) -> list[str]:
    """The hashes of the points that judge what a trained run misses.

    Raises:
        UserError: a file is damaged.
    """
    return list(dict.fromkeys(one.judge for one in missing(run) if one.judge))


def do_missing(run: Path, signals: StopSignal) -> None:
    """Evaluate a trained run wherever that is missing, and note each result at once.

    The judges' runs are trained.

    Raises:
        UserError: an evaluation cannot be done (named).
        StopRequested: a signal came; what was found stays.
    """
    with signals.interrupting():
        for one in missing(run):
            print(f"evaluation {one.name}", flush=True)
            row = _row(run, one)
            found = _found(run)
            found[one.name] = {
                "asked": _identity(one.to_json(), run),
                "row": metrics.encode(row),
            }
            with disk.disk_errors("evaluations"):
                disk.write_json(run / FOUND, found)


def _row(run: Path, one: Evaluation) -> dict:
    from attnjax.decoding.evaluate import evaluate_run
    from attnjax.decoding.run import load_run

    try:
        loaded = load_run(
            run, overrides=tuple(one.overrides.items()), keep_layers=one.keep_layers
        )
        found = evaluate_run(loaded)
        if one.judge is not None:
            found |= _judged(run, loaded, one)
    except UserError as error:
        raise UserError(f"evaluation {one.name}: {error}") from None
    values = {k: v for k, v in found.items() if k not in _NOT_METRICS}
    return {**values, "split": one.name}


def _judged(run: Path, loaded: Any, one: Evaluation) -> dict:
    """What the judge says of samples that are drawn now."""
    from attnjax.analysis.sample_quality import judged
    from attnjax.decoding.run import load_run, require_denoiser

    settings = dict(one.samples)
    per_class = settings.pop("per_class", PER_CLASS)
    judge = load_run(run.with_name(one.judge), owner="judge")
    return judged(require_denoiser(loaded), judge, per_class=per_class, **settings)


def _identity(asked: dict, run: Path) -> dict:
    """What a result is of; another run in the directory, or a longer one, differs."""
    config = disk.read_json(run / "config.json", owner="sweep", cure=_CURE)
    return {
        **{name: value for name, value in asked.items() if name != "name"},
        "run": mappings.digest(config, exclude=identity.EXCLUDES),
    }


def _found(run: Path) -> dict:
    path = run / FOUND
    if not path.is_file():
        return {}
    found = disk.read_json(path, owner="evaluations", cure=_CURE)
    if not isinstance(found, dict) or not all(
        isinstance(one, dict) and {"asked", "row"} <= one.keys()
        for one in found.values()
    ):
        raise UserError(f"evaluations: {str(path)!r} is damaged. {_CURE}")
    return found


def _read(path: Path) -> list[dict]:
    return disk.read_json(path, owner="sweep", cure=_CURE)


def _of_json(asked: dict) -> Evaluation:
    return Evaluation(**asked)
