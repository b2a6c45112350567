"""python -m attnjax.plan: a plan on this machine's CPU, and what a mistake is told."""

import json
import re

import pytest

from attnjax import plan
from attnjax.core.errors import UserError
from attnjax.planning import planner, targets, text

SWEEP = """
from attnjax.studies import grid, point, seeds


def sweep():
    base = point({config!r})
    return seeds(grid(base, {{"model.embed_dim": [8, 16]}}), 2)
"""


def test_a_plan_is_written_where_it_was_asked_for(tiny, run_door, tmp_path):
    words = ["--config", tiny, "--target", "cpu:1", "--json", "--decode=false"]
    code, out, err = run_door(plan.main, *words, "--out", tmp_path / "plan.json")
    assert (code, out) == (0, ""), err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["target"] == "cpu:1"
    assert found["train"]["fits"] is True
    assert found["decode"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--target: is required: cpu:N, h100:N"),
        (["--target", "h2OO:8"], "unknown chip 'h2OO'.* Did you mean h200"),
        (["--target", "cpu:1"], "takes one of --config FILE and --sweep FILE"),
        (["--target", "v5e:3x4"], "v5e has no topology '3x4'. Nearest: v5e:4x4"),
        (["--target", "cpu:1", "--config.mesh.fsdp=3"], "3 must divide the 1 devices"),
        (["--target", "cpu:1", "--show", "9"], "--tries and --show belong to --search"),
        (["--target", "cpu:1", "--tries", "0"], "--tries"),
        (["--target", "cpu:1", "--decode_batch", "0"], "--decode_batch: must be at le"),
        (
            ["--target", "cpu:1", "--search", "--decode_batch", "2"],
            "--decode_batch needs a decode step, which --search and --decode=false lea",
        ),
        (["--target", "cpu:1", "--out", "/no/where"], "has no folder '/no'"),
        (["--target", "cpu:1", "--out", "/"], "'/' is a folder"),
        (
            ["--target", "cpu:1", "--sweep", "x.py", "--search"],
            "takes neither --search nor",
        ),
        (["--target", "cpu:1", "--sweep", "x.py"], "--sweep: no file 'x.py'"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, message, tiny, told):
    config = [] if "--sweep" in words or "takes one" in message else ["--config", tiny]
    said = told(plan.main, *config, *words)
    assert re.search(message, said), said


def test_a_target_without_the_extra_says_how_to_install_it(tiny, told):
    if targets.missing_extra("gpu") is None:
        pytest.skip("the extra 'aot' is installed")
    text = told(plan.main, "--config", tiny, "--target", "h200:8")
    assert "--target=h200:8: compiling for gpu needs the extra 'aot'" in text
    assert "pip install -c constraints.txt -e '.[aot]'" in text


@pytest.fixture
def planned(monkeypatch):
    """Configs of the plans that are asked for; nothing is compiled."""
    found = []

    def fake(config, target, **options):
        found.append(config)
        if config["model"]["embed_dim"] == 16:
            raise UserError("config.mesh: sizes must multiply.")
        return config

    monkeypatch.setattr(planner, "plan", fake)
    monkeypatch.setattr(text, "lines", lambda plan: [])
    monkeypatch.setattr(planner, "to_json", lambda plan: {"config": plan})
    return found


def _sweep(tmp_path, tiny, widths="[8, 16]"):
    file = tmp_path / "sweep.py"
    file.write_text(SWEEP.format(config=str(tiny)).replace("[8, 16]", widths))
    return file


def test_points_that_differ_in_the_seed_share_a_plan(planned, tiny, run_door, tmp_path):
    words = ["--sweep", _sweep(tmp_path, tiny, "[8, 24]"), "--target", "cpu:1"]
    code, out, err = run_door(plan.main, *words, "--json")
    assert code == 0, err
    points = json.loads(out)
    assert len(planned) == 2
    assert [p["config"]["model"]["embed_dim"] for p in points] == [8, 8, 24, 24]
    assert [p["config"]["train"]["seed"] for p in points] == [0, 1, 0, 1]
    assert len({p["hash"] for p in points}) == 4


def test_a_point_that_cannot_be_planned_is_named(planned, tiny, run_door, tmp_path):
    words = ["--sweep", _sweep(tmp_path, tiny), "--target", "cpu:1"]
    code, _, said = run_door(plan.main, *words)
    assert code == 2
    assert "error: --sweep: point embed_dim=16 seed=0: config.mesh: sizes must" in said
