"""Points that one program trains: who belongs together, and what the ledger says."""

import json

import pytest

from attnjax.core import mappings
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
def sweep(tmp_path, monkeypatch):
    def name_of(config, exclude):
        return next((n for n, known in POINTS.items() if known == config), "another")

    monkeypatch.setattr(mappings, "digest", name_of)
    for name in ("configs", "points", "state", "logs"):
        (tmp_path / name).mkdir()
    for name, one in POINTS.items():
        disk.write_json(tmp_path / "configs" / f"{name}.json", one)
    points = [{"hash": name, "vectorize": True} for name in POINTS]
    disk.write_json(tmp_path / "sweep.json", {"points": points})
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


def test_points_that_did_not_ask_for_it_are_left_alone(sweep, trainer):
    points = [{"hash": name, "vectorize": name != "a2"} for name in POINTS]
    disk.write_json(sweep / "sweep.json", {"points": points})
    assert groups.work(sweep, "a0", vectorize=True) == EXIT_OK
    assert trainer.asked == [(["a0", "a1"], True)]


def test_a_point_done_meanwhile_is_not_begun(sweep, trainer, capsys):
    finish(sweep / "points" / "a0", POINTS["a0"])
    assert groups.work(sweep, "a0") == EXIT_OK
    assert trainer.asked == [] and "a0: done." in capsys.readouterr().out


def test_a_changed_config_is_refused_and_not_taken_along(sweep, trainer):
    disk.write_json(sweep / "configs" / "a1.json", config(7))
    assert groups.work(sweep, "a0", vectorize=True) == EXIT_OK
    assert trainer.asked == [(["a0", "a2"], True)]
    with pytest.raises(UserError, match="not the config of the point 'a1'.*changed"):
        groups.work(sweep, "a1", vectorize=True)


def test_a_full_disk_at_the_end_leaves_the_other_states(
    sweep, trainer, monkeypatch, capsys
):
    write = ledger.write

    def full(workdir, state):
        if state.hash in ("a0", "a1") and state.state != "running":
            raise UserError("state: no space left on the disk.")
        write(workdir, state)

    monkeypatch.setattr(ledger, "write", full)
    assert groups.work(sweep, "a0", vectorize=True) == EXIT_USER
    said = capsys.readouterr()
    assert said.err == "error: state: no space left on the disk.\n"
    assert ledger.read(sweep, "a2").state == "done"
    # The others' runs are there, and whoever looks next puts the words right.
    for name in ("a0", "a1"):
        assert ledger.current(sweep, name).state == "pending"
        monkeypatch.setattr(ledger, "write", write)
        assert ledger.settle(sweep, name, sweep / "points" / name).state == "done"


def test_a_full_disk_that_was_told_is_not_told_twice(
    sweep, trainer, monkeypatch, capsys
):
    def full(workdir, state):
        if state.state != "running":
            raise UserError("state: no space left on the disk.")

    monkeypatch.setattr(ledger, "write", full)
    trainer.ends = [Outcome(EXIT_USER, "no space left on the disk.")] * 3
    assert groups.work(sweep, "a0", vectorize=True) == EXIT_USER
    assert capsys.readouterr().err == ""


def test_a_list_is_run_but_for_what_is_done(sweep, trainer):
    finish(sweep / "points" / "a1", POINTS["a1"])
    ledger.write(sweep, ledger.State("a2", "failed"))
    words = groups.command(sweep, "a1", vectorize="auto", beside=["a2", "b0"])
    assert groups.main(words[3:]) == EXIT_OK
    assert trainer.asked == [(["a2", "b0"], "auto")]
    assert groups.main(words[3:]) == EXIT_OK
    with ledger.hold(sweep, "a0"):
        assert groups.work(sweep, "a0", beside=["a1"]) == EXIT_BUSY
    assert len(trainer.asked) == 1


def test_a_list_ends_as_its_gravest_point_does(sweep, trainer):
    good, bad, worse = Outcome(EXIT_OK), Outcome(EXIT_USER, "a"), Outcome(EXIT_FAULT)
    saved = Outcome(EXIT_SAVED)
    for ends, code in (
        ([bad, worse, saved], EXIT_SAVED),
        ([bad, worse, good], EXIT_FAULT),
        ([bad, good], EXIT_USER),
        ([good], EXIT_OK),
    ):
        trainer.ends = ends
        assert groups.work(sweep, "a0", beside=["a1", "a2"]) == code


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
