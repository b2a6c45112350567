"""python -m attnjax.sweep: a sweep of two runs, and what a mistake is told."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from attnjax import sweep
from attnjax.studies import ledger

SWEEP = """
from attnjax.studies import Table, grid, point, seeds


def sweep():
    return seeds(point({config!r}, mixer="linear"), {seeds})


def table():
    return Table(rows=("mixer",), baseline={{"mixer": "linear"}})
"""


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "sweep.py"
    path.write_text(SWEEP.format(config=str(tiny), seeds=2))
    return path


@pytest.fixture(scope="module")
def finished(file, run_door, tmp_path_factory):
    """The work directory of the sweep, done, and what was said."""
    work = tmp_path_factory.mktemp("work")
    words = ["--sweep", file, "--workdir", work, "--jobs", "2"]
    code, out, err = run_door(sweep.main, *words)
    assert code == 0, out + err
    return work, words, out


def test_every_point_has_a_run_a_state_and_a_log(finished):
    work, _, out = finished
    points = json.loads((work / "sweep.json").read_text())["points"]
    assert [point["labels"] for point in points] == [
        {"mixer": "linear", "seed": 0},
        {"mixer": "linear", "seed": 1},
    ]
    for point in points:
        run = work / "points" / point["hash"]
        assert ledger.is_done(run)
        assert (
            json.loads((run / "config.json").read_text())["train"]["seed"]
            == (point["labels"]["seed"])
        )
        assert ledger.read(work, point["hash"]).state == "done"
        assert "held-out loss" in (work / f"logs/{point['hash']}.1.log").read_text()
    assert "2 of 2 points done." in out


def test_the_same_command_has_nothing_left_to_do(finished, run_door):
    work, words, _ = finished
    before = sorted(path.stat().st_mtime_ns for path in work.glob("*/*"))
    code, out, _ = run_door(sweep.main, *words)
    assert code == 0
    assert "2 points, 2 of them done" in out and "start" not in out
    assert sorted(path.stat().st_mtime_ns for path in work.glob("*/*")) == before


def test_a_dry_run_says_what_it_rests_on_and_writes_nothing(
    finished, file, run_door, tmp_path
):
    words = ["--sweep", file, "--workdir", tmp_path / "new", "--dry_run"]
    code, out, _ = run_door(sweep.main, *words)
    assert code == 0
    assert not (tmp_path / "new").exists()
    head, *rows = out.splitlines()[:3]
    assert re.split(r"\s\s+", head) == [
        "hash",
        "state",
        "parameters",
        "FLOPs/token",
        "time",
        "point",
    ]
    assert all("pending" in row and "unknown" in row for row in rows)
    assert rows[1].endswith("mixer=linear seed=1")
    assert "time unknown: no point of this sweep has finished" in out
    _, words, _ = finished
    code, out, _ = run_door(sweep.main, *words, "--dry_run")
    assert code == 0
    assert "time from 2 finished points" in out and "unknown" not in out


def test_printed_commands_do_the_work_elsewhere(file, run_door, tmp_path):
    words = ["--sweep", file, "--workdir", tmp_path, "--launcher", "print"]
    code, out, _ = run_door(sweep.main, *words)
    assert code == 0
    commands = out.splitlines()
    assert [line.rpartition("  # ")[2] for line in commands] == [
        "mixer=linear seed=0",
        "mixer=linear seed=1",
    ]
    _, out, _ = run_door(sweep.main, *words, "--only", "seed=1")
    assert out.splitlines() == commands[1:]
    done = subprocess.run(shlex.split(commands[0], comments=True), timeout=300)
    assert done.returncode == 0
    _, out, _ = run_door(sweep.main, *words)
    assert out.splitlines() == commands[1:]


@pytest.mark.reliability
def test_ctrl_c_saves_and_the_same_command_finishes(tiny, tmp_path):
    path = tmp_path / "sweep.py"
    body = SWEEP.format(config=str(tiny), seeds=1)
    changes = '{"train.steps": 20000, "train.save_every": 10000, "train.log_every": 1}'
    path.write_text(body.replace(', mixer="', f', {changes}, mixer="'))
    work = tmp_path / "work"
    words = [sys.executable, "-m", "attnjax.sweep", "--sweep", str(path)]
    words += ["--workdir", str(work)]
    driver = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not list(work.glob("points/*/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGINT)
    out, _ = driver.communicate(timeout=300)
    assert driver.returncode == 75, out
    assert "0 of 1 points done, 1 left. Run the same command again." in out
    (run,) = work.glob("points/*")
    assert list((run / "checkpoints").glob("*/digests.json"))
    assert ledger.read(work, run.name).state == "pending"


MISTAKES = {
    "a missing file": (None, [], r"--sweep: no file .*sweeep\.py'\. Did you mean"),
    "no sweep()": ("x = 1\n", [], r"must define sweep\(\)"),
    "a wrong config": (
        SWEEP.replace('mixer="linear"', '{{"train.step": 3}}, mixer="a"'),
        [],
        r"point 0 \(mixer=a seed=0\): config\.train: unknown key 'step'\. Did you mean",
    ),
    "a baseline in no row": (
        SWEEP.replace('baseline={{"mixer": "linear"', 'baseline={{"mixer": "linnear"'),
        [],
        r"the baseline must be a row; got baseline=mixer=linnear.*Did you mean linear",
    ),
    "an unknown launcher": (
        SWEEP,
        ["--launcher", "slrum"],
        r"--launcher: unknown launcher 'slrum'\. Did you mean slurm",
    ),
    "no jobs": (SWEEP, ["--jobs", "0"], r"--jobs: must be at least 1; got 0"),
}


@pytest.mark.parametrize("body, words, text", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(tiny, told, tmp_path, body, words, text):
    path = tmp_path / "sweep.py"
    path.write_text((body or SWEEP).format(config=str(tiny), seeds=2))
    named = path if body else tmp_path / "sweeep.py"
    words = ["--sweep", named, "--workdir", tmp_path / "work", *words]
    assert re.search(text, told(sweep.main, *words))
    assert not list((tmp_path / "work").glob("state/*"))


def test_the_directory_of_a_run_is_refused(file, told, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    text = told(sweep.main, "--sweep", file, "--workdir", tmp_path)
    assert "is the directory of one run" in text
