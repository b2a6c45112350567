"""python -m attnjax.bench, run in this process on tiny shapes."""

import json
import sys
import types

import pytest

from attnjax import bench
from attnjax.benchmarks import mixers, train
from attnjax.core import cli
from attnjax.core.errors import UserError


@pytest.fixture
def fake(monkeypatch):
    """A benchmark that only records how it was called."""
    calls = []

    def install(what, **parts):
        module = types.ModuleType(what)
        for name, value in parts.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, f"attnjax.benchmarks.{what}", module)
        return calls

    return install


def test_mixers_table_and_json(monkeypatch, tmp_path, capsys):
    tiny = mixers.Sizes(
        batch_size=1, seq_len=8, embed_dim=8, num_heads=2, rounds=1, calls=1
    )
    run = mixers.run
    monkeypatch.setattr(mixers, "run", lambda pattern: run(pattern, sizes=tiny))
    out = tmp_path / "deep" / "mixers.json"
    bench.main(["mixers", "--filter", "^attention$", "--json", str(out)])
    report = json.loads(out.read_text())
    assert [row["mixer"] for row in report["rows"]] == ["attention"]
    assert report["machine"]["versions"]["jax"]
    said = capsys.readouterr().out
    assert "attention" in said and str(out) in said


def test_train_hands_on_the_filter(monkeypatch):
    seen = []

    def run(pattern):
        seen.append(pattern)
        return {}

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "print_report", seen.append)
    bench.main(["train", "--filter", "torch"])
    assert seen == ["torch", {}]


def test_kernels_rows_are_printed_and_written(fake, tmp_path):
    printed = []
    fake("kernels", run=lambda pattern: [{"case": pattern}], print_table=printed.append)
    out = tmp_path / "kernels.json"
    bench.main(["kernels", "--filter", "causal", "--json", str(out)])
    assert printed == [[{"case": "causal"}]]
    assert json.loads(out.read_text())["rows"] == [{"case": "causal"}]


def test_a_kernels_filter_that_matches_nothing_is_refused(fake):
    fake("kernels", run=lambda pattern: [], print_table=print)
    with pytest.raises(UserError, match="bench kernels: --filter matches no row"):
        bench.main(["kernels", "--filter", "nothing"])


def test_a_bad_regular_expression_is_refused():
    with pytest.raises(UserError, match=r"--filter must be a regular expression"):
        bench.main(["mixers", "--filter", "(open"])


def test_an_unknown_benchmark_is_one_readable_line(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run_main(bench.main, ["mixer"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "mixers" in said


def test_a_directory_is_no_place_for_json(tmp_path):
    with pytest.raises(UserError, match="--json must be a file; got the directory"):
        bench.main(["mixers", "--json", str(tmp_path)])


def test_the_filter_of_mixers_is_checked_before_anything_is_built():
    with pytest.raises(UserError, match="matches no mechanism; got 'zzz'"):
        bench.main(["mixers", "--filter", "zzz"])
