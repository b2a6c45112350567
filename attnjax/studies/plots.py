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
_FALLING = ("loss", "bits_per_byte")  # what goes down unless a run diverges
_LINE = 0.17  # inches that an entry of the legend takes
_BESIDE = 6  # with more entries the legend stands beside the picture


def curves(results: Results, metric: str) -> str | None:
    """A metric against the step: a line for the mean of each row, a band for its sd.

    Where a row has finished runs, only they are drawn.

    Returns:
        SVG, or None where no run has two points to draw.
    """
    drawn = []
    for number, (words, runs) in enumerate(_groups(results)):
        found = [series(run, metric) for run in runs if run.is_done]
        found = found or [series(run, metric) for run in runs]
        found = [one for one in found if len(one) > 1]
        steps = sorted(set.intersection(*map(set, found))) if found else []
        if len(steps) > 1:
            values = np.asarray([[one[s] for s in steps] for one in found])
            drawn.append((number, words, steps, values))
    if not drawn:
        return None

    def draw(axes) -> None:
        for number, words, steps, values in drawn:
            colour = PALETTE[number % len(PALETTE)]
            dash = DASHES[number // len(PALETTE) % len(DASHES)]
            middle = values.mean(axis=0)
            axes.plot(steps, middle, color=colour, linestyle=dash, label=words)
            if len(values) > 1:
                sd = values.std(axis=0, ddof=1)
                axes.fill_between(
                    steps, middle - sd, middle + sd, color=colour, alpha=0.2, lw=0
                )
        if metric.rpartition("/")[2] in _FALLING:
            _cut(axes, [values.mean(axis=0) for *_, values in drawn])
        axes.set_xlabel("step")
        axes.set_ylabel(f"{metric}, mean and sd")

    return _svg(draw, len(drawn))


def scatter(results: Results, cost: str, title: str) -> str | None:
    """The first metric against a cost: a mark a row and column, with its spread.

    Returns:
        SVG, or None where the cost or the metric is unknown everywhere, or where all
        of several marks would stand above one cost.
    """
    metric = results.table.metrics[0]
    found = []
    # A row has its number, so its colour, in every picture.
    places = [(row, place) for row in results.rows for place in results.columns]
    for number, (row, place) in enumerate(places):
        spread, x = row.cells[place, metric].spread, row.costs[place][cost]
        if spread is not None and x is not None and math.isfinite(spread.mean):
            found.append((number, _words((*row.labels, *place)), x, spread))
    known = [x for _, _, x, _ in found]
    if not found or len(found) > 1 == len(set(known)):
        return None

    def draw(axes) -> None:
        for number, words, x, spread in found:
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
        _scale(axes, known)
        axes.set_xlabel(title)
        axes.set_ylabel(f"{metric}, mean and sd")
        axes.margins(x=0.15)

    return _svg(draw, len(found))


def _cut(axes, lines: Sequence[np.ndarray]) -> None:
    """Keep a few lines that shoot up from pressing the others flat.

    The picture ends a little above the highest begin of a line, where some, but no more
    than half of the lines, go higher than that by more than the others fall.
    """
    finite = [line[np.isfinite(line)] for line in lines]
    finite = [line for line in finite if len(line)]
    if len(finite) < 2:
        return
    begin = max(line[0] for line in finite)
    height = begin - min(line.min() for line in finite)
    highest = [line.max() for line in finite]
    leaving = sum(one > begin + height for one in highest)
    if height > 0 and 0 < leaving <= len(finite) / 2:
        axes.set_ylim(begin - 1.05 * height, begin + 0.15 * height)
        words = f"cut: values reach {max(highest):.4g}"
        axes.text(0.02, 0.97, words, transform=axes.transAxes, va="top", fontsize=8)


def _scale(axes, values: Sequence[float]) -> None:
    """Ticks like 20k and 1.5M, in decades where the values span more than one."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


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
        size = (9.5, max(4.2, _LINE * entries + 0.6)) if beside else (7, 4.2)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if beside else {}
        axes.legend(fontsize=8, **place)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
