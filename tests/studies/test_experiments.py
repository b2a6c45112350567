"""The committed studies: their sweeps hold, and compare equals with equals."""

import collections
from pathlib import Path

import pytest

from attnjax.core import mappings
from attnjax.studies import sweep_file

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "experiments").glob("*/sweep.py"))
# What a run of one seed may differ in from its baseline: the model alone.
SHARED = ("data", "optim", "train", "task")


@pytest.fixture(scope="module", params=SWEEPS, ids=lambda path: path.parent.name)
def study(request, tmp_path_factory):
    return sweep_file.load(request.param, tmp_path_factory.mktemp("work"))


def _shown(study):
    """The points that are in a row of the table."""
    return [point for point in study.points if study.table.has(point.labels)]


def test_every_row_has_the_same_seeds(study):
    rows = collections.defaultdict(set)
    for point in _shown(study):
        key = mappings.canonical(
            {name: point.labels[name] for name in study.table.rows}
        )
        rows[key].add(point.config["train"]["seed"])
    seeds = list(rows.values())
    assert len(seeds[0]) >= 3
    assert all(one == seeds[0] for one in seeds)


def test_rows_differ_in_the_model_alone(study):
    firsts = {}
    for point in _shown(study):
        column = tuple(point.labels[name] for name in study.table.columns)
        first = firsts.setdefault(column, point.config)
        for group in SHARED:
            have, want = dict(point.config[group]), dict(first[group])
            have.pop("seed", None), want.pop("seed", None)
            assert have == want, point.name


def test_the_baseline_is_a_row_and_evaluations_are_those_of_the_table(study):
    table = study.table
    assert any(
        all(point.labels[name] == value for name, value in table.baseline.items())
        for point in study.points
    )
    asked = {one.name for point in study.points for one in point.evaluations}
    shown = {metric.partition("/")[0] for metric in table.metrics} - {"eval", "train"}
    assert asked == shown


def test_a_readme_tells_the_question_and_the_command(study):
    text = (study.file.parent / "README.md").read_text()
    name = study.file.parent.name
    assert f"--sweep experiments/{name}/sweep.py" in text
    assert "**Question.**" in text
    assert "**Protocol.**" in text
