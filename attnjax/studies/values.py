"""Metrics of a run: its last evaluation, or its best."""

import math
from collections.abc import Iterable, Sequence

from attnjax.core.errors import UserError, nearest
from attnjax.studies.collect import Run
from attnjax.studies.table import Table, more_is_better

TIME = "time/"  # what a clock measured, as in "train/time/tokens_per_second"
_NOT_METRICS = ("step", "split")


def is_timed(metric: str) -> bool:
    """Whether a clock measured the metric."""
    return metric.partition("/")[2].startswith(TIME)


def metric_of(run: Run, metric: str, *, table: Table) -> float | None:
    """A metric of a run, finished or not; None where it has none.

    Args:
        run: whose metrics.jsonl is read.
        metric: "<split>/<name>".
        table: whether the last value is wanted or the best, and what is better.
    """
    found = series(run, metric)
    if not found:
        return None
    values = list(found.values())
    if not table.best:
        return values[-1]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return values[-1]
    better = max if more_is_better(metric, table.higher_is_better) else min
    return better(finite)


def series(run: Run, metric: str) -> dict[int, float]:
    """step -> value of the lines of the metric's split that have it, in order."""
    split, _, name = metric.partition("/")
    found = {}
    for row in run.rows:
        if row["split"] != split:
            continue
        holder, key = row, name
        if name.startswith(TIME):
            holder, key = row.get("time") or {}, name.removeprefix(TIME)
        if _is_number(holder.get(key)):
            found[row["step"]] = float(holder[key])
    return found


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """Every metric that some run has, sorted."""
    found = set()
    for run in runs:
        for row in run.rows:
            names = [k for k, v in row.items() if _is_number(v)]
            timed = [TIME + k for k, v in (row.get("time") or {}).items()]
            found |= {f"{row['split']}/{name}" for name in names + timed}
    return sorted(m for m in found if m.partition("/")[2] not in _NOT_METRICS)


def check_metrics(runs: Sequence[Run], wanted: Iterable[str]) -> None:
    """Refuse a metric that no run has, where any run has metrics at all.

    Raises:
        UserError: with the nearest ones.
    """
    known = metrics_of(runs)
    for metric in wanted:
        if known and metric not in known:
            raise UserError(
                f"report: a run must have the metric; got {metric!r}. "
                f"{nearest(metric, known)}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
