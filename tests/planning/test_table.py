"""The committed table of plans: made from its json, and no number out of place."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from attnjax.planning.chips import CHIPS

FOLDER = Path(__file__).parents[2] / "docs" / "planning"
ROWS = json.loads((FOLDER / "table.json").read_text())
COMPILED = {key: row for key, row in ROWS.items() if "train" in row}
SIZES = {
    "gpt2_124m": 124_439_808,
    "gpt2_1.5b": 1_557_611_200,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
}


def _script():
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_json():
    assert (FOLDER / "table.md").read_text() == _script().markdown(ROWS)


def test_every_model_has_a_row_on_every_target():
    script = _script()
    wanted = {f"{m} on {t}" for m in script.MODELS for t in script.TARGETS}
    assert set(ROWS) <= wanted
    lines = (FOLDER / "table.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(wanted)


@pytest.mark.parametrize("key", COMPILED)
def test_numbers_agree_with_one_another(key):
    row = COMPILED[key]
    train, mesh = row["train"], row["mesh"]
    memory, chip = train["bytes_per_device"], CHIPS[row["target"].split(":")[0]]
    assert row["parameters"] == SIZES[row["model"]]
    assert math.prod(mesh.values()) == row["devices"]
    assert memory["usable"] == chip.usable
    # Norms, biases and what an axis does not divide are on every device.
    share = 4 * row["parameters"] / (mesh["fsdp"] * mesh["tensor"])
    assert share <= memory["parameters"] <= 1.3 * share
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert train["fits"] == (memory["total"] <= memory["usable"])
    assert memory["total"] >= memory["parameters"] + memory["optimizer"]


@pytest.mark.parametrize("key", COMPILED)
def test_work_and_bounds_are_those_of_such_a_model(key):
    row = COMPILED[key]
    train, guess = row["train"], row["train"]["estimate"]
    if not train["flops"]:
        pytest.skip("XLA refused it for its memory: there is no module to count")
    step = 6.0 * row["parameters"] * row["tokens_per_step"]
    assert 0.8 <= train["flops"] * row["devices"] / step <= 2.5
    assert 0 < guess["mfu"] <= 1
    bounds = [guess[name] for name in ("compute", "memory", "network")]
    assert guess["step"] >= 0.99 * max(bounds)
    assert {c["kind"] for c in train["collectives"]} & {"all-reduce", "reduce-scatter"}
