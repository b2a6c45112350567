"""Pictures of a study, as SVG texts that are the same for the same numbers."""

import io
import math
from collections.abc import Sequence

import numpy as np

from attnjax.studies.collect import Run
from attnjax.studies.results import Results
from attnjax.studies.table import matches, text_of
from attnjax.studies.values import series

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow,
# which is too pale for a line on white. Dashes and marks tell further rows apart.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
DASHES = ("-", "--", "-.", ":")
MARKS = "osD^vP*X"
_STYLE = {"svg.hashsalt": "attnjax", "svg.fonttype": "path", "font.size": 10}
_BESIDE = 6  # with more entries the legend stands beside the picture


def curves(results: Results, metric: str) -> str | None:
    """A metric against the step: a line for the mean of each row, a band for its sd.

    Where a row has finished runs, only they are drawn.

    Returns:
        SVG, or None where no run has two points to draw.
    """
    drawn = {}
    for words, runs in _groups(results):
        found = [series(run, metric) for run in runs if run.is_done]
        found = found or [series(run, metric) for run in runs]
        found = [one for one in found if len(one) > 1]
        steps = sorted(set.intersection(*map(set, found))) if found else []
        if len(steps) > 1:
            drawn[words] = (
                steps,
                np.asarray([[one[s] for s in steps] for one in found]),
            )
    if not drawn:
        return None

    def draw(axes) -> None:
        for number, (words, (steps, values)) in enumerate(drawn.items()):
            colour = PALETTE[number % len(PALETTE)]
            dash = DASHES[number // len(PALETTE) % len(DASHES)]
            middle = values.mean(axis=0)
            axes.plot(steps, middle, color=colour, linestyle=dash, label=words)
            if len(values) > 1:
                sd = values.std(axis=0, ddof=1)
                axes.fill_between(
                    steps, middle - sd, middle + sd, color=colour, alpha=0.2, lw=0
                )
        axes.set_xlabel("step")
        axes.set_ylabel(f"{metric}, mean and sd")

    return _svg(draw, len(drawn))


def scatter(results: Results, cost: str, title: str) -> str | None:
    """The first metric against a cost: a mark a row and column, with its spread.

    Returns:
        SVG, or None where the cost or the metric is unknown everywhere.
    """
    metric = results.table.metrics[0]
    found = []
    for row in results.rows:
        for place in results.columns:
            spread, x = row.cells[place, metric].spread, row.costs[place][cost]
            if spread is not None and x is not None and math.isfinite(spread.mean):
                found.append((_words((*row.labels, *place)), x, spread))
    if not found:
        return None

    def draw(axes) -> None:
        for number, (words, x, spread) in enumerate(found):
            axes.errorbar(
                x,
                spread.mean,
                yerr=spread.sd,
                color=PALETTE[number % len(PALETTE)],
                marker=MARKS[number % len(MARKS)],
                capsize=3,
                linestyle="none",
                label=words,
            )
        axes.set_xlabel(title)
        axes.set_ylabel(f"{metric}, mean and sd")
        axes.margins(x=0.15)

    return _svg(draw, len(found))


def _groups(results: Results) -> list[tuple[str, list[Run]]]:
    """Words and runs of each row and column."""
    table, found = results.table, []
    for row in results.rows:
        for place in results.columns:
            values = (*row.labels, *place)
            wanted = dict(zip((*table.rows, *table.columns), values, strict=True))
            runs = [run for run in results.runs if matches(wanted, run.labels)]
            found.append((_words(values), runs))
    return found


def _words(values: Sequence) -> str:
    text = " ".join(filter(None, map(text_of, values))) or "all runs"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _svg(draw, entries: int) -> str:
    """Draw into axes of a new figure, without touching matplotlib's own state."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {**matplotlib.rcParamsDefault, **_STYLE}
    settings = {k: v for k, v in settings.items() if not k.startswith("backend")}
    with matplotlib.rc_context(settings):
        beside = entries > _BESIDE
        figure = Figure(figsize=(9.5 if beside else 7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if beside else {}
        axes.legend(fontsize=8, **place)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
