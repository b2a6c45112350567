"""Points that one program trains: who belongs together, and what the ledger says."""

import json

import pytest

from attnjax.core.errors import EXIT_FAULT, EXIT_OK, EXIT_SAVED, EXIT_USER, UserError
from attnjax.studies import groups, ledger
from attnjax.studies.worker import EXIT_BUSY
from attnjax.training import disk, experiment, vectorized
from attnjax.training.vectorized import Outcome


def config(seed=0, layers=2, **optim):
    return experiment.resolve(
        {
            "data": {"name": "stdlib"},
            "model": {"num_layers": layers},
            "train": {"seed": seed, "steps": 3},
            "optim": optim,
        }
    )


POINTS = {
    "a0": config(0),
    "b0": config(0, layers=3),
    "a1": config(1),
    "a2": config(2, learning_rate=0.1),
    "b1": config(1, layers=3),
}


@pytest.fixture
def sweep(tmp_path):
    for name in ("configs", "points", "state", "logs"):
        (tmp_path / name).mkdir()
    for name, one in POINTS.items():
        disk.write_json(tmp_path / "configs" / f"{name}.json", one)
    disk.write_json(tmp_path / "sweep.json", {"points": [{"hash": n} for n in POINTS]})
    return tmp_path


def finish(run, one):
    run.mkdir(parents=True, exist_ok=True)
    disk.write_json(run / "config.json", one)
    disk.write_json(run / "manifest.json", {"finished_step": 3})
    disk.write_json(run / "summary.json", {})


@pytest.fixture
def trainer(monkeypatch):
    """Stands in for the training; keeps what it was asked for."""
    asked = []

    def train_group(configs, workdirs, *, vectorize, sample, signals):
        asked.append(([run.name for run in workdirs], vectorize))
        ends = train_group.ends or [Outcome(EXIT_OK)] * len(configs)
        for end, run, one in zip(ends, workdirs, configs, strict=True):
            if end.code == EXIT_OK:
                finish(run, one)
        return list(ends)

    train_group.ends, train_group.asked = None, asked
    monkeypatch.setattr(vectorized, "train_group", train_group)
    return train_group


def states(sweep):
    return {name: ledger.read(sweep, name).state for name in POINTS}


def test_points_that_differ_in_seed_or_rate_belong_together():
    assert groups.split(POINTS) == [["a0", "a1", "a2"], ["b0", "b1"]]


def test_a_sweep_without_a_pair_is_refused_by_what_differs():
    lone = {"a": config(0), "b": config(1, layers=5)}
    with pytest.raises(UserError, match=r"differ in config\.model\.num_layers\."):
        groups.check(lone)
    with pytest.raises(UserError, match="needs two points or more"):
        groups.check({"a": config(0)})
    groups.check(POINTS)


def test_a_worker_takes_along_what_waits(sweep, trainer):
    assert groups.work(sweep, "a1", vectorize=True) == EXIT_OK
    assert trainer.asked == [(["a1", "a0", "a2"], True)]
    assert states(sweep) == {
        **dict.fromkeys(("a0", "a1", "a2"), "done"),
        **dict.fromkeys(("b0", "b1"), "pending"),
    }


def test_done_failed_and_running_points_are_left_alone(sweep, trainer):
    finish(sweep / "points" / "a0", POINTS["a0"])
    with ledger.hold(sweep, "a2"):
        ledger.write(sweep, ledger.begun(ledger.State("a2")))
        assert groups.work(sweep, "a1") == EXIT_OK
        assert groups.work(sweep, "a2") == EXIT_BUSY
    assert trainer.asked == [(["a1"], "auto")]
    ledger.write(sweep, ledger.State("b1", "failed"))
    assert groups.work(sweep, "b0") == EXIT_OK
    assert trainer.asked[-1] == (["b0"], "auto")


def test_every_point_has_its_own_end(sweep, trainer):
    trainer.ends = [Outcome(EXIT_USER, "bad"), Outcome(EXIT_OK), Outcome(EXIT_SAVED)]
    assert groups.work(sweep, "a0") == EXIT_USER
    assert states(sweep) | {"b0": "", "b1": ""} == {
        **{"a0": "failed", "a1": "done", "a2": "pending"},
        **{"b0": "", "b1": ""},
    }
    assert ledger.read(sweep, "a0").error == "bad"
    assert ledger.read(sweep, "a2").exit_code == EXIT_SAVED


def test_an_error_of_the_group_is_the_error_of_each(sweep, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(vectorized, "train_group", fail)
    assert groups.work(sweep, "b0") == EXIT_FAULT
    for name in ("b0", "b1"):
        state = ledger.read(sweep, name)
        assert (state.state, state.error) == ("failed", "RuntimeError: out of memory")


def test_the_command_line_reaches_the_group(sweep, trainer):
    words = groups.command(sweep, "a0", vectorize=True)
    assert words[1:3] == ["-m", "attnjax.studies.groups"]
    assert groups.main(words[3:]) == EXIT_OK
    assert trainer.asked == [(["a0", "a1", "a2"], True)]
    with pytest.raises(UserError, match="has no point 'zz'"):
        groups.main(["--workdir", str(sweep), "--hash", "zz"])
    assert json.loads((sweep / "state" / "a0.json").read_text())["attempt"] == 1
