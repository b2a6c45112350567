"""From runs to rows: baselines, places and what is not finished."""

import dataclasses
import json
import re
import warnings

import made_study as made
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from attnjax.core.errors import UserError
from attnjax.studies import cells, formats, plots, results
from attnjax.studies.collect import collect
from attnjax.studies.table import PaperValue, Table
from attnjax.studies.values import metrics_of
from attnjax.training.feeds.text import DECODE_STATE

SIZES = (16, 32)
MIXERS = ("attention", "gated_attention")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for mixer in MIXERS:
        for size in SIZES:
            for seed in (0, 1):
                config = made.config_of(mixer, seed, model__embed_dim=size)
                made.write_run(folder / f"{mixer}{size}{seed}", config)
    found, table = collect(folder)
    assert table is None
    return found


def test_a_baseline_of_one_label_keeps_the_others(runs):
    table = Table(rows=("layers", "embed_dim"), baseline={"layers": "attention"})
    found = results.summarise(runs, table)
    gaps = {row.labels: row.cells[(), "eval/loss"].difference for row in found.rows}
    for size in SIZES:
        assert gaps["attention", size] is None
        assert gaps["gated_attention", size].n == 2
    marks = [row.is_baseline for row in found.rows]
    assert marks == [row.labels[0] == "attention" for row in found.rows]


def test_a_metric_may_be_yet_to_come(runs):
    metrics = ("eval/loss", "late/loss")
    table = Table(rows=("layers", "embed_dim"), metrics=metrics)
    with pytest.raises(UserError, match="must have the metric; got 'late/loss'"):
        results.summarise(runs, table)
    begun = [*runs[:-1], dataclasses.replace(runs[-1], state="running")]
    found = results.summarise(begun, table)
    assert found.places == [((), "eval/loss")]
    assert "No run has late/loss yet." in found.notes


def test_a_table_is_cut_to_the_metrics_of_its_points():
    figure = PaperValue({"mixer": "a"}, "late/loss", 1.0, "A Paper")
    metrics = ("eval/loss", "late/loss")
    table = Table(("mixer",), metrics=metrics, paper=(figure,), uncompared=metrics)
    points = [{"mixer": "a"}]
    assert table.cut_to(points, metrics=metrics) == table
    assert table.cut_to(points, metrics=()).metrics == metrics
    own = table.cut_to(points, metrics=("eval/loss", "eval/accuracy"))
    assert own == Table(("mixer",), uncompared=("eval/loss",))


def test_a_metric_may_stand_without_its_difference(runs):
    table = Table(
        rows=("layers", "embed_dim"),
        metrics=("eval/loss", "eval/accuracy", "train/time/tokens_per_second"),
        uncompared=("eval/accuracy", "train/time/tokens_per_second"),
        baseline={"layers": "attention"},
    )
    found = results.summarise(runs, results.without_timing(table))
    titles = [column.title for column in cells.columns(found, timing=False)]
    assert "Δ eval/loss [95 %]" in titles
    assert "eval/accuracy" in titles
    assert sum("Δ" in title for title in titles) == 1


def test_a_whole_baseline_is_one_row(runs):
    table = Table(
        rows=("layers", "embed_dim"), baseline={"layers": "attention", "embed_dim": 16}
    )
    rows = results.summarise(runs, table).rows
    assert [row.is_baseline for row in rows].count(True) == 1
    gaps = [row.cells[(), "eval/loss"].difference for row in rows]
    assert [gap is None for gap in gaps] == [row.is_baseline for row in rows]


def test_a_baseline_may_be_a_column(runs):
    table = Table(rows=("layers",), columns=("embed_dim",), baseline={"embed_dim": 16})
    row = results.summarise(runs, table).rows[0]
    assert not row.is_baseline
    assert row.cells[(16,), "eval/loss"].difference is None
    # Both sizes have the same made-up losses.
    assert row.cells[(32,), "eval/loss"].difference.mean == 0.0


def test_labels_that_are_left_out_must_not_hide_runs(runs):
    with pytest.raises(UserError, match="must tell the points apart"):
        results.summarise(runs, Table(rows=("layers",)))


def test_a_metric_must_be_that_of_a_run(runs):
    table = Table(rows=("layers", "embed_dim"), metrics=("eval/accurcy",))
    with pytest.raises(UserError, match="got 'eval/accurcy'. Did you mean eval/acc"):
        results.summarise(runs, table)
    assert "train/time/tokens_per_second" in metrics_of(runs)
    assert "eval/step" not in metrics_of(runs)


def test_columns_show_the_metrics_that_their_runs_have(runs):
    only_small = [
        run
        if run.labels["embed_dim"] == SIZES[0]
        else dataclasses.replace(
            run, rows=[_without(row, "accuracy") for row in run.rows]
        )
        for run in runs
    ]
    table = Table(
        rows=("layers",), columns=("embed_dim",), metrics=("eval/accuracy", "eval/loss")
    )
    found = results.summarise(only_small, table)
    small, large = ((size,) for size in SIZES)
    assert found.places == [
        (small, "eval/accuracy"),
        (small, "eval/loss"),
        (large, "eval/loss"),
    ]
    titles = [column.title for column in cells.columns(found, timing=False)]
    assert "eval/accuracy (embed_dim=16)" in titles
    assert "eval/accuracy (embed_dim=32)" not in titles
    listed = [
        (one["embed_dim"], one["metric"])
        for one in formats.records(found, timing=False)
    ]
    assert listed == [(c[0], m) for _ in MIXERS for c, m in found.places]


def test_a_papers_figure_is_a_number_and_what_has_not_run_may_have_all(runs):
    small, large = ((size,) for size in SIZES)
    metrics = ("eval/loss", "eval/accuracy")
    labels = {"layers": "attention", "embed_dim": SIZES[0]}
    figure = PaperValue(labels, "eval/accuracy", 0.5, "Table 1")

    def places(paper, rows_of_small):
        table = Table(
            rows=("layers",), columns=("embed_dim",), metrics=metrics, paper=paper
        )
        given = [
            dataclasses.replace(run, rows=rows_of_small(run))
            if run.labels["embed_dim"] == SIZES[0]
            else run
            for run in runs
        ]
        return results.summarise(given, table).places

    whole = [(column, metric) for column in (small, large) for metric in metrics]
    assert (
        places((figure,), lambda run: [_without(r, "accuracy") for r in run.rows])
        == whole
    )
    assert places((), lambda run: []) == whole


def test_runs_that_are_left_out_are_in_no_row(runs):
    table = Table(rows=("layers", "embed_dim"), leave_out={"layers": "attention"})
    found = results.summarise(runs, table)
    assert [row.labels for row in found.rows] == [(MIXERS[1], size) for size in SIZES]


def _without(row, name):
    return {key: value for key, value in row.items() if key != name}


def test_a_diverged_run_shows_in_the_mean(runs):
    last = runs[0].rows[-1]
    bad = [*runs[0].rows[:-1], {**last, "loss": float("nan")}]
    broken = [dataclasses.replace(runs[0], rows=bad), *runs[1:]]
    table = Table(rows=("layers", "embed_dim"), baseline={"layers": "attention"})
    rows = results.summarise(broken, table).rows
    cell = rows[0].cells[(), "eval/loss"]
    assert cell.spread.mean != cell.spread.mean and cell.spread.sd is None
    # The best value of a run is a number if it ever had one.
    best = results.summarise(broken, dataclasses.replace(table, best=True)).rows
    assert best[0].cells[(), "eval/loss"].spread.mean > 0


def test_pictures_are_the_same_whatever_matplotlib_is_set_to(runs):
    table = Table(rows=("layers", "embed_dim"))
    found = results.summarise(runs, table)
    before = plots.curves(found, "eval/loss")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        assert plots.curves(found, "eval/loss") == before
        assert matplotlib.rcParams["font.size"] == 30
    assert before.startswith("<svg") and "#0072b2" in before.lower()
    assert plots.curves(found, "eval/nothing") is None


def test_a_long_legend_leaves_room_for_the_picture():
    def draw(axes):
        for i in range(60):
            axes.plot([0, 1], [i, i], label=f"a row with several words {i}")

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that collapses
        found = plots._svg(draw, 60)
    height = float(re.search(r'height="([\d.]+)pt"', found).group(1))
    assert height > 60 * 8  # points of the legend's letters


def test_a_scatter_needs_its_cost(runs):
    found = results.summarise(runs, Table(rows=("layers", "embed_dim")))
    assert plots.scatter(found, "parameters", "parameters").startswith("<svg")
    # All cost the same: there is nothing to see.
    assert plots.scatter(found, "speed", "tokens/s") is None
    bare = [dataclasses.replace(run, summary={}) for run in runs]
    found = results.summarise(bare, Table(rows=("layers", "embed_dim")))
    assert plots.scatter(found, "flops", "FLOPs/token") is None


def limits(draw, *lines):
    axes = Figure().add_subplot()
    for line in lines:
        axes.plot(line)
    before = axes.get_ylim()
    draw(axes, [np.asarray(line) for line in lines])
    return before, axes.get_ylim(), [text.get_text() for text in axes.texts]


def test_a_line_that_shoots_up_does_not_press_the_others_flat():
    calm = [[4.0, 2.5, 2.0], [4.0, np.nan, 2.1]]
    _, (low, high), words = limits(plots._cut, *calm, [4.0, 2.0, 900.0])
    assert 1.5 < low < 2.0 and 4.0 < high < 5.0
    assert words == ["cut: values reach 900"]
    for lines in (calm, [calm[0]], [[1.0, 9.0, 99.0]] * 3, [[np.nan], [1.0]]):
        before, after, words = limits(plots._cut, *lines)
        assert before == after and words == []


def test_costs_far_apart_stand_in_decades():
    axes = Figure().add_subplot()
    plots._scale(axes, [20_000, 3e9])
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_major_formatter()(2e4) == "20k"
    axes = Figure().add_subplot()
    plots._scale(axes, [459_520, 492_288])
    assert axes.get_xscale() == "linear"


def test_an_unfinished_run_of_the_baseline_makes_no_pair(tmp_path):
    folder = made.write_sweep(tmp_path / "s", unfinished=[("attention", 1)])
    found, _ = collect(folder)
    table = Table(rows=("mixer",), baseline={"mixer": "attention"})
    row = results.summarise(found, table).rows[1]
    assert row.cells[(), "eval/loss"].difference.n == 2


# ---- the size of the decode state of runs that do not say it


def stateless(tmp_path, value=None, **changed):
    """Results of two runs whose summaries have no size, or another value."""
    for seed in (0, 1):
        config = made.config_of("attention", seed)
        path = made.write_run(tmp_path / f"r{seed}", config)
        config["model"].update(changed)
        (path / "config.json").write_text(json.dumps(config))
        summary = json.loads((path / "summary.json").read_text())
        del summary[DECODE_STATE]
        if value is not None:
            summary[DECODE_STATE] = value
        (path / "summary.json").write_text(json.dumps(summary))
    found, _ = collect(tmp_path)
    table = results.default_table(found)
    return results.summarise(found, dataclasses.replace(table, rows=()))


def test_a_size_that_is_not_in_the_summary_comes_from_the_config(tmp_path):
    # Of two layers: keys and values, positions and segments, two counters.
    layer = 2 * (32 * 2 * 8) * 4 + 2 * 32 * 4 + 2 * 4
    found = stateless(tmp_path)
    assert found.rows[0].cost("state") == 2 * layer / 32
    assert not any("State B/token" in note for note in found.notes)


def test_a_size_in_the_summary_stays(tmp_path):
    assert stateless(tmp_path, value=7.5).rows[0].cost("state") == 7.5


def test_a_size_that_cannot_be_known_says_why(tmp_path):
    found = stateless(tmp_path, layers="attentoin")
    assert found.rows[0].cost("state") is None
    note = next(note for note in found.notes if "State B/token" in note)
    assert "is empty for layers=attentoin: config.model.mixers: " in note
    assert len([note for note in found.notes if "State B/token" in note]) == 1
