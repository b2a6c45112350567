"""A classifier of the sweep judges the samples of its denoisers."""

import contextlib
import math

import pytest

from attnjax.core.errors import UserError
from attnjax.studies import collect, ledger, sweep_file, worker

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
JUDGE, SAMPLES = {judge}, {samples}
def sweep():
    asked = Evaluation("samples", judge=JUDGE, samples=SAMPLES)
    return concat(
        evaluated(point({judged!r}, {{"train.seed": 9}}, model="dit"), [asked]),
        point("vit.py", model="vit"),
        point("vit.py", {{"train.seed": 1}}, model="other"),
        point("dit.py", {{"train.seed": 1}}, model="more"),
        point("vit.py", {{"data.image_size": 16}}, model="large"),

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

    def make(judge=VIT, samples='{"per_class": 2, "steps": 2}', judged="dit.py"):
        body = SWEEP.format(judge=judge, samples=samples, judged=judged)
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
    study = load()
    study.write()
    dit, vit = study.points[:2]
    trained, evaluated = {study.run_directory(dit)}, []
    monkeypatch.setattr(ledger, "is_trained", lambda run: run in trained)
    monkeypatch.setattr(worker.evaluations, "judges", lambda run: [vit.hash])
    done = lambda run, signals: evaluated.append(run)  # noqa: E731
    monkeypatch.setattr(worker.evaluations, "do_missing", done)
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
        ({"judge": "{}"}, "which 5 points have"),
        ({"judge": '{"model": "more"}'}, "must be a classifier of images; got .*=dit"),
        ({"judge": '{"model": "large"}'}, "data.image_size=16, the samples' is 8"),
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
