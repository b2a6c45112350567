"""A classifier of the sweep judges the samples of its denoisers."""

import contextlib
import math
import types

import pytest

from attnjax.analysis import sample_quality
from attnjax.core.errors import UserError
from attnjax.decoding import run as runs
from attnjax.studies import collect, evaluations, ledger, sweep_file, worker
from attnjax.studies.evaluations import Evaluation

IMAGES = '''
def get_config():
    """The smallest {name} of digits."""
    return {{
        "model": {{"name": "{name}", "layers": "attention", "patch_size": 4,
                  "num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8}},
        "data": {{"name": "digits"}},
        "train": {{"steps": 2, "batch_size": 8, "tensorboard": False}},
        "eval": {{"batches": 1, "batch_size": 8}},
    }}
'''
SWEEP = """
JUDGE, SAMPLES, MORE = {judge}, {samples}, {more}
def sweep():
    asked = Evaluation("samples", judge=JUDGE, samples=SAMPLES)
    return concat(
        evaluated(point({judged!r}, {{"train.seed": 9}}, model="dit"), [asked, *MORE]),
        point("vit.py", model="vit"),
        point("vit.py", {{"train.seed": 1}}, model="other"),
        point("dit.py", {{"train.seed": 1}}, model="more"),
        point("vit.py", {{"data.image_size": 16}}, model="large"),
        point("vit.py", {{"data.name": "glyphs"}}, model="letters"),
    )
def table():
    return Table(rows=("seed",), columns=("model",), seed="x",
                 metrics=("eval/accuracy", "samples/named"))
"""
VIT = '{"model": "vit"}'


@pytest.fixture
def load(sweep_of, tmp_path):
    for name in ("vit", "dit"):
        source = IMAGES.format(name=name)
        if name == "dit":
            source = source.replace(
                '"batches": 1,', '"batches": 1, "draw": {"per_class": 0},'
            )
        (tmp_path / f"{name}.py").write_text(source)

    def make(
        judge=VIT, samples='{"per_class": 2, "steps": 2}', judged="dit.py", more=()
    ):
        body = SWEEP.format(judge=judge, samples=samples, judged=judged, more=more)
        body = body.replace("def table", "def _table")
        return sweep_file.load(sweep_of(body), tmp_path / "work")

    return make


def test_the_judge_is_trained_first_whoever_runs_the_denoiser(load, capsys):
    study = load()
    study.write()
    dit, vit = study.points[:2]
    assert dit.evaluations[0].judge == vit.hash
    assert worker.work(study.workdir, dit.hash) == 0
    assert ledger.is_done(study.run_directory(vit))
    assert ledger.read(study.workdir, vit.hash).state == "done"
    runs, _ = collect.collect(study.workdir)
    (row,) = [r for r in runs[0].rows if r["split"] == "samples"]
    assert row["samples"] == 20 and 0 <= row["named"] <= 1
    assert row["frechet"] > 0 and math.isfinite(row["loss"])
    capsys.readouterr()
    assert worker.work(study.workdir, vit.hash) == 0
    assert "is done" in capsys.readouterr().out


def test_evaluations_without_a_judge_stay_beside_those_with_one(load):
    study = load(more='[Evaluation("same")]')
    asked = study.points[0].evaluations
    assert [one.name for one in asked] == ["samples", "same"]
    assert [one.judge for one in asked] == [study.points[1].hash, None]


def trained_but_the_judge(load, monkeypatch):
    """(a study, directories that count as trained, those that were evaluated)."""
    study = load()
    study.write()
    dit, vit = study.points[:2]
    trained, evaluated = {study.run_directory(dit)}, []
    monkeypatch.setattr(ledger, "is_trained", lambda run: run in trained)
    monkeypatch.setattr(worker.evaluations, "judges", lambda run: [vit.hash])
    done = lambda run, signals: evaluated.append(run)  # noqa: E731
    monkeypatch.setattr(worker.evaluations, "do_missing", done)
    return study, trained, evaluated


def test_a_signal_in_the_judges_training_is_the_end_of_the_point(load, monkeypatch):
    study, _, evaluated = trained_but_the_judge(load, monkeypatch)
    dit = study.points[0]
    monkeypatch.setattr(worker, "_work", lambda *_: 75)
    signals = types.SimpleNamespace(requested="SIGTERM")
    assert worker.evaluate(study.run_directory(dit), signals) == 75
    assert evaluated == []


def test_samples_are_drawn_as_they_are_asked_for(monkeypatch, tmp_path):
    loaded, found = [], {}

    def load_run(path, *, owner):
        loaded.append((path, owner))
        return "judge"

    def judged(denoiser, judge, **settings):
        found.update(settings, runs=(denoiser, judge))
        return {"named": 1.0}

    monkeypatch.setattr(runs, "load_run", load_run)
    monkeypatch.setattr(runs, "require_denoiser", lambda run: run)
    monkeypatch.setattr(sample_quality, "judged", judged)
    asked = Evaluation("samples", judge="abc", samples={"steps": 7, "guidance": 2.0})
    evaluations._judged(tmp_path / "own", "denoiser", asked)
    assert loaded == [(tmp_path / "abc", "judge")]
    assert found == {
        "per_class": 100,
        "steps": 7,
        "guidance": 2.0,
        "runs": ("denoiser", "judge"),
    }


def test_a_judge_that_fails_is_named(load, monkeypatch):
    study = load()
    study.write()
    dit, vit = study.points[:2]
    trained = {study.run_directory(dit)}
    monkeypatch.setattr(ledger, "is_trained", lambda run: run in trained)
    monkeypatch.setattr(ledger, "is_done", lambda run: False)
    monkeypatch.setattr(worker.evaluations, "judges", lambda run: [vit.hash])

    def train(workdir, point_hash, signals):
        if point_hash == vit.hash:
            raise UserError("the data is gone")
        return worker.evaluate(study.run_directory(dit), signals)

    monkeypatch.setattr(worker, "_train", train)
    assert worker.work(study.workdir, dit.hash) == 2
    told = f"judge {vit.hash}: could not be trained (the data is gone)"
    assert ledger.read(study.workdir, dit.hash).error.startswith(told)
    assert ledger.read(study.workdir, vit.hash).error == "the data is gone"


def test_a_judge_that_others_train_is_awaited(load, monkeypatch):
    study, trained, evaluated = trained_but_the_judge(load, monkeypatch)
    dit, vit = study.points[:2]
    waits = iter([lambda: None, lambda: trained.add(study.run_directory(vit))])
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: next(waits)())

    class Signals:
        requested = None

        def interrupting(self):
            return contextlib.nullcontext()

    def busy(workdir, point_hash, signals):
        raise ledger.Busy

    monkeypatch.setattr(worker, "_work", busy)
    assert worker.evaluate(study.run_directory(dit), Signals()) == 0
    assert evaluated == [study.run_directory(dit)] and next(waits, None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"judge": '{"model": "vitt"}'},
            "labels of one point; got model=vitt, which 0",
        ),
        ({"judge": "{}"}, "which 6 points have"),
        ({"judge": '{"model": "more"}'}, "must be a classifier of images; got .*=dit"),
        ({"judge": '{"model": "large"}'}, "data.image_size=16, the samples' is 8"),
        ({"judge": '{"model": "letters"}'}, "data.name=glyphs, the samples' is digits"),
        ({"judged": "vit.py"}, "looks at the samples of a denoiser; got .*=vit"),
        ({"samples": '{"per_class": 1}'}, "per_class must be at least 2; got 1"),
        ({"samples": '{"step": 3}'}, "unknown setting 'step'. Did you mean steps"),
        ({"samples": '{"steps": 1}'}, "ddim: num_steps must be at least 2"),
        ({"samples": '{"steps": 0}'}, "steps must be at least 1; got 0"),
        ({"judge": "None"}, "drawn for a judge; got samples="),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_runs(change, message, load):
    with pytest.raises(UserError, match=message):
        load(**change)
