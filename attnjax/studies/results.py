"""From runs to the numbers of a table: one `Cell` for each row, column and metric."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnjax.core.errors import UserError
from attnjax.studies import footnotes, state_size, statistics
from attnjax.studies.collect import Run
from attnjax.studies.table import PaperValue, Table, matches, text_of
from attnjax.studies.values import check_metrics, is_timed, metric_of
from attnjax.training.feeds.text import DECODE_STATE

# Costs beside the metrics: title, and how they are read from the summary.json of a run
# that counts in this unit.
COSTS: dict[str, tuple[str, Callable[[dict, str], Any]]] = {
    "parameters": ("parameters", lambda s, unit: s.get("parameters")),
    "flops": ("FLOPs/{unit}", lambda s, unit: s.get(f"forward_flops_per_{unit}")),
    "state": ("state B/token", lambda s, unit: s.get(DECODE_STATE)),
}
TIMED: dict[str, tuple[str, Callable[[dict, str], Any]]] = {
    "speed": (
        "{unit}s/s",
        lambda s, unit: (s.get("time") or {}).get(f"{unit}s_per_second"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One metric of one row in one column.

    Attributes:
        spread: over seeds, None where there is no value.
        difference: to the baseline row, None without one.
        paper: the paper's figure, or None.
        steps: None when the runs are finished; else none is, and the values are of
            these steps (first, last).
    """

    spread: statistics.Spread | None
    difference: statistics.Difference | None
    paper: PaperValue | None
    steps: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        labels: values of the row labels, in the table's order.
        cells: (column, metric) -> cell.
        costs: column -> name -> mean over the finished runs, None where unknown.
        hashes: config hashes of its runs, first to last.
        is_baseline: whether others are compared with it in every column.
    """

    labels: tuple[Any, ...]
    cells: dict[tuple[tuple, str], Cell]
    costs: dict[tuple, dict[str, float | None]]
    hashes: tuple[str, ...]
    is_baseline: bool

    def cost(self, name: str) -> float | None:
        """A cost of the row: the mean over its columns."""
        known = [one[name] for one in self.costs.values() if one[name] is not None]
        return sum(known) / len(known) if known else None


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that formats show.

    Attributes:
        table: what was asked for.
        columns: values of the column labels, one tuple a column; [()] without any.
        rows: in the order of the runs.
        notes: footnotes.
        runs: all runs, for curves.
    """

    table: Table
    columns: list[tuple]
    rows: list[Row]
    notes: list[str]
    runs: list[Run]

    @property
    def units(self) -> tuple[str, ...]:
        """What the finished runs counted: "token", "image" or both."""
        found = dict.fromkeys(run.unit for run in self.runs if run.is_done)
        return tuple(found) or ("token",)

    @property
    def places(self) -> list[tuple[tuple, str]]:
        """(column, metric) of the numbers, a metric that a column's runs do not have
        left out: one of images has none of texts."""
        return [
            (column, metric)
            for column in self.columns
            for metric in self.table.metrics
            if self._has(column, metric)
        ]

    def _has(self, column: tuple, metric: str) -> bool:
        cells = [row.cells[column, metric] for row in self.rows]
        if any(cell.spread or cell.paper for cell in cells):
            return True
        return not any(
            row.cells[column, other].spread
            for row in self.rows
            for other in self.table.metrics
        )

    def title_of(self, column: tuple) -> str:
        """A column's label values as words; "" where there is one column."""
        pairs = zip(self.table.columns, column, strict=True)
        return ", ".join(f"{name}={text_of(value)}" for name, value in pairs)


def default_table(runs: Sequence[Run]) -> Table:
    """Rows by every label but the seed, and the held-out loss."""
    names = list(dict.fromkeys(name for run in runs for name in run.labels))
    rows = tuple(name for name in names if name != "seed")
    return Table(rows=rows or tuple(names))


def without_timing(table: Table) -> Table:
    """The table without the metrics that a clock measured.

    Raises:
        UserError: when no metric is left.
    """
    kept = tuple(metric for metric in table.metrics if not is_timed(metric))
    if not kept:
        raise UserError(
            "--no_timing: a metric must be left; got only measured times: "
            f"{', '.join(table.metrics)}. Add one with --metric."
        )
    paper = tuple(one for one in table.paper if one.metric in kept)
    uncompared = tuple(metric for metric in table.uncompared if metric in kept)
    return dataclasses.replace(table, metrics=kept, paper=paper, uncompared=uncompared)


def summarise(runs: Sequence[Run], table: Table) -> Results:
    """Group runs into rows and columns, and compare them.

    Raises:
        UserError: a metric that no run has; a label or a baseline that is not there.
    """
    table.check([run.labels for run in runs])
    if all(run.is_done for run in runs):  # Others may bring what is missing.
        check_metrics(runs, table.metrics)
    runs = [state_size.completed(run) for run in runs if table.has(run.labels)]
    columns = _distinct(runs, table.columns)
    rows = [_row(runs, table, key, columns) for key in _distinct(runs, table.rows)]
    notes = footnotes.notes(runs, table, [_texts(row, table) for row in rows])
    notes += state_size.notes(runs, seed=table.seed)
    return Results(table, columns, rows, notes, runs)


def _row(
    runs: Sequence[Run], table: Table, key: tuple, columns: Sequence[tuple]
) -> Row:
    cells, costs, own = {}, {}, []
    for column in columns:
        labels = dict(zip((*table.rows, *table.columns), (*key, *column), strict=True))
        here = [run for run in runs if matches(labels, run.labels)]
        own += here
        costs[column] = _costs(here)
        base = _baseline_runs(runs, table, labels)
        for metric in table.metrics:
            cells[column, metric] = _cell(here, base, table, metric, labels)
    named = {name: value for name, value in (table.baseline or {}).items()}
    return Row(
        key,
        cells,
        costs,
        tuple(run.hash for run in own),
        bool(named)
        and all(
            name in table.rows and text_of(key[table.rows.index(name)]) == text_of(v)
            for name, v in named.items()
        ),
    )


def _baseline_runs(
    runs: Sequence[Run], table: Table, labels: Mapping[str, Any]
) -> list[Run]:
    """What the place of these labels is compared with; nothing for the baseline."""
    if table.baseline is None or matches(table.baseline, labels):
        return []
    wanted = {**labels, **table.baseline}
    return [run for run in runs if matches(wanted, run.labels)]


def _cell(
    here: Sequence[Run],
    base: Sequence[Run],
    table: Table,
    metric: str,
    labels: Mapping[str, Any],
) -> Cell:
    paper = next(
        (
            figure
            for figure in table.paper
            if figure.metric == metric and matches(figure.labels, labels)
        ),
        None,
    )
    own = _by_seed([run for run in here if run.is_done], table, metric)
    if own:
        other = _by_seed([run for run in base if run.is_done], table, metric)
        difference = statistics.paired(own, other)
        return Cell(statistics.spread(list(own.values())), difference, paper)
    begun = [run for run in here if metric_of(run, metric, table=table) is not None]
    if not begun:
        return Cell(None, None, paper)
    values = _by_seed(begun, table, metric)
    steps = [run.step for run in begun]
    spread = statistics.spread(list(values.values()))
    return Cell(spread, None, paper, steps=(min(steps), max(steps)))


def _by_seed(runs: Sequence[Run], table: Table, metric: str) -> dict[str, float]:
    """seed -> value of the runs that have one."""
    found = {}
    for run in runs:
        value = metric_of(run, metric, table=table)
        if value is not None:
            found[text_of(run.labels.get(table.seed))] = value
    return found


def _costs(runs: Sequence[Run]) -> dict[str, float | None]:
    done = [run for run in runs if run.is_done]
    return {
        name: _mean(read(run.summary, run.unit) for run in done)
        for name, (_, read) in (COSTS | TIMED).items()
    }


def _mean(values) -> float | None:
    known = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def _texts(row: Row, table: Table) -> tuple[str, list[Cell]]:
    words = " ".join(
        f"{name}={text_of(value)}"
        for name, value in zip(table.rows, row.labels, strict=True)
    )
    return words, list(row.cells.values())


def _distinct(runs: Sequence[Run], names: Sequence[str]) -> list[tuple]:
    keys = {}
    for run in runs:
        key = tuple(run.labels[name] for name in names)
        keys.setdefault(tuple(map(text_of, key)), key)
    return list(keys.values())
