"""Evaluations after the training of a point, on a model of a few hundred numbers."""

import json
import math

import pytest

from attnjax.core.errors import UserError
from attnjax.studies import collect, evaluations, ledger, sweep_file, worker
from attnjax.studies.evaluations import Evaluation

BODY = """
SMALL = {{"model.num_layers": 2, "model.mlp_dim": 8, "train.steps": 2,
         "train.batch_size": 8, "eval.batches": 1, "data.name": "text:{text}",
         "data.cache_dir": "{cache}",
         "train.sample_tokens": 0, "train.tensorboard": False}}
ASKED = [{asked}]
def sweep():
    return evaluated([one.having(SMALL) for one in BASE], ASKED)
"""
LONGER = 'Evaluation("longer", {"data.seq_len": 32})'
FIRST = 'Evaluation("first", keep_layers=(0,))'


@pytest.fixture
def study_of(sweep_of, tmp_path):
    """(evaluations as text) -> the written study of one point."""
    (tmp_path / "text.txt").write_text("all the words of a small text. " * 60)

    def make(*asked):
        body = BODY.format(
            text=tmp_path / "text.txt", cache=tmp_path / "cache", asked=", ".join(asked)
        )
        study = sweep_file.load(sweep_of(body), tmp_path / "work")
        study.write()
        return study

    return make


def _rows(study):
    (run,), _ = collect.collect(study.workdir)
    return {row["split"]: row for row in run.rows}, run


def test_what_is_asked_for_later_is_all_that_is_done_then(study_of, capsys):
    study = study_of(LONGER, 'Evaluation("same")')
    point = study.points[0]
    assert worker.work(study.workdir, point.hash) == 0
    rows, run = _rows(study)
    assert run.is_done
    assert rows["longer"]["step"] == 2
    assert math.isfinite(rows["longer"]["loss"])
    assert rows["longer"]["loss"] != rows["eval"]["loss"]
    assert rows["same"]["loss"] == pytest.approx(rows["eval"]["loss"], rel=1e-6)
    capsys.readouterr()

    again = study_of(LONGER, 'Evaluation("same")', FIRST)
    assert again.points[0].hash == point.hash
    state = ledger.settle(again.workdir, point.hash, again.run_directory(point))
    assert (state.state, state.error) == ("pending", "evaluations are missing")
    assert worker.work(again.workdir, point.hash) == 0
    assert capsys.readouterr().out.splitlines() == ["evaluation first"]
    more, run = _rows(again)
    assert more["first"]["loss"] != more["longer"]["loss"]
    assert more["longer"] == rows["longer"]
    assert ledger.is_done(again.run_directory(point))
    assert ledger.read(again.workdir, point.hash).state == "done"

    # One that cannot be done fails the point, by name, and costs no result.
    deep = study_of(FIRST, 'Evaluation("deep", keep_layers=(7,))')
    assert worker.work(deep.workdir, point.hash) == 2
    state = ledger.read(deep.workdir, point.hash)
    assert state.state == "failed"
    assert state.error.startswith("evaluation deep: keep_layers: must name layers")
    assert ledger.is_trained(deep.run_directory(point))
    assert _rows(deep)[0] == more


def test_a_damaged_result_is_named(study_of):
    study = study_of(LONGER)
    run = study.run_directory(study.points[0])
    run.mkdir(parents=True)
    (run / "evaluations.json").write_text(json.dumps({"longer": 3}))
    with pytest.raises(UserError, match=r"evaluations.json' is damaged. Delete it"):
        collect.collect(study.workdir)


def test_a_result_is_of_all_that_was_asked_and_of_the_run(tmp_path):
    """Another name is the same result; anything else is another one."""
    run = tmp_path / "points" / "abc"
    for folder in (run, tmp_path / "configs"):
        folder.mkdir(parents=True)
    asked = dict(judge="def", samples={"per_class": 3}, overrides={"data.seed": 1})
    first = Evaluation("one", **asked)

    def learned(steps):
        config = {"train": {"steps": steps}}
        (run / "config.json").write_text(json.dumps(config))

    def missing(*wanted):
        evaluations.write_wanted(tmp_path, "abc", wanted)
        return [one.name for one in evaluations.missing(run)]

    learned(3)
    assert missing(first) == ["one"] and evaluations.judges(run) == ["def"]
    result = {"asked": evaluations._identity(first.to_json(), run), "row": {}}
    (run / "evaluations.json").write_text(json.dumps({"one": result}))
    assert missing(first) == [] == evaluations.judges(run)
    for change in (
        {"judge": "ghi"},
        {"samples": {"per_class": 4}},
        {"overrides": {"data.seed": 2}},
        {"keep_layers": (0,)},
    ):
        assert missing(Evaluation("one", **asked | change)) == ["one"], change
    assert missing(first, Evaluation("two", **asked)) == ["two"]
    assert missing() == []
    learned(4)
    assert missing(first) == ["one"]


@pytest.mark.parametrize("name", ["eval", "train", "two words", ""])
def test_a_name_is_a_split_of_its_own(name):
    with pytest.raises(UserError, match="the name of an evaluation must be"):
        Evaluation(name)


def test_a_table_shows_only_evaluations_that_points_ask_for(sweep_of, tmp_path):
    body = """
def sweep():
    return evaluated(seeds(BASE, 2), [Evaluation("longer", {"data.seq_len": 32})])
def table():
    return Table(rows=("seed",), seed="x", metrics=("eval/loss", "%s/loss"))
"""
    assert sweep_file.load(sweep_of(body % "longer"), tmp_path).table is not None
    with pytest.raises(UserError, match="got 'longr/loss'. Did you mean longer"):
        sweep_file.load(sweep_of(body % "longr"), tmp_path)


def test_mistakes_are_named_before_anything_runs(study_of):
    with pytest.raises(
        UserError, match=r"evaluation a: config.data: unknown key .seq_lem"
    ):
        study_of('Evaluation("a", {"data.seq_lem": 32})')
    with pytest.raises(UserError, match="different names; got 'a' twice"):
        study_of('Evaluation("a")', 'Evaluation("a")')
