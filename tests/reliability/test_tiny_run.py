import json

import numpy as np
import pytest
import tiny_run

from attnjax.training.checkpoints import Checkpointer
from attnjax.training.metrics import MetricsLog

pytestmark = pytest.mark.reliability


def make_run(path, *, value=1.0, loss=2.0, seconds=3.0, meta=None):
    path.mkdir()
    with Checkpointer(path / "checkpoints") as saver:
        saver.save(4, {"params": {"w": np.float32([value, 0.0])}}, meta or {})
        saver.wait()
    with MetricsLog(path / "metrics.jsonl") as log:
        log.write({"step": 4, "split": "train", "loss": loss, "time": {"s": seconds}})
    (path / "summary.json").write_text(json.dumps({"loss": loss, "time": seconds}))
    return path


def test_runs_that_differ_in_time_alone_are_the_same(tmp_path):
    left = make_run(tmp_path / "left")
    assert tiny_run.differences(left, make_run(tmp_path / "right", seconds=9.0)) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"value": np.nextafter(np.float32(1), np.float32(2))}, "array params/w"),
        ({"value": -0.0}, "array params/w"),
        ({"loss": 2.5}, "metrics.jsonl: line 1"),
        ({"meta": {"layout": 1}}, "checkpoint meta"),
    ],
)
def test_one_changed_bit_is_a_difference(tmp_path, change, text):
    left = make_run(tmp_path / "left", value=0.0 if change.get("value") == 0 else 1.0)
    right = make_run(tmp_path / "right", **change)
    assert text in tiny_run.differences(left, right)[0]


def test_another_last_step_is_a_difference(tmp_path):
    left, right = make_run(tmp_path / "left"), make_run(tmp_path / "right")
    with Checkpointer(right / "checkpoints") as saver:
        saver.save(5, {"params": {"w": np.zeros(2)}}, {})
    assert "last checkpoints: [4, 5]" in tiny_run.differences(left, right)
