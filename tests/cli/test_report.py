"""python -m attnjax.report, from a folder of runs to every format."""

import csv
import html.parser
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from attnjax.report import main

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import made_study as made

TABLE = {
    "rows": ["mixer"],
    "metrics": ["eval/loss", "eval/accuracy"],
    "baseline": {"mixer": "attention"},
    "paper": [
        {
            "labels": {"mixer": "gated_attention"},
            "metric": "eval/loss",
            "value": 1.85,
            "source": "Some Paper, Table 1",
        }
    ],
    "title": "Gates & <softmax>",
    "caption": "Made up: 50 % of it.",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made.write_sweep(tmp_path_factory.mktemp("study") / "s", table=TABLE)


def shown(run_door, *words):
    code, out, err = run_door(main, *words)
    assert (code, err) == (0, "")
    return out


def records(run_door, *words):
    content = json.loads(shown(run_door, *words, "--format", "json"))
    return {(r.get("mixer"), r["metric"]): r for r in content["records"]}


def final(mixer, step=made.STEPS, seeds=(0, 1, 2)):
    return np.array([made.loss_of(mixer, seed, step) for seed in seeds])


def test_numbers_are_those_of_the_runs(run_door, study):
    found = records(run_door, study)
    row, base = final("gated_attention"), final("attention")
    mine = found["gated_attention", "eval/loss"]
    assert mine["n"] == mine["pairs"] == 3
    assert mine["mean"] == pytest.approx(row.mean())
    assert mine["sd"] == pytest.approx(row.std(ddof=1))
    assert mine["difference"] == pytest.approx((row - base).mean())
    assert (mine["paper"], mine["paper_source"]) == (1.85, "Some Paper, Table 1")
    assert (mine["parameters"], mine["flops"], mine["state"]) == (2345, 1e6, 512)
    assert mine["speed"] == 1000.0
    other = found["gated_attention", "eval/accuracy"]
    theirs = stats.ttest_rel(1 / row, 1 / base)
    assert other["p"] == pytest.approx(theirs.pvalue)
    assert other["low"] == pytest.approx(theirs.confidence_interval(0.95).low)
    baseline = found["attention", "eval/loss"]
    assert baseline["baseline"] and baseline["difference"] is None


def test_markdown_is_aligned_and_says_what_it_shows(run_door, study):
    text = shown(run_door, study)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert text.startswith("# Gates & <softmax>\n")
    assert "eval/loss (paper)" in lines[0] and " 1.85 " in lines[3]
    assert "attention (baseline)" in lines[2]
    mean, sd = final("attention").mean(), final("attention").std(ddof=1)
    assert 0.01 < sd < 0.1 and f"{mean:.3f} ± {sd:.3f} (3)" in lines[2]
    assert "paired by seed (same data order)" in text
    assert "the last value of each run" in text
    assert "eval/loss (Some Paper, Table 1)" in text


def test_best_goes_by_the_direction_of_each_metric(run_door, study):
    found = records(run_door, study, "--best")
    best = final("attention", step=30)
    assert found["attention", "eval/loss"]["mean"] == pytest.approx(best.mean())
    accuracy = found["attention", "eval/accuracy"]["mean"]
    assert accuracy == pytest.approx((1 / best).mean())
    text = shown(run_door, study, "--best")
    assert "(eval/loss: least, eval/accuracy: greatest)" in text
    declared = "--higher_is_better=eval/loss"
    worst = records(run_door, study, "--best", declared)["attention", "eval/loss"]
    assert worst["mean"] == pytest.approx(final("attention", step=10).mean())


def test_metrics_can_be_repeated_or_joined(run_door, study):
    repeated = ["--metric", "train/loss", "--metric=eval/accuracy"]
    joined = ["--metric=train/loss,eval/accuracy"]
    found = shown(run_door, study, *repeated)
    assert found == shown(run_door, study, *joined)
    train = records(run_door, study, *joined)["attention", "train/loss"]
    assert train["mean"] == pytest.approx(final("attention").mean() - 0.1)


def test_another_baseline_and_none(run_door, study):
    found = records(run_door, study, "--baseline", "mixer=gated_attention")
    assert found["attention", "eval/loss"]["difference"] > 0
    assert "Δ" not in shown(run_door, study, "--baseline=none")


def test_only_some_runs_are_shown(run_door, study):
    found = records(run_door, study, "--only", "seed=0,seed=2,mixer=attention")
    assert found.keys() == {("attention", m) for m in TABLE["metrics"]}
    row = found["attention", "eval/loss"]
    wanted = final("attention", seeds=(0, 2))
    assert (row["n"], row["mean"]) == (2, pytest.approx(wanted.mean(), rel=1e-9))
    # Without the baseline, or the row that the paper's value is of.
    gated = records(run_door, study, "--only", "mixer=gated_attention")
    assert gated["gated_attention", "eval/loss"]["difference"] is None
    assert gated["gated_attention", "eval/loss"]["paper"] == 1.85
    assert row["paper"] is None


def test_labels_spread_over_columns(run_door, study):
    words = (study, "--cols", "mixer", "--rows", "seed")
    code, _, err = run_door(main, *words)
    assert code == 2 and "'seed' twice" in err
    folder = study.parent / "columns"
    if not folder.exists():
        for size in (16, 32):
            for mixer in ("attention", "gated_attention"):
                for seed in (0, 1):
                    config = made.config_of(mixer, seed, model__embed_dim=size)
                    made.write_run(folder / f"{mixer}{size}{seed}", config)
    text = shown(run_door, folder, "--cols=embed_dim", "--baseline=layers=attention")
    head = text.splitlines()[0]
    assert "eval/loss (embed_dim=16)" in head and "eval/loss (embed_dim=32)" in head
    # The baseline of a column is its own.
    gaps = (final("gated_attention") - final("attention"))[:2]
    content = json.loads(
        shown(
            run_door,
            folder,
            "--cols=embed_dim",
            "--baseline=layers=attention",
            "--format=json",
        )
    )
    rows = [r for r in content["records"] if r["layers"] == "gated_attention"]
    assert [r["embed_dim"] for r in rows] == [16, 32]
    assert all(r["difference"] == pytest.approx(gaps.mean()) for r in rows)


def test_rows_default_to_the_config_values_that_differ(run_door, study):
    folder = study.parent / "lone"
    if not folder.exists():
        for mixer in ("attention", "gated_attention"):
            for rate in (0.01, 0.02):
                config = made.config_of(mixer, 0, optim__learning_rate=rate)
                made.write_run(folder / "x" / f"{mixer}{rate}", config)
    head = shown(run_door, folder).splitlines()[0].split("|")
    assert [cell.strip() for cell in head[1:4]] == [
        "layers",
        "learning_rate",
        "eval/loss",
    ]


def test_missing_failed_and_fewer_are_in_the_footnotes(run_door, tmp_path):
    folder = made.write_sweep(
        tmp_path / "s",
        table=TABLE,
        mixers=("attention", "gated_attention", "linear_attention"),
        failed=[("gated_attention", 1)],
        missing=[("gated_attention", 2), ("linear_attention", 0)],
        unfinished=[("linear_attention", 1), ("linear_attention", 2)],
    )
    text = shown(run_door, folder)
    failed = "mixer=gated_attention, seed=1: error: the disk is full."
    assert f"Failed (1 of 9 runs): {failed}" in text
    assert "mixer=gated_attention, seed=2" in text
    assert "(step 20 of 40)" in text
    assert "Fewer runs than the others' 3: mixer=gated_attention (n=1)." in text
    found = records(run_door, folder)
    # One pair has a difference and no interval.
    lone = found["gated_attention", "eval/loss"]
    assert (lone["n"], lone["pairs"], lone["low"], lone["p"]) == (1, 1, None, None)
    assert "[n=1]" in text
    # What is not finished is shown as such and compared with nothing.
    begun = found["linear_attention", "eval/loss"]
    assert (begun["finished"], begun["n"], begun["difference"]) == (False, 2, None)
    assert "(2) †" in text and "† no run of this place is finished" in text


def test_no_timing_leaves_nothing_that_a_clock_measured(run_door, tmp_path):
    texts = []
    for name, speed in (("a", 1000.0), ("b", 777.0)):
        folder = made.write_sweep(tmp_path / name, table=TABLE, speed=speed)
        texts.append(
            {
                kind: shown(run_door, folder, "--no_timing", "--format", kind)
                for kind in ("md", "csv", "json", "latex", "html")
            }
        )
        assert "tokens/s" in shown(run_door, folder)
    assert texts[0] == texts[1]
    assert "tokens/s" not in texts[0]["html"]


def test_a_measured_metric_goes_with_no_timing(run_door, told, study):
    timed = "train/time/tokens_per_second"
    found = records(run_door, study, "--metric", timed)
    assert found["attention", timed]["mean"] == pytest.approx(2000.0)
    text = shown(run_door, study, f"--metric={timed},eval/loss", "--no_timing")
    assert "tokens_per_second" not in text and "eval/loss" in text
    assert "a metric must be left" in told(
        main, study, "--metric", timed, "--no_timing"
    )


def test_csv_reads_back(run_door, study):
    rows = list(csv.DictReader(io.StringIO(shown(run_door, study, "--format", "csv"))))
    assert len(rows) == 4
    assert float(rows[0]["mean"]) == pytest.approx(final("attention").mean())
    assert rows[0]["difference"] == "" and rows[2]["paper"] == "1.85"


def test_latex_is_escaped_and_balanced(run_door, study):
    text = shown(run_door, study, "--format", "latex")
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"gated\_attention"):
        assert word in text
    assert r"Gates \& $<$softmax$>$" in text and r"50 \% of it" in text
    assert text.isascii()
    places = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text).group(1)
    body = text[text.index("toprule") : text.index("bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3
    assert all(len(re.findall(r"(?<!\\)&", r)) == len(places) - 1 for r in rows)
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


class Page(html.parser.HTMLParser):
    """Open tags, and what a page asks others for."""

    void = ("meta", "br", "path", "use", "link", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.stack, self.fetched, self.ids, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.stack.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(run_door, study):
    text = shown(run_door, study, "--format", "html")
    page = Page(text)
    assert page.stack == [] and page.fetched == []
    assert len(page.ids) == len(set(page.ids)) > 10
    assert page.tags.count("svg") >= 6
    assert "Gates &amp; &lt;softmax&gt;" in text and "<softmax>" not in text
    for heading in ("eval/loss during training", "eval/loss against FLOPs/token"):
        assert f"<h2>{heading}</h2>" in text
    assert text == shown(run_door, study, "--format", "html")


def test_out_is_written_whole(run_door, study, tmp_path):
    out = tmp_path / "deep" / "table.md"
    said = shown(run_door, study, "--out", out)
    assert said == f"wrote {out}\n"
    assert out.read_text() == shown(run_door, study)
    assert [path.name for path in out.parent.iterdir()] == ["table.md"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--metric", "eval/los"], "got 'eval/los'. Did you mean eval/loss"),
        (["--metric", "loss"], "Write eval/loss or train/loss"),
        (["--rows", "mixr"], "rows must name labels .* Did you mean mixer"),
        (["--cols", "sede"], "columns must name labels .* Did you mean seed"),
        (["--baseline", "mixer=softmax"], "the baseline must be a row"),
        (["--baseline", "mixer"], "must be LABEL=VALUE"),
        (["--only", "mixer=atention"], "mixer=atention. Did you mean attention"),
        (["--last", "--best"], "exclude one another"),
        (["--format", "pdf"], "--format"),
        (["--metrics", "eval/loss"], "unknown flag '--metrics'"),
    ],
)
def test_a_bad_request_is_one_line(told, study, words, text):
    assert re.search(text, told(main, study, *words))


def test_folders_without_runs_are_refused(told, tmp_path):
    assert "holds no runs" in told(main, tmp_path)
    assert "does not exist or is a file" in told(main, tmp_path / "none")


@pytest.mark.parametrize("name", ["summary.json", "config.json", "manifest.json"])
def test_a_broken_file_is_named(told, tmp_path, name):
    made.write_run(tmp_path / "run", made.config_of("attention", 0))
    (tmp_path / "run" / name).write_text('{"final": ')
    assert f"run/{name}" in told(main, tmp_path)


def test_a_broken_sweep_file_is_named(told, tmp_path):
    for text in ("{", '{"format": 9}', '{"format": 1, "points": [{"hash": "a"}]}'):
        (tmp_path / "sweep.json").write_text(text)
        assert "sweep.json" in told(main, tmp_path)
    (tmp_path / "sweep.json").write_text('{"format": 1, "points": []}')
    assert "has no points" in told(main, tmp_path)
