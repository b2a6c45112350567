"""What the table of a study says: rows, columns, metrics, baseline, paper's numbers.

A `Table` names labels, which every point of a sweep carries, and metrics, written as
"<split>/<name>" after the lines of metrics.jsonl: "eval/loss", "train/loss"; the name
of an evaluation that points ask for is a split as well.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from attnjax.core.errors import UserError, nearest

SPLITS = ("eval", "train")
# Words in the name of a metric of which more is better; of any other, less is.
_MORE_IS_BETTER = {
    "accuracy",
    "acc",
    "top1",
    "top5",
    "em",
    "f1",
    "bleu",
    "psnr",
    "named",
}
_MORE_IS_BETTER |= {"recall", "precision", "auc", "reward"}


@dataclasses.dataclass(frozen=True)
class PaperValue:
    """A number that a paper reports, shown beside ours and marked as the paper's.

    Attributes:
        labels: label -> value of the row (and column) it belongs to.
        metric: one of the table's metrics.
        value: in the units of the metric.
        source: where it stands, as in "Qiu et al. 2025, Table 1".
    """

    labels: Mapping[str, Any]
    metric: str
    value: float
    source: str

    def __post_init__(self):
        _check_mapping(self.labels, "PaperValue.labels")
        _check_text(self.metric, "PaperValue.metric")
        _check_text(self.source, "PaperValue.source")
        number = isinstance(self.value, int | float) and not isinstance(
            self.value, bool
        )
        if not number or not math.isfinite(self.value):
            raise UserError(
                f"PaperValue: value must be a finite number; got value={self.value!r}."
            )
        object.__setattr__(self, "labels", dict(self.labels))


@dataclasses.dataclass(frozen=True)
class Table:
    """How the points of a sweep are put together.

    Attributes:
        rows: label names; one row for each combination of their values.
        columns: label names whose values are spread over columns; may be empty.
        metrics: "<split>/<name>" as in metrics.jsonl; the first one is drawn.
        baseline: label -> value of what every row is compared with. Labels it does
            not name stay those of the row: {"mixer": "softmax"} with rows ("mixer",
            "size") compares each size with softmax of the same size. None: nothing
            is compared.
        seed: the label that tells repetitions apart.
        best: show each run's best evaluation, not its last.
        paper: the paper's own numbers.
        higher_is_better: metrics of which more is better, beside accuracy and the
            like, which are known by name.
        uncompared: metrics that are shown without the difference to the baseline.
        leave_out: label -> value of points that are in no row, such as a judge of the
            others. None: every point is in a row.
        title, caption: text above and below.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("eval/loss",)
    baseline: Mapping[str, Any] | None = None
    seed: str = "seed"
    best: bool = False
    paper: tuple[PaperValue, ...] = ()
    higher_is_better: tuple[str, ...] = ()
    uncompared: tuple[str, ...] = ()
    leave_out: Mapping[str, Any] | None = None
    title: str = ""
    caption: str = ""

    def __post_init__(self):
        lists = ("rows", "columns", "metrics", "higher_is_better", "uncompared")
        for name in lists:
            object.__setattr__(self, name, _names(getattr(self, name), name))
        for name in ("seed", "title", "caption"):
            _check_text(getattr(self, name), f"Table.{name}", empty=name != "seed")
        if not self.metrics:
            raise UserError("Table: metrics must name at least one metric; got none.")
        for metric in (*self.metrics, *self.higher_is_better, *self.uncompared):
            check_metric_form(metric)
        for metric in self.uncompared:
            if metric not in self.metrics:
                raise UserError(
                    "Table: uncompared must name metrics of the table; got "
                    f"{metric!r}. {nearest(metric, self.metrics)}"
                )
        if not isinstance(self.best, bool):
            raise UserError(f"Table: best must be True or False; got {self.best!r}.")
        self._check_labels_once()
        if self.leave_out is not None:
            _check_mapping(self.leave_out, "Table.leave_out")
            object.__setattr__(self, "leave_out", dict(self.leave_out))
        if self.baseline is not None:
            _check_mapping(self.baseline, "Table.baseline")
            object.__setattr__(self, "baseline", dict(self.baseline))
            self._known(self.baseline, "baseline")
        object.__setattr__(self, "paper", tuple(self.paper))
        for value in self.paper:
            self._check_paper(value)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal table."""
        found = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Table":
        """The table that `to_json` wrote.

        Raises:
            UserError: an unknown key, or a value that a table may not have.
        """
        if not isinstance(value, Mapping):
            raise UserError(f"Table: must be a JSON object; got {value!r}.")
        _check_keys(value, cls)
        given = dict(value)
        for one in given.get("paper", ()):
            _check_keys(one, PaperValue)
        given["paper"] = tuple(PaperValue(**one) for one in given.get("paper", ()))
        return cls(**given)

    def check(self, labels: Iterable[Mapping[str, Any]]) -> None:
        """Verify the table against the labels of every point.

        Args:
            labels: label -> value of each point.

        Raises:
            UserError: a row or column that no point has as a label, a baseline or a
                paper's value that is in no row, or two points that would fall on one
                place of the table with one seed.
        """
        given = [dict(each) for each in labels]
        points = [point for point in given if self.has(point)]
        if given and not points:
            raise UserError(
                "Table: leave_out must leave points; got "
                f"leave_out={show_labels(self.leave_out)}, which all have."
            )
        if self.leave_out is not None and len(points) == len(given):
            raise UserError(
                "Table: leave_out must be labels of a point; got "
                f"leave_out={show_labels(self.leave_out)}. "
                f"{_have(self.leave_out, points)}"
            )
        known = sorted({name for point in points for name in point})
        for part in ("rows", "columns"):
            for name in getattr(self, part):
                self._check_label(name, part, points, known)
        self._check_baseline(points)
        for value in self.paper:
            if not any(matches(value.labels, point) for point in points):
                raise UserError(
                    f"Table: a paper's value must belong to a point; got {show(value)}"
                    f". {_have(value.labels, points)}"
                )
        self._check_places(points)

    def has(self, labels: Mapping[str, Any]) -> bool:
        """Whether a point with these labels is in a row."""
        return self.leave_out is None or not matches(self.leave_out, labels)

    def cut_to(
        self, labels: Iterable[Mapping[str, Any]], *, metrics: Iterable[str]
    ) -> "Table":
        """The table of some of the points: without a baseline, figures of the paper,
        points to leave out, or metrics, that are of others.

        Args:
            labels: label -> value of each point that is left.
            metrics: those that their runs have; where they have none of the table's,
                all stay.
        """
        given = list(labels)
        points = [one for one in given if self.has(one)]

        def belongs(wanted: Mapping[str, Any]) -> bool:
            return any(matches(wanted, point) for point in points)

        metrics = frozenset(metrics).intersection(self.metrics) or self.metrics
        paper = (v for v in self.paper if belongs(v.labels) and v.metric in metrics)
        has_baseline = self.baseline is not None and belongs(self.baseline)
        baseline = self.baseline if has_baseline else None
        leave_out = self.leave_out if len(points) < len(given) else None
        return dataclasses.replace(
            self,
            metrics=tuple(m for m in self.metrics if m in metrics),
            uncompared=tuple(m for m in self.uncompared if m in metrics),
            paper=tuple(paper),
            baseline=baseline,
            leave_out=leave_out,
        )

    def check_splits(self, evaluations: Iterable[str]) -> None:
        """Refuse a metric of an evaluation that no point asks for.

        Args:
            evaluations: the names of those that points ask for.

        Raises:
            UserError: with the nearest ones.
        """
        known = sorted({*SPLITS, *evaluations})
        for metric in self.metrics:
            split = metric.partition("/")[0]
            if split not in known:
                raise UserError(
                    f"Table: a metric's split must be eval, train or an evaluation of "
                    f"a point; got {metric!r}. {nearest(split, known)}"
                )

    def _check_label(
        self, name: str, part: str, points: list[dict], known: list[str]
    ) -> None:
        if name not in known:
            raise UserError(
                f"Table: {part} must name labels of the points; got {name!r}. "
                f"{nearest(name, known)}"
            )
        without = next((point for point in points if name not in point), None)
        if without is not None:
            raise UserError(
                f"Table: every point must have the labels in {part}; got a point "
                f"without {name!r}: {show_labels(without)}."
            )

    def _check_baseline(self, points: list[dict]) -> None:
        if self.baseline is None or not points:
            return
        if not any(matches(self.baseline, point) for point in points):
            raise UserError(
                f"Table: the baseline must be a row; got "
                f"baseline={show_labels(self.baseline)}. "
                f"{_have(self.baseline, points)}"
            )

    def _check_places(self, points: list[dict]) -> None:
        """No two points on one place with one seed: one would hide the other."""
        seen: dict[tuple, dict] = {}
        placed = (*self.rows, *self.columns, self.seed)
        for point in points:
            place = tuple(text_of(point.get(name)) for name in placed)
            other = seen.setdefault(place, point)
            if other is point:
                continue
            rest = sorted(
                name
                for name in point.keys() | other.keys()
                if text_of(point.get(name)) != text_of(other.get(name))
            )
            cure = (
                f"Add {' or '.join(map(repr, rest))} to rows or columns."
                if rest
                else "Give them different labels."
            )
            raise UserError(
                "Table: rows, columns and seed must tell the points apart; got two "
                f"points with {show_labels({n: point.get(n) for n in placed})}. {cure}"
            )

    def _check_labels_once(self) -> None:
        seen = set()
        for name in (*self.rows, *self.columns, self.seed):
            if name in seen:
                raise UserError(
                    "Table: rows, columns and seed must be different labels; got "
                    f"{name!r} twice."
                )
            seen.add(name)

    def _check_paper(self, value: PaperValue) -> None:
        if not isinstance(value, PaperValue):
            raise UserError(
                f"Table: paper must hold PaperValue objects; got {value!r}."
            )
        self._known(value.labels, "paper")
        if value.metric not in self.metrics:
            raise UserError(
                f"Table: a paper's value must be of a metric of the table; got "
                f"{value.metric!r}. {nearest(value.metric, self.metrics)}"
            )

    def _known(self, labels: Mapping[str, Any], what: str) -> None:
        places = (*self.rows, *self.columns)
        for name in labels:
            if name not in places:
                raise UserError(
                    f"Table: {what} must name labels of rows or columns; got "
                    f"{name!r}. {nearest(name, places)}"
                )


def more_is_better(metric: str, declared: Iterable[str] = ()) -> bool:
    """Whether the best value of a metric is its greatest."""
    words = metric.rpartition("/")[2].lower().split("_")
    return metric in tuple(declared) or bool(_MORE_IS_BETTER.intersection(words))


def check_metric_form(metric: str) -> None:
    """Refuse a metric that is not written as "<split>/<name>"."""
    split, _, name = metric.partition("/")
    if not split.isidentifier() or not name:
        name = metric.rpartition("/")[2] or "loss"
        raise UserError(
            "metric: must be <split>/<name> with split eval, train or an evaluation's "
            f"name; got {metric!r}. Write eval/{name} or train/{name}."
        )


def matches(wanted: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """Whether `labels` have every value in `wanted`."""
    return all(
        name in labels and text_of(labels[name]) == text_of(value)
        for name, value in wanted.items()
    )


def text_of(value: Any) -> str:
    """A label's value as it is written in tables and on command lines."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    if isinstance(value, list | tuple):
        return " ".join(text_of(each) for each in value)
    return str(value)


def show_labels(labels: Mapping[str, Any]) -> str:
    """Labels as in `mixer=gated, seed=0`."""
    return ", ".join(f"{name}={text_of(value)}" for name, value in labels.items())


def show(value: PaperValue) -> str:
    """A paper's value as in `eval/loss 2.3 (source) of mixer=gated`."""
    of = f" of {show_labels(value.labels)}" if value.labels else ""
    return f"{value.metric} {value.value:g} ({value.source}){of}"


def _have(wanted: Mapping[str, Any], points: list[dict]) -> str:
    """What the labels in `wanted` are in the points, nearest first."""
    known = sorted({name for point in points for name in point})
    for name, value in wanted.items():
        if name not in known:
            return f"No point has the label {name!r}. {nearest(name, known)}"
        values = sorted({text_of(point[name]) for point in points if name in point})
        if text_of(value) not in values:
            return f"{name}: {nearest(text_of(value), values)}"
    return "No point has all of these together."


def _names(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise UserError(
            f"Table: {what} must be a tuple of names; got {what}={value!r}. Write "
            f"{what}=({value!r},)."
        )
    for name in value:
        _check_text(name, f"Table.{what}")
    if len(set(value)) != len(value):
        raise UserError(f"Table: {what} must not repeat a name; got {tuple(value)}.")
    return tuple(value)


def _check_text(value: Any, what: str, *, empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or empty):
        raise UserError(f"{what}: must be text; got {value!r}.")


def _check_mapping(value: Any, what: str) -> None:
    if not isinstance(value, Mapping) or not value:
        raise UserError(
            f"{what}: must map label names to values, as in {{'mixer': 'gated'}}; "
            f"got {value!r}."
        )
    for name, one in value.items():
        if not isinstance(name, str) or not _is_plain(one):
            raise UserError(
                f"{what}: must map label names to text or numbers; got "
                f"{name!r}: {one!r}."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, str | int | float | bool)


def _check_keys(value: Any, cls: type) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{cls.__name__}: must be a JSON object; got {value!r}.")
    fields = dataclasses.fields(cls)
    known = [field.name for field in fields]
    for key in value:
        if key not in known:
            raise UserError(
                f"{cls.__name__}: unknown key {key!r}. {nearest(key, known)}"
            )
    for field in fields:
        required = field.default is dataclasses.MISSING
        if required and field.name not in value:
            raise UserError(f"{cls.__name__}: {field.name} is required; got none.")
