"""What stands below a table: which numbers these are, and what is missing."""

from collections.abc import Sequence
from typing import Any

from attnjax.studies.collect import Run
from attnjax.studies.table import Table, more_is_better, show_labels
from attnjax.studies.values import metrics_of

_SHOWN = 8  # runs of one kind named in a note
_MISSING = (
    ("failed", "failed"),
    ("unfinished", "not finished"),
    ("running", "running"),
    ("pending", "not run"),
)


def notes(
    runs: Sequence[Run], table: Table, rows: Sequence[tuple[str, list[Any]]]
) -> list[str]:
    """The footnotes of a table.

    Args:
        runs: all of them.
        table: what was asked for.
        rows: each row's labels as words, and its cells.
    """
    found = [_what(table)]
    if table.baseline is not None:
        found.append(
            f"Δ is the difference to {show_labels(table.baseline)}, paired by "
            f"{table.seed} (same data order): mean and 95 % interval of Student's t; p "
            "is two-sided. One pair (n=1) has no interval."
        )
    if table.paper:
        found.append(
            f"Columns marked (paper) are the paper's figures: {_origin(table)}."
        )
    return found + _absent(runs, table) + _missing(runs) + _fewer(rows)


def _absent(runs: Sequence[Run], table: Table) -> list[str]:
    """Metrics that no run has yet, which have no column or an empty one."""
    known = metrics_of(runs)
    absent = [metric for metric in table.metrics if known and metric not in known]
    return [f"No run has {', '.join(absent)} yet."] if absent else []


def _origin(table: Table) -> str:
    """Where a paper's figures stand: metrics by source, as their cells have no room."""
    metrics: dict[str, list[str]] = {}
    for figure in table.paper:
        known = metrics.setdefault(figure.source, [])
        if figure.metric not in known:
            known.append(figure.metric)
    return "; ".join(
        f"{', '.join(names)} ({source})" for source, names in metrics.items()
    )


def _what(table: Table) -> str:
    if not table.best:
        which = "the last value of each run"
    else:
        kinds = [
            f"{metric}: {_extreme(metric, table.higher_is_better)}"
            for metric in table.metrics
        ]
        which = f"the best value of each run ({', '.join(kinds)})"
    return (
        f"Mean ± sample standard deviation over {table.seed} (number of runs): {which}."
    )


def _extreme(metric: str, declared: Sequence[str]) -> str:
    return "greatest" if more_is_better(metric, declared) else "least"


def _missing(runs: Sequence[Run]) -> list[str]:
    found = []
    for word, what in _MISSING:
        some = [run for run in runs if run.state == word]
        if some:
            shown = "; ".join(map(_why, some[:_SHOWN]))
            more = f"; and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
            found.append(f"{what} ({len(some)} of {len(runs)} runs): {shown}{more}.")
    return [text[0].upper() + text[1:] for text in found]


def _why(run: Run) -> str:
    reached = f" (step {run.step}{_of(run)})" if run.step else ""
    error = f": {run.error.rstrip('.')}" if run.error else ""
    return f"{show_labels(run.labels)}{reached}{error}"


def _of(run: Run) -> str:
    steps = ((run.config or {}).get("train") or {}).get("steps")
    return f" of {steps}" if steps else ""


def _fewer(rows: Sequence[tuple[str, list[Any]]]) -> list[str]:
    """Rows with fewer runs than the others, and places without finished ones."""
    found = []
    counts = [
        (words, [cell.spread.n for cell in cells if cell.spread and not cell.steps])
        for words, cells in rows
    ]
    most = max((n for _, own in counts for n in own), default=0)
    fewer = [
        f"{words} (n={min(own)})" for words, own in counts if own and min(own) < most
    ]
    if fewer:
        found.append(f"Fewer runs than the others' {most}: {'; '.join(fewer)}.")
    if any(cell.steps for _, cells in rows for cell in cells):
        found.append(
            "† no run of this place is finished: the value is of the step reached, and "
            "is not compared."
        )
    return found
