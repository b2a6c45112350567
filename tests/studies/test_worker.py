"""The worker of one point, on a config that trains in a second."""

import json
import os
import subprocess
import sys

import pytest

from attnjax.core.errors import UserError
from attnjax.studies import ledger, worker
from attnjax.studies.places import run_directory


def states(study):
    return [ledger.read(study.workdir, point.hash) for point in study.points]


def ended(study, code, *, monkeypatch):
    """Run the worker of the first point with a training that ends with `code`."""

    def train(*, signals):
        if isinstance(code, Exception):
            raise code
        return code

    monkeypatch.setattr(worker, "_prepare", lambda *_: train)
    given = worker.work(study.workdir, study.points[0].hash)
    return given, states(study)[0]


def test_a_training_that_ends_without_a_summary_is_a_fault(study, monkeypatch):
    code, state = ended(study, 0, monkeypatch=monkeypatch)
    assert code == 1
    assert (state.state, state.attempt, state.pid) == ("failed", 1, os.getpid())
    assert state.error == "the training ended without a summary"


def test_a_saved_point_is_pending(study, monkeypatch):
    code, state = ended(study, 75, monkeypatch=monkeypatch)
    assert (code, state.state, state.exit_code) == (75, "pending", 75)
    assert state.ended is not None


def test_what_went_wrong_is_one_line_of_the_state(study, monkeypatch, capsys):
    mistake = UserError("config.x: must\n  be 3")
    code, state = ended(study, mistake, monkeypatch=monkeypatch)
    assert (code, state.state) == (2, "failed")
    assert state.error == "config.x: must be 3"
    code, state = ended(study, RuntimeError("boom"), monkeypatch=monkeypatch)
    assert (code, state.attempt) == (1, 2)
    assert state.error == "RuntimeError: boom"
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_told_once_and_leaves_the_state_before(
    study, monkeypatch, capsys
):
    full = UserError("state: no space left on the disk")
    write = ledger.write

    def refuse(workdir, state):
        if state.state != "running":
            raise full
        write(workdir, state)

    monkeypatch.setattr(ledger, "write", refuse)
    code, state = ended(study, full, monkeypatch=monkeypatch)
    assert (code, state.state) == (2, "running")
    assert capsys.readouterr().err.count("no space left") == 1
    assert ledger.current(study.workdir, state.hash).state == "pending"


def test_a_point_that_is_done_is_not_begun(study, monkeypatch):
    run = run_directory(study.workdir, study.points[0].hash)
    run.mkdir()
    (run / "config.json").write_text('{"train": {"steps": 3}}')
    (run / "manifest.json").write_text('{"finished_step": 3}')
    (run / "summary.json").write_text("{}")
    code, state = ended(study, RuntimeError("trained"), monkeypatch=monkeypatch)
    assert (code, state.attempt) == (0, 0)


def test_a_held_point_is_left_alone(study, monkeypatch):
    monkeypatch.setattr(ledger.time, "monotonic", iter(range(0, 1000, 50)).__next__)
    with ledger.hold(study.workdir, study.points[0].hash):
        code, state = ended(study, RuntimeError("trained"), monkeypatch=monkeypatch)
    assert (code, state.attempt) == (worker.EXIT_BUSY, 0)


def test_a_point_that_the_sweep_does_not_have_is_named(study):
    words = worker.command(study.workdir, "0" * 16)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert f"the sweep in {str(study.workdir)!r} has no point" in done.stderr


@pytest.mark.parametrize("content", ["{", '{"a": 1}'])
def test_a_config_that_was_edited_is_refused(study, content):
    point = study.points[0].hash
    (study.workdir / "configs" / f"{point}.json").write_text(content)
    words = worker.command(study.workdir, point)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Delete it; run the sweep again." in done.stderr
    assert (
        json.loads((study.workdir / "state" / f"{point}.json").read_text())["state"]
        == "failed"
    )


def test_the_command_is_this_python():
    words = worker.command("dir", "abc")
    assert words[0] == sys.executable
    assert words[1:] == ["-m", "attnjax.studies.worker", "--workdir", "dir"] + [
        "--hash",
        "abc",
    ]
