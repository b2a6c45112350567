import math
import sys
import types

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.training import trackers

RECORD = {
    "step": 3,
    "split": "train",
    "loss": np.float32(0.5),
    "bad": "NaN",
    "low": "-Infinity",
    "name": "x",
    "flag": True,
    "per_head": [1, 2],
    "time": {"step_ms": 4.0},
}


def test_scalars_are_tagged_by_split():
    found = trackers.scalars(RECORD)
    assert math.isnan(found.pop("train/bad"))
    assert found == {
        "train/loss": 0.5,
        "train/low": -math.inf,
        "train/time/step_ms": 4.0,
    }


def read_events(folder):
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted(folder.glob("events.*")):
        raw = path.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            events.append(event_pb2.Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
    return events


def test_tensorboard_events_hold_every_number(tmp_path):
    (board,) = trackers.make("tensorboard", tmp_path, config={}, run_id="r")
    board.log(RECORD)
    board.log({"step": 4, "split": "eval", "loss": 0.25})
    board.finish()
    values = {
        (event.step, value.tag): value.simple_value
        for event in read_events(tmp_path)
        for value in event.summary.value
    }
    assert values[3, "train/loss"] == 0.5
    assert values[3, "train/time/step_ms"] == 4.0
    assert values[4, "eval/loss"] == 0.25


def test_a_resume_hides_events_of_later_steps(tmp_path):
    board = trackers.TensorBoard(tmp_path, purge_step=3)
    board.finish()
    starts = [e for e in read_events(tmp_path) if e.session_log.status == 1]
    assert [event.step for event in starts] == [4]


def test_none_is_no_tracker():
    assert trackers.make("none", ".", config={}, run_id="r") == []


def test_an_unknown_tracker_lists_the_known(tmp_path):
    with pytest.raises(UserError, match=r"unknown tracker 'wanbd'. Did you mean wandb"):
        trackers.make("wanbd", tmp_path, config={}, run_id="r")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'attnjax\[wandb\]'"):
        trackers.make("wandb", tmp_path, config={}, run_id="r")


def test_weights_and_biases_continues_one_run_on_our_step_axis(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    def init(**options):
        calls.append(("init", (), options))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (tracker,) = trackers.make("wandb", tmp_path / "a", config={"b": 1}, run_id="r1")
    tracker.log({"step": 5, "split": "train", "loss": 0.5})
    tracker.finish()
    options = calls[0][2]
    assert (options["id"], options["resume"], options["name"]) == ("r1", "allow", "a")
    assert options["config"] == {"b": 1}
    assert ("define_metric", ("*",), {"step_metric": "step"}) in calls
    assert ("log", ({"train/loss": 0.5, "step": 5},), {}) in calls
    assert calls[-1][0] == "finish"
