"""Two processes of four CPU devices each train one run, through launch/local/run.py."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attnjax.training.checkpoint_reader import CheckpointReader

pytestmark = pytest.mark.reliability

REPOSITORY = Path(__file__).parents[2]
RUN = REPOSITORY / "launch" / "local" / "run.py"
STEPS, SAVE_EVERY = 60, 20
LIMIT = 900  # seconds; a quiet machine needs twenty
OPTIONS = {
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "data.seq_len": 32,
    "train.steps": STEPS,
    "train.batch_size": 16,
    "train.log_every": 1,
    "train.save_every": SAVE_EVERY,
    "train.sample_tokens": 8,
    "eval.every": 30,
    "eval.batches": 4,
    "mesh.data": 2,
    "mesh.fsdp": 4,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = " ".join(f"word{number * k % 97}" for k in range(1, 80))
        (folder / f"{number:02d}.txt").write_text(words)
    return folder


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory):
    """An undisturbed run of one process with eight devices."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert _alone(corpus, run).wait(LIMIT) == 0
    return run


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    """An undisturbed run of two processes with four devices each."""
    run = tmp_path_factory.mktemp("two") / "run"
    launched = _launch(corpus, run)
    text, _ = launched.communicate(timeout=LIMIT)
    assert launched.returncode == 0, text
    return run


def _words(corpus, run, changes):
    options = OPTIONS | {
        "data.name": f"text:{corpus}/*.txt",
        "data.cache_dir": str(corpus / "cache"),
        **changes,
    }
    config = ["--config", str(REPOSITORY / "configs" / "quickstart.py")]
    words = [f"--config.{name}={value}" for name, value in options.items()]
    return [*config, "--workdir", str(run), *words]


def _start(command, environment=()):
    return subprocess.Popen(
        [sys.executable, *command],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(REPOSITORY),
            **dict(environment),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _alone(corpus, run, **changes):
    words = _words(corpus, run, changes)
    eight = {"JAX_NUM_CPU_DEVICES": "8"}
    process = _start(["-m", "attnjax.train", *words], eight)
    process.communicate(timeout=LIMIT)
    return process


def _launch(corpus, run, *options, **changes):
    front = [str(RUN), "--processes", "2", "--devices_per_process", "4", *options]
    return _start([*front, "--", *_words(corpus, run, changes)])


def _records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _assert_same_losses(left, right):
    pairs = [[(r["step"], r["split"]) for r in _records(run)] for run in (left, right)]
    assert pairs[0] == pairs[1]
    losses = [[r["loss"] for r in _records(run)] for run in (left, right)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


def _wait_for_step(run, step, launched):
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and launched.poll() is None:
        if (run / "metrics.jsonl").exists() and len(_records(run)) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"no step {step}: {launched.communicate()[0]}")


def _process(run, index):
    """The pid of one of a run's processes, by its environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_run = str(run).encode() in command and b"attnjax.train" in command
        if is_run and f"JAX_PROCESS_ID={index}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no process {index} of {run}")


def test_losses_equal_those_of_one_process(one, two):
    assert len(_records(two)) == STEPS + 2
    _assert_same_losses(one, two)
    ends = [CheckpointReader(run / "checkpoints").latest() for run in (one, two)]
    assert ends[0].step == ends[1].step == STEPS


def test_the_result_is_written_once(two):
    manifest = json.loads((two / "manifest.json").read_text())
    assert len(manifest["starts"]) == len(manifest["ends"]) == 1
    assert manifest["machine"]["process_count"] == 2
    assert (two / "summary.json").exists()
    log = (two.parent / "run.logs" / "process_1.log").read_text()
    assert "held-out" not in log and "Traceback" not in log


def test_sigterm_to_one_saves_all_and_one_process_goes_on(corpus, one, tmp_path):
    run = tmp_path / "run"
    launched = _launch(corpus, run)
    _wait_for_step(run, 25, launched)
    os.kill(_process(run, 1), 15)
    text, _ = launched.communicate(timeout=LIMIT)
    assert launched.returncode == 75, text
    saved = CheckpointReader(run / "checkpoints").latest().step
    assert f"SIGTERM (process 1): saved at step {saved} of {STEPS}" in text
    assert 25 <= saved < STEPS
    assert _alone(corpus, run).returncode == 0
    _assert_same_losses(one, run)


def test_two_processes_go_on_after_a_kill(corpus, one, tmp_path):
    run = tmp_path / "run"
    launched = _launch(corpus, run, "--wait", "5")
    _wait_for_step(run, SAVE_EVERY + 8, launched)
    os.kill(_process(run, 1), 9)
    text, _ = launched.communicate(timeout=LIMIT)
    assert launched.returncode == 1, text
    assert "process 1: ended by signal SIGKILL" in text
    assert "the same command goes on from the last checkpoint" in text
    again = _launch(corpus, run)
    text, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, text
    assert f"resuming from step {SAVE_EVERY}" in text
    _assert_same_losses(one, run)


def test_a_mistake_is_said_once_without_a_traceback(corpus, tmp_path):
    run = tmp_path / "run"
    launched = _launch(corpus, run, **{"train.batch_size": 12})
    text, _ = launched.communicate(timeout=LIMIT)
    assert launched.returncode == 2, text
    assert text.count("got batch_size=12") == 1 and "Traceback" not in text
    assert not run.exists()


def test_processes_with_different_configs_do_not_train(corpus, tmp_path):
    run = tmp_path / "run"
    launched = [
        _start(
            [
                "-m",
                "attnjax.train",
                *_words(corpus, run, {"optim.learning_rate": rate}),
            ],
            {
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:61123",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "JAX_NUM_CPU_DEVICES": "4",
            },
        )
        for index, rate in enumerate((1e-3, 2e-3))
    ]
    texts = [process.communicate(timeout=LIMIT)[0] for process in launched]
    assert [process.returncode for process in launched] == [2, 2]
    for text in texts:
        assert "must be the same in all processes" in text and "Traceback" not in text
    assert not run.exists()


def test_pages_show_commands_that_the_launcher_takes():
    spec = importlib.util.spec_from_file_location("launch_local_run", RUN)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    for page in ("README.md", "launch/README.md", "launch/local/run.py"):
        text = (REPOSITORY / page).read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if "launch/local/run.py --" in line]
        assert lines, page
        for line in lines:
            options, rest = launcher.parse(shlex.split(line)[2:])
            assert options.processes == 2 and "--workdir" in rest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0", "--", "--workdir", "r"], "at least 1; got 0"),
        (["--processes", "2"], "give attnjax.train's options after `--`"),
        (["--processes", "2", "--", "--config", "c.py"], "give --workdir after"),
        (
            ["--processes", "2", "--gpus_per_process=1", "--devices_per_process=1"],
            "exclude each other",
        ),
    ],
)
def test_a_wrong_command_is_explained(words, message):
    process = _start([str(RUN), *words])
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert message in text and "Traceback" not in text
