"""One HTML page that needs nothing else: a table to sort, curves, scatter."""

import html
import math
import re

from attnjax.studies import cells, plots
from attnjax.studies.results import Results
from attnjax.studies.values import is_timed

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem;
  padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #222; padding: 0; }
th button { all: unset; cursor: pointer; padding: .3rem .7rem; }
th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tr + tr td { border-top: 1px solid #ddd; }
th.label, td.label, th.hash { text-align: left; }
tr.baseline { background: #f2f6fa; }
td.hash { font-family: monospace; color: #666; }
ul { padding-left: 1.2rem; color: #444; }
svg { max-width: 100%; height: auto; }
"""

# A column goes by number where all of it are numbers; hashes never do, though some look
# like one. Places without a value stay last in both directions.
SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const place = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    const text = (row) => row.children[place].dataset.order;
    const [empty, full] = [[], []];
    for (const row of body.rows) (text(row) === "" ? empty : full).push(row);
    const numeric = !head.classList.contains("hash")
      && full.every((row) => !Number.isNaN(Number(text(row))));
    const order = numeric
      ? (a, b) => Number(text(a)) < Number(text(b)) ? -1
        : Number(text(a)) > Number(text(b)) ? 1 : 0
      : (a, b) => text(a).localeCompare(text(b), "en", {numeric: true});
    full.sort(up ? order : (a, b) => order(b, a));
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...full, ...empty);
  });
}
"""


def page(results: Results, *, timing: bool) -> str:
    """The whole page."""
    title = html.escape(results.table.title or "attnjax study")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    if results.table.caption:
        parts.append(f"<p>{html.escape(results.table.caption)}</p>")
    parts += [_table(results, timing), _notes(results)]
    for heading, picture in _pictures(results, timing):
        # Ids of one picture must not be those of another on the same page.
        parts.append(f"<h2>{html.escape(heading)}</h2>{picture}")
    parts.append(f"<script>{SCRIPT}</script></body></html>")
    return "\n".join(parts) + "\n"


def _table(results: Results, timing: bool) -> str:
    shown = cells.columns(results, timing=timing)
    head = "".join(
        f'<th scope="col" class="{one.kind}"><button>{html.escape(one.title)}'
        "</button></th>"
        for one in shown
    )
    rows = zip(*(one.cells for one in shown), strict=True)
    kinds = [one.kind for one in shown]
    body = "\n".join(
        f"<tr{' class=baseline' if own.is_baseline else ''}>{_cells(row, kinds)}</tr>"
        for own, row in zip(results.rows, rows, strict=True)
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cells(row: tuple[cells.Text, ...], kinds: list[str]) -> str:
    return "".join(
        f'<td class="{kind}" data-order="{html.escape(_order(cell.order))}">'
        f"{html.escape(cell.text)}</td>"
        for cell, kind in zip(row, kinds, strict=True)
    )


def _order(value: float | str | None) -> str:
    """What a column is sorted by, as JavaScript reads it; "" has no place."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return str(value)


def _notes(results: Results) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in results.notes)
    return f"<ul>{items}</ul>"


def _pictures(results: Results, timing: bool) -> list[tuple[str, str]]:
    metric = results.table.metrics[0]
    drawn = dict.fromkeys([*results.table.metrics, "eval/loss", "train/loss"])
    found = [
        (f"{name} during training", plots.curves(results, name))
        for name in drawn
        if timing or not is_timed(name)
    ]
    for name, title in cells.costs_shown(results, timing).items():
        found.append((f"{metric} against {title}", plots.scatter(results, name, title)))
    shown = [(heading, svg) for heading, svg in found if svg is not None]
    return [(h, _own_ids(svg, number)) for number, (h, svg) in enumerate(shown)]


def _own_ids(svg: str, number: int) -> str:
    """An SVG whose ids begin with a number of its own."""
    svg = re.sub(r'\bid="', f'id="p{number}-', svg)
    svg = re.sub(r"url\(#", f"url(#p{number}-", svg)
    return re.sub(r'href="#', f'href="#p{number}-', svg)
