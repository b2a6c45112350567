"""The table as Markdown, CSV, JSON and LaTeX."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

from attnjax.studies.cells import columns, costs_shown
from attnjax.studies.results import Results
from attnjax.studies.values import metric_of
from attnjax.training import metrics

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"\textbar{}",
    "Δ": r"$\Delta$",
    "†": r"$\dagger$",
}


def markdown(results: Results, *, timing: bool) -> str:
    """A pipe table, aligned in the source too, with footnotes below."""
    shown = columns(results, timing=timing)
    texts = [
        [_piped(column.title), *(_piped(cell.text) for cell in column.cells)]
        for column in shown
    ]
    widths = [max(3, *map(len, column)) for column in texts]
    left = [column.kind != "number" for column in shown]

    def line(cells: tuple[str, ...]) -> str:
        padded = [
            f"{cell:<{width}}" if is_left else f"{cell:>{width}}"
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if is_left else "-" * (width - 1) + ":"
        for width, is_left in zip(widths, left, strict=True)
    ]
    head, *rows = zip(*texts, strict=True)
    lines = [f"# {results.table.title}", ""] if results.table.title else []
    lines += [line(head), line(tuple(rule)), *map(line, rows), ""]
    if results.table.caption:
        lines += [results.table.caption, ""]
    lines += [f"- {note}" for note in results.notes]
    return "\n".join(lines) + "\n"


def _piped(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def records(results: Results, *, timing: bool) -> list[dict[str, Any]]:
    """One record for each row, column and metric, with numbers as they are."""
    found = []
    table = results.table
    for row in results.rows:
        for column, metric in results.places:
            cell, costs = row.cells[column, metric], row.costs[column]
            spread, gap, paper = cell.spread, cell.difference, cell.paper
            found.append(
                {
                    **dict(zip(table.rows, row.labels, strict=True)),
                    **dict(zip(table.columns, column, strict=True)),
                    "metric": metric,
                    "n": spread.n if spread else 0,
                    "mean": spread.mean if spread else None,
                    "sd": spread.sd if spread else None,
                    "finished": cell.steps is None and spread is not None,
                    "baseline": row.is_baseline,
                    "pairs": gap.n if gap else None,
                    "difference": gap.mean if gap else None,
                    "low": gap.low if gap else None,
                    "high": gap.high if gap else None,
                    "p": gap.p if gap else None,
                    "paper": paper.value if paper else None,
                    "paper_source": paper.source if paper else None,
                    **{name: costs[name] for name in costs_shown(results, timing)},
                    "configs": " ".join(row.hashes),
                }
            )
    return found


def csv_text(results: Results, *, timing: bool) -> str:
    """`records` as CSV."""
    found = records(results, timing=timing)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def json_text(results: Results, *, timing: bool) -> str:
    """The table, its records, its notes and every run, as JSON."""
    table = results.table
    runs = [
        {
            "labels": run.labels,
            "hash": run.hash,
            "state": run.state,
            "error": run.error,
            "step": run.step,
            "metrics": {
                metric: metric_of(run, metric, table=table) for metric in table.metrics
            },
        }
        for run in results.runs
    ]
    content = {
        "table": table.to_json(),
        "records": records(results, timing=timing),
        "notes": results.notes,
        "runs": runs,
    }
    text = json.dumps(metrics.encode(content), indent=1, sort_keys=True)
    return text + "\n"


def latex(results: Results, *, timing: bool) -> str:
    """A booktabs table; needs the package booktabs."""
    shown = columns(results, timing=timing)
    texts = [[one.title, *(cell.text for cell in one.cells)] for one in shown]
    head, *rows = zip(*texts, strict=True)
    places = "".join("r" if one.kind == "number" else "l" for one in shown)
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{places}}}",
        r"\toprule",
        " & ".join(map(_escaped, head)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_escaped, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    said = " ".join(filter(None, [results.table.caption, *results.notes]))
    title = f"{results.table.title}. " if results.table.title else ""
    lines += [rf"\caption{{{_escaped(title + said)}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


FORMATS: dict[str, Callable[..., str]] = {
    "md": markdown,
    "csv": csv_text,
    "json": json_text,
    "latex": latex,
}
