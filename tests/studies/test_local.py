"""The local launcher, with workers that do as they are told instead of training."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from attnjax.core.errors import UserError
from attnjax.studies import ledger, sweep_file, worker
from attnjax.studies.launchers import Options, local

WORKER = """
import dataclasses, json, os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from attnjax.studies import ledger
from attnjax.studies.places import run_directory

work, point = Path(sys.argv[1]), sys.argv[2]
told = json.loads((work / "told.json").read_text()).get(point, [])
try:
    with ledger.hold(work, point, patience=0):
        if ledger.is_done(run_directory(work, point)):
            sys.exit(0)
        state = ledger.begun(ledger.read(work, point))
        ledger.write(work, state)
        word = (told[state.attempt - 1:] or ["done"])[0]
        with open(work / "order", "a") as order:
            order.write(point + "\\n")
        if word == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "wait":
            def saved(*_):
                print("saved", flush=True)
                os._exit(75)
            signal.signal(signal.SIGTERM, saved)
            (work / "waits").touch()
            time.sleep(60)
        if isinstance(word, int):
            print("the last word of", point)
            sys.exit(word)
        run = run_directory(work, point)
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text('{{"train": {{"steps": 3}}}}')
        (run / "manifest.json").write_text('{{"finished_step": 3}}')
        (run / "summary.json").write_text('{{"final": {{"loss": 2.5}}}}')
        if word == "unwritten":
            sys.exit(2)
        ledger.write(work, dataclasses.replace(state, state="done"))
except ledger.Busy:
    sys.exit(76)
"""
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def bench(study, monkeypatch):
    """Runs a driver: (what workers do, by number of point) -> exit code."""
    script = study.workdir / "worker.py"
    script.write_text(WORKER.format(root=ROOT))

    def command(workdir, point):
        return [sys.executable, str(script), str(workdir), point]

    monkeypatch.setattr(worker, "command", command)
    monkeypatch.setattr(local, "ELSEWHERE", 0.05)
    monkeypatch.setattr(local, "POLL", 0.01)

    def run(told=None, **options):
        content = {study.points[i].hash: words for i, words in (told or {}).items()}
        (study.workdir / "told.json").write_text(json.dumps(content))
        (study.workdir / "order").write_text("")
        return local.launch(study, Options(**options))

    return run


def test_only_the_points_that_are_asked_for_run(bench, study, capsys):
    object.__setattr__(study, "only", "seed=2,seed=0")
    assert bench() == 0
    assert order(study) == [0, 2]
    assert "2 of 2 points done" in capsys.readouterr().out


def states(study):
    return [ledger.read(study.workdir, point.hash).state for point in study.points]


def order(study):
    """The numbers of the points in the order in which workers began them."""
    numbers = {point.hash: i for i, point in enumerate(study.points)}
    lines = (study.workdir / "order").read_text().split()
    return [numbers[line] for line in lines]


def test_points_run_in_order_and_the_second_time_nothing_is_left(bench, study, capfd):
    assert bench() == 0
    assert order(study) == [0, 1, 2]
    out = capfd.readouterr().out
    assert re.search(r"done .*seed=2  loss 2\.5000  \d+ s  \[3/3\]", out)
    assert "3 of 3 points done." in out
    assert bench() == 0
    assert order(study) == []
    assert "3 points, 3 of them done" in capfd.readouterr().out


def test_a_run_that_is_there_is_done_whatever_its_worker_could_write(
    bench, study, capfd
):
    assert bench({1: ["unwritten"]}) == 0
    assert "3 of 3 points done." in capfd.readouterr().out
    assert states(study) == ["done", "running", "done"]
    assert bench() == 0
    assert order(study) == [] and states(study) == ["done"] * 3


def test_a_crash_is_tried_again_and_each_attempt_has_a_log(bench, study, capfd):
    assert bench({1: ["killed", 1]}, retries=2) == 0
    assert order(study) == [0, 1, 2, 1, 1]
    out = capfd.readouterr().out
    assert "killed by SIGKILL" in out and "again (1)" in out
    point = study.points[1].hash
    assert ledger.read(study.workdir, point).attempt == 3
    logs = sorted(path.name for path in (study.workdir / "logs").glob(f"{point}*"))
    assert logs == [f"{point}.{attempt}.log" for attempt in (1, 2, 3)]


def test_a_point_is_given_up_after_its_retries_and_the_others_go_on(
    bench, study, capfd
):
    assert bench({0: [1] * 9}, retries=1) == 1
    assert order(study) == [0, 1, 2, 0]
    assert states(study) == ["failed", "done", "done"]
    told = capfd.readouterr()
    assert "2 of 3 points done, 1 failed." in told.out
    assert re.search(
        r"error: seed=0: the last word of \w+ \(log: .*\.2\.log\)", told.err
    )
    # The next invocation does what is missing, and that alone.
    assert bench({0: [1, 1]}) == 0
    assert order(study) == [0]


def test_a_mistake_is_not_tried_again(bench, study):
    assert bench({1: [2] * 9}, retries=5) == 2
    assert order(study) == [0, 1, 2]
    assert states(study) == ["done", "failed", "done"]


def test_a_mistake_and_a_crash_together_are_a_fault(bench):
    assert bench({0: [1], 1: [2]}, retries=0) == 1


def test_being_saved_is_no_failure(bench, study):
    assert bench({1: [75, 75, 75]}, retries=0) == 0
    assert order(study) == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_workers_and_leaves_everything_resumable(
    bench, study, capfd, number
):
    def interrupt():
        until = time.monotonic() + 300
        while not (study.workdir / "waits").exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    assert bench({1: ["wait"]}, jobs=2, retries=0) == 75
    told = capfd.readouterr().out
    assert "of 3 points done" in told and "Run the same command again." in told
    log = study.workdir / "logs" / f"{study.points[1].hash}.1.log"
    assert log.read_text() == "saved\n"
    assert states(study)[1] == "pending"
    assert bench() == 0
    assert states(study) == ["done"] * 3


def test_a_point_that_another_process_runs_is_waited_for_not_run(bench, study, capfd):
    held = study.points[0].hash
    code = (
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "from attnjax.studies import ledger\n"
        "with ledger.hold(sys.argv[1], sys.argv[2]):\n"
        "    state = ledger.begun(ledger.read(*sys.argv[1:]))\n"
        "    ledger.write(sys.argv[1], state)\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
        "    from dataclasses import replace\n"
        "    ledger.write(sys.argv[1], replace(state, state='failed', exit_code=2,\n"
        "                 error='said elsewhere'))\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(study.workdir), held],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b"held\n"

    def let_go():
        until = time.monotonic() + 300
        while states(study)[1:] != ["done"] * 2 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        other.stdin.close()

    threading.Thread(target=let_go).start()
    assert bench() == 2
    other.wait()
    assert order(study) == [1, 2]
    assert "error: seed=0: said elsewhere" in capfd.readouterr().err


def test_two_drivers_run_no_point_twice(bench, study):
    (study.workdir / "told.json").write_text("{}")
    code = (
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "from pathlib import Path\n"
        "from attnjax.studies import sweep_file, worker\n"
        "from attnjax.studies.launchers import Options, local\n"
        "worker.command = lambda work, point: [sys.executable, str(work / 'worker.py'),"
        " str(work), point]\n"
        f"study = sweep_file.load({str(study.file)!r}, {str(study.workdir)!r})\n"
        "study.write()\n"
        "sys.exit(local.launch(study, Options(jobs=2)))\n"
    )
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [other.wait(timeout=120) for other in others] == [0, 0]
    assert sorted(order(study)) == [0, 1, 2]


def test_a_full_disk_fails_its_point_and_nobody_else(bench, study, monkeypatch, capfd):
    victim, write = study.points[1].hash, ledger.write

    def full(workdir, state):
        if state.hash == victim:
            raise UserError("state: no space left on the disk.")
        write(workdir, state)

    monkeypatch.setattr(ledger, "write", full)
    (study.workdir / "logs" / f"{victim}.1.log").mkdir()
    assert bench() == 2
    told = capfd.readouterr()
    assert "its state could not be written" in told.out
    assert "Is a directory" in told.err
    assert states(study) == ["done", "pending", "done"]


def test_a_disk_without_room_for_a_word_is_no_crash(bench, study, monkeypatch, capfd):
    usage = types.SimpleNamespace(free=100)
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: usage)
    point = study.points[0].hash
    monkeypatch.setattr(ledger, "last_words", lambda _: None)
    assert bench({0: [1]}, retries=5) == 2
    assert order(study) == [0, 1, 2]
    assert "no space left on the disk" in ledger.read(study.workdir, point).error


def test_a_run_that_ended_without_its_worker_telling_counts_as_done(bench, study):
    assert bench() == 0
    state = ledger.read(study.workdir, study.points[0].hash)
    (study.workdir / "state" / f"{state.hash}.json").unlink()
    assert bench() == 0
    assert order(study) == []
    assert states(study) == ["done"] * 3


def test_a_result_that_is_gone_is_made_again(bench, study):
    assert bench() == 0
    (study.run_directory(study.points[2]) / "summary.json").unlink()
    assert bench() == 0
    assert order(study) == [2]


def test_a_changed_sweep_keeps_what_is_done(bench, study, sweep_of):
    assert bench() == 0
    more = sweep_file.load(
        sweep_of("def sweep():\n    return seeds(BASE, 4)\n"), study.workdir
    )
    more.write()
    (study.workdir / "order").write_text("")
    assert local.launch(more, Options()) == 0
    assert (study.workdir / "order").read_text().split() == [more.points[3].hash]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"jobs": 0}, r"--jobs: must be at least 1; got 0"),
        ({"retries": -1}, r"--retries: must not be negative; got -1"),
    ],
)
def test_options_that_cannot_be_are_refused(study, options, text):
    with pytest.raises(UserError, match=text):
        local.launch(study, Options(**options))
