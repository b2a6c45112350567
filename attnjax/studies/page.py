"""One HTML page that needs nothing else: a table to sort, curves, scatter."""

import html
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

SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const place = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    const value = (row) => {
      const text = row.children[place].dataset.order;
      return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "number" && typeof y === "number"
        ? x - y : String(x).localeCompare(String(y));
      return up ? order : -order;
    });
    head.parentNode.querySelectorAll("th").forEach(
      (other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
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
    found = []
    for cell, kind in zip(row, kinds, strict=True):
        order = "" if cell.order is None else html.escape(str(cell.order))
        found.append(
            f'<td class="{kind}" data-order="{order}">{html.escape(cell.text)}</td>'
        )
    return "".join(found)


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
    for name, title in cells.costs_shown(timing).items():
        found.append((f"{metric} against {title}", plots.scatter(results, name, title)))
    shown = [(heading, svg) for heading, svg in found if svg is not None]
    return [(h, _own_ids(svg, number)) for number, (h, svg) in enumerate(shown)]


def _own_ids(svg: str, number: int) -> str:
    """An SVG whose ids begin with a number of its own."""
    svg = re.sub(r'\bid="', f'id="p{number}-', svg)
    svg = re.sub(r"url\(#", f"url(#p{number}-", svg)
    return re.sub(r'href="#', f'href="#p{number}-', svg)
