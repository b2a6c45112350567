"""Seeds in one program are measured on the quickstart's model and agree with it."""

from pathlib import Path

import pytest

from attnjax.benchmarks import seeds
from attnjax.core import config as config_files
from attnjax.core.errors import UserError
from attnjax.training import experiment

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {"num_layers": 1, "embed_dim": 8, "num_heads": 2},
    "data": {"seq_len": 7},
    "train": {"batch_size": 2, "steps": 5},
}
QUICK = seeds.Settings(counts=(2, 3), rounds=1, calls=1, check_steps=3)


def test_the_model_is_the_quickstarts():
    given = config_files.load_file(str(ROOT / "configs" / "quickstart.py"))
    theirs, ours = experiment.resolve(given), experiment.resolve(seeds.QUICKSTART)
    for group in ("model", "optim", "task"):
        assert ours[group] == theirs[group]
    for name in ("steps", "batch_size", "accumulate"):
        assert ours["train"][name] == theirs["train"][name]
    assert ours["data"]["seq_len"] == theirs["data"]["seq_len"]


def test_rows_compare_the_time_of_a_seed(capsys):
    report = seeds.run("3", given=SMALL, settings=QUICK)
    (row,) = report["rows"]
    assert row["seeds"] == 3
    assert row["loss_difference"] < 1e-5
    ratio = row["ms_per_seed"] / row["separate_ms"]
    assert row["time_ratio"] == pytest.approx(ratio)
    seeds.print_report(report)
    assert "ms/step and seed" in capsys.readouterr().out


def test_a_filter_without_a_match_is_refused():
    with pytest.raises(UserError, match="matches no number of seeds; got '9'"):
        seeds.run("9", settings=QUICK)
