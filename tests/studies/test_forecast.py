import dataclasses

import pytest

from attnjax.core.errors import UserError
from attnjax.studies import forecast, ledger, sweep_file
from attnjax.training import experiment

SWEEP = "def sweep():\n    return grid(seeds(BASE, 2), {'train.steps': [10, 30]})\n"


@pytest.fixture
def study(sweep_of, tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("Some words, and some more of them. " * 50)
    source = {"data.name": f"text:{corpus}", "data.cache_dir": str(tmp_path / "cache")}
    body = f"BASE = point('config.py', {source})\n{SWEEP}"
    made = sweep_file.load(sweep_of(body), tmp_path / "work")
    made.write()
    return made


def finish(study, number, *, seconds, attempt=1):
    """Make a point look as if it had taken so long."""
    point = study.points[number]
    run = study.run_directory(point)
    run.mkdir()
    (run / "config.json").write_text('{"train": {"steps": 3}}')
    (run / "manifest.json").write_text('{"finished_step": 3}')
    (run / "summary.json").write_text("{}")
    state = ledger.State(
        point.hash,
        "done",
        attempt=attempt,
        started="2026-01-02T03:04:00+00:00",
        ended=f"2026-01-02T03:04:{seconds:02d}+00:00",
    )
    ledger.write(study.workdir, state)


def test_costs_are_those_of_the_model_and_scale_with_the_steps(study):
    found, basis = forecast.costs(study)
    short, long = found[0], found[1]
    assert long.training_flops == 3 * short.training_flops
    tokens = 10 * study.points[0].config["train"]["batch_size"] * 16
    assert short.training_flops == 3 * short.forward_flops_per_unit * tokens
    assert dataclasses.astuple(found[2]) == dataclasses.astuple(short)
    assert short.seconds is None
    assert basis.startswith("time unknown")


def test_the_difference_that_equal_parameters_leave_is_told(study):
    point = study.points[0]
    model = {**point.config["model"], "layers": "gated_attention", "params": "match"}
    model["mixers"] = {}
    config = experiment.resolve({**point.config, "model": model})
    one = dataclasses.replace(point, config=config, labels={"row": "gate"})
    lines = forecast.lines(dataclasses.replace(study, points=(one,)))
    cost = forecast.costs(dataclasses.replace(study, points=(one,)))[0][0]
    assert f"row=gate: {cost.matched.line()}" in lines
    assert cost.matched.parameters == cost.parameters


def test_time_is_that_of_finished_points_by_flops(study):
    finish(study, 0, seconds=8)
    found, basis = forecast.costs(study)
    assert [cost.seconds for cost in found] == pytest.approx([8, 24, 8, 24])
    assert basis.startswith("time from 1 finished points, by FLOPs")
    text = forecast.lines(study)
    assert text[-1].startswith("4 points, about 1 minutes of training left")
    assert "done" in text[1] and "pending" in text[2] and "24 s" in text[2]


def test_a_point_that_was_resumed_measures_nothing(study):
    finish(study, 0, seconds=8, attempt=2)
    assert forecast.costs(study)[0][0].seconds is None


def test_data_that_are_not_there_are_told_with_the_point(sweep_of, tmp_path):
    body = (
        "def sweep():\n    return point('config.py', {'data.name': 'text:none/*.txt'},"
        " row='a')\n"
    )
    study = sweep_file.load(sweep_of(body), tmp_path / "work")
    with pytest.raises(UserError, match=r"--sweep: .*sweep\.py: row=a: .*none"):
        forecast.costs(study)
