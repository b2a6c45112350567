"""python -m attnjax.bench, run in this process on tiny shapes."""

import json

import pytest

from attnjax import bench
from attnjax.benchmarks import kernels, mixers, train
from attnjax.core import cli
from attnjax.core.errors import UserError


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


@pytest.mark.parametrize(
    "module", [kernels, mixers, train], ids=lambda module: module.__name__
)
def test_the_word_chooses_the_benchmark_and_the_filter_reaches_it(module, monkeypatch):
    seen = []

    def run(pattern):
        seen.append(pattern)
        return {"rows": []}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "print_report", seen.append)
    bench.main([module.__name__.rpartition(".")[2], "--filter", "torch"])
    assert seen == ["torch", {"rows": []}]


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
