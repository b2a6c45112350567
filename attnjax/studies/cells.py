"""The table as texts, the same for every format: heads, cells, and what they mean."""

import dataclasses
from typing import Literal

from attnjax.studies import numbers
from attnjax.studies.results import COSTS, TIMED, Cell, Results, Row
from attnjax.studies.table import text_of

Kind = Literal["label", "number", "hash"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A cell as text.

    Attributes:
        text: what is shown.
        order: what a sorted column goes by; None sorts last.
    """

    text: str
    order: float | str | None = None


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its head, what kind of thing it holds, and a cell for each row."""

    title: str
    kind: Kind
    cells: tuple[Text, ...]


def columns(results: Results, *, timing: bool) -> list[Column]:
    """Labels, metrics with their differences and the paper's figures, costs, hash."""
    found = [_label_column(results, i) for i in range(len(results.table.rows))]
    for place, metric in results.places:
        found += _metric_columns(results, place, metric)
    found += _cost_columns(results, timing)
    hashes = tuple(Text(_hashes(row), _hashes(row)) for row in results.rows)
    return [*found, Column("config hash", "hash", hashes)]


def costs_shown(results: Results, timing: bool) -> dict[str, str]:
    """Cost name -> title; without the measured times where they are not wanted, and
    without the decode state where no run is one of text."""
    shown = COSTS | TIMED if timing else COSTS
    words = {
        name: " or ".join(title.format(unit=unit) for unit in results.units)
        for name, (title, _) in shown.items()
        if "{unit}" in title
    }
    return {
        name: words.get(name, title)
        for name, (title, _) in shown.items()
        if name != "state" or "token" in results.units
    }


def costs_differ(results: Results) -> bool:
    """Whether the same row costs more in one column than in another."""
    return any(
        len({row.costs[place][name] for place in results.columns}) > 1
        for row in results.rows
        for name in COSTS
    )


def _label_column(results: Results, index: int) -> Column:
    cells = []
    for row in results.rows:
        value = row.labels[index]
        mark = " (baseline)" if index == 0 and row.is_baseline else ""
        is_number = isinstance(value, int | float)
        cells.append(
            Text(text_of(value) + mark, value if is_number else text_of(value))
        )
    return Column(results.table.rows[index], "label", tuple(cells))


def _metric_columns(results: Results, place: tuple, metric: str) -> list[Column]:
    where = results.title_of(place)
    title = f"{metric} ({where})" if where else metric
    cells = [row.cells[place, metric] for row in results.rows]
    found = [Column(title, "number", tuple(map(_mean, cells)))]
    table = results.table
    if table.baseline is not None and metric not in table.uncompared:
        gaps = [cell.difference for cell in cells]
        texts = (Text(numbers.difference(g), g.mean if g else None) for g in gaps)
        found.append(Column(f"Δ {title} [95 %]", "number", tuple(texts)))
        texts = (Text(numbers.p_value(g), g.p if g else None) for g in gaps)
        found.append(Column("p", "number", tuple(texts)))
    if any(one.metric == metric for one in table.paper):
        figures = [cell.paper for cell in cells]
        texts = (Text(f"{f.value:g}", f.value) if f else Text("") for f in figures)
        found.append(Column(f"{title} (paper)", "number", tuple(texts)))
    return found


def _mean(cell: Cell) -> Text:
    mark = " †" if cell.steps else ""
    return Text(numbers.mean(cell.spread) + mark, cell.spread and cell.spread.mean)


def _cost_columns(results: Results, timing: bool) -> list[Column]:
    titles = costs_shown(results, timing)
    if not costs_differ(results):
        return [
            _cost_column(title, [row.cost(name) for row in results.rows])
            for name, title in titles.items()
        ]
    return [
        _cost_column(
            f"{title} ({results.title_of(place)})",
            [row.costs[place][name] for row in results.rows],
        )
        for place in results.columns
        for name, title in titles.items()
    ]


def _cost_column(title: str, values: list[float | None]) -> Column:
    return Column(title, "number", tuple(Text(numbers.cost(v), v) for v in values))


def _hashes(row: Row) -> str:
    more = f" +{len(row.hashes) - 1}" if len(row.hashes) > 1 else ""
    return f"{row.hashes[0][:12]}{more}"
