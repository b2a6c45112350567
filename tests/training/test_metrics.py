import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.training import metrics
from attnjax.training.metrics import MetricsLog


@pytest.fixture
def log(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as made:
        yield made


def fill(log, *steps, split="train"):
    for step in steps:
        log.write({"step": step, "split": split, "loss": 1 / (step + 1)})


def steps_of(log, split="train"):
    return [r["step"] for r in log.records() if r["split"] == split]


def test_a_record_is_one_line_of_json(log):
    log.write({"step": 3, "split": "eval", "loss": 0.5, "time": {"step_ms": 4.0}})
    assert log.path.read_text() == (
        '{"step": 3, "split": "eval", "loss": 0.5, "time": {"step_ms": 4.0}}\n'
    )


def test_every_record_is_in_the_file_when_write_returns(log):
    fill(log, 1, 2)
    assert len(log.path.read_bytes().splitlines()) == 2


def test_numbers_of_any_kind_survive(log):
    log.write(
        {
            "step": 1,
            "split": "train",
            "nan": math.nan,
            "inf": np.float32(np.inf),
            "minus": -math.inf,
            "array": np.arange(3),
            "scalar": np.float32(0.1),
            "flag": np.bool_(True),
            "none": None,
            "per": {"head": np.array([1.5, np.nan])},
        }
    )
    raw = log.path.read_text()
    json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = log.records()
    assert math.isnan(record["nan"]) and math.isnan(record["per"]["head"][1])
    assert (record["inf"], record["minus"]) == (math.inf, -math.inf)
    assert record["scalar"] == float(np.float32(0.1))
    assert (record["array"], record["flag"], record["none"]) == ([0, 1, 2], True, None)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"split": "train"}, "step must be an int; got step=None"),
        ({"step": 1.0, "split": "train"}, "step must be an int"),
        ({"step": True, "split": "train"}, "step must be an int"),
        ({"step": 1, "split": "test"}, "split must be one of"),
    ],
)
def test_records_without_step_or_split_are_refused(log, record, text):
    with pytest.raises(ValueError, match=text):
        log.write(record)


def test_cutting_back_leaves_every_step_once(log):
    fill(log, 1, 2, 3, 4)
    fill(log, 2, 4, split="eval")
    assert log.cut_back(2) == 3
    fill(log, 3, 4)
    fill(log, 4, split="eval")
    assert steps_of(log) == [1, 2, 3, 4]
    assert steps_of(log, "eval") == [2, 4]


def test_cutting_back_to_zero_empties_the_file_of_a_run_that_saved_nothing(log):
    fill(log, 1, 2)
    assert log.cut_back(0) == 2
    assert log.records() == []


def test_nothing_to_cut_leaves_the_file_alone(log):
    assert log.cut_back(3) == 0
    assert not log.path.exists()
    fill(log, 1)
    before = log.path.stat().st_ino
    assert log.cut_back(1) == 0
    assert log.path.stat().st_ino == before


@pytest.mark.parametrize("torn", [b'{"step": 3, "sp', b"\x00" * 50, b'{"step": 3}\n'])
def test_a_torn_end_is_ignored_and_cut(log, torn):
    fill(log, 1, 2)
    log.close()
    with open(log.path, "ab") as file:
        file.write(torn)
    assert steps_of(log) == [1, 2]
    assert log.cut_back(2) == 1
    fill(log, 3)
    assert steps_of(log) == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_refused_by_number(log):
    fill(log, 1)
    log.close()
    with open(log.path, "ab") as file:
        file.write(b"what?\n")
    fill(log, 2)
    with pytest.raises(UserError, match=r"line 2 of .* is not a record.*Remove"):
        log.cut_back(1)


def test_has_looks_for_step_and_split(log):
    fill(log, 2, split="eval")
    assert log.has(2, "eval")
    assert not log.has(2, "train")
    assert not log.has(1, "eval")


def test_comparable_leaves_measured_time_out(log):
    log.write({"step": 1, "split": "train", "loss": 2.0, "time": {"s": 3}})
    expected = [{"step": 1, "split": "train", "loss": 2.0}]
    assert metrics.comparable(log.records()) == expected


def test_best_is_the_lowest_finite_eval_loss(log):
    for step, loss in [(1, 3.0), (2, math.nan), (3, 1.5), (4, 2.0)]:
        log.write({"step": step, "split": "eval", "loss": loss})
    fill(log, 9)
    assert metrics.best(log.records()) == (3, 1.5)
    assert metrics.best([]) is None


def test_a_full_disk_is_one_line():
    with pytest.raises(UserError, match=r"^metrics: .*no space left"):
        fill(MetricsLog("/dev/full"), 1)


def test_a_killed_writer_leaves_whole_lines_only(log):
    program = f"""
from attnjax.training.metrics import MetricsLog
log = MetricsLog({str(log.path)!r})
step = 0
while True:
    step += 1
    log.write({{"step": step, "split": "train", "loss": 1.0, "pad": "x" * 3000}})
    if step == 50: print("ready", flush=True)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    steps = steps_of(log)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 50
