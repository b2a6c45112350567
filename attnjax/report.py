"""python -m attnjax.report DIR: the table of a sweep, or of any folder of runs."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attnjax.core.cli import run_main
from attnjax.core.errors import EXIT_OK, UserError
from attnjax.core.flags import parse_command_line, positional

if TYPE_CHECKING:
    from attnjax.studies.table import Table


@dataclasses.dataclass(frozen=True)
class Flags:
    """Show the runs of a sweep or of any folder as a table with statistics.

    Attributes:
        folder: the --workdir of a sweep, or a folder above run directories.
        format: md, csv, json, latex, or html (one page with table and plots).
        out: the file to write; standard output without it.
        only: LABEL=VALUE,...: the runs with these labels; several values of one label
            are alternatives (none: all).
        metric: <split>/<name>, as in eval/loss; several with commas or by repeating.
        rows: labels that make a row, with commas or by repeating.
        cols: labels spread over columns, with commas or by repeating.
        baseline: what rows are compared with: LABEL=VALUE,...; none: nothing.
        last: the last value of each run.
        best: the best value of each run; of losses the least, of accuracies the
            greatest.
        higher_is_better: metrics of which --best takes the greatest, beside
            accuracies.
        no_timing: leave out what was measured with a clock.
    """

    folder: str = positional()
    format: Literal["md", "csv", "json", "latex", "html"] = "md"
    out: str | None = None
    only: str | None = None
    metric: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    cols: tuple[str, ...] | None = None
    baseline: str = ""
    last: bool = False
    best: bool = False
    higher_is_better: tuple[str, ...] | None = None
    no_timing: bool = False


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    flags = parse_command_line(
        _joined(argv), Flags, program="attnjax.report", config=False, overrides=False
    ).flags
    text = report(flags)
    if flags.out is None:
        sys.stdout.write(text)
        return EXIT_OK
    from attnjax.training import disk

    with disk.disk_errors("--out"):
        Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(flags.out, text)
    print(f"wrote {flags.out}")
    return EXIT_OK


def report(flags: Flags) -> str:
    """The report that the flags ask for."""
    from attnjax.studies import collect, formats, page, results, selection, values

    if flags.last and flags.best:
        raise UserError("report: --last and --best exclude one another; give one.")
    runs, table = collect.collect(flags.folder)
    if flags.only is not None:
        chosen = selection.selected(flags.only, [run.labels for run in runs])
        runs = list(itertools.compress(runs, chosen))
        has = values.metrics_of(runs)
        table = table and table.cut_to([run.labels for run in runs], metrics=has)
    table = _asked(table or results.default_table(runs), flags)
    values.check_metrics(runs, flags.metric or ())
    if flags.no_timing:
        table = results.without_timing(table)
    found = results.summarise(runs, table)
    write = page.page if flags.format == "html" else formats.FORMATS[flags.format]
    return write(found, timing=not flags.no_timing)


def _asked(table: "Table", flags: Flags) -> "Table":
    """The table with what the command line changes.

    A baseline or a figure of the paper that the changed rows, columns or metrics have
    no place for is left out.
    """
    changes = {
        "metrics": flags.metric,
        "rows": flags.rows,
        "columns": flags.cols,
        "higher_is_better": flags.higher_is_better,
        "best": True if flags.best else False if flags.last else None,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if "rows" in changes and "columns" not in changes:
        left = (name for name in table.columns if name not in changes["rows"])
        changes["columns"] = tuple(left)
    if "columns" in changes and "rows" not in changes:
        left = (name for name in table.rows if name not in changes["columns"])
        changes["rows"] = tuple(left)
    places = {*changes.get("rows", table.rows), *changes.get("columns", table.columns)}
    metrics = changes.get("metrics", table.metrics)
    changes["paper"] = tuple(
        one
        for one in table.paper
        if one.metric in metrics and set(one.labels) <= places
    )
    changes["uncompared"] = tuple(m for m in table.uncompared if m in metrics)
    if flags.baseline:
        changes["baseline"] = _baseline(flags.baseline)
    elif table.baseline is not None and not set(table.baseline) <= places:
        changes["baseline"] = None
    return dataclasses.replace(table, **changes)


def _baseline(text: str) -> dict[str, str] | None:
    if text == "none":
        return None
    from attnjax.studies import selection

    return dict(selection.pairs(text, "--baseline"))


def _joined(argv: list[str]) -> list[str]:
    """The command line with repeated lists as one: --metric a --metric b is a,b."""
    lists = {f"--{name}": [] for name in ("metric", "rows", "cols", "higher_is_better")}
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        if name not in lists:
            rest.append(word)
        elif equals:
            lists[name].append(value)
        elif words and not words[0].startswith("--"):
            lists[name].append(words.pop(0))
        else:
            rest.append(word)
    joined = (f"{name}={','.join(values)}" for name, values in lists.items() if values)
    return [*rest, *joined]


if __name__ == "__main__":
    run_main(main)
