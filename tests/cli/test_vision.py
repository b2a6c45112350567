"""A tiny classifier of images through the front doors, as a user goes through them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import attnjax
from attnjax import convert, evaluate, generate, plan, report, train
from attnjax.core import config as configs
from attnjax.core.errors import EXIT_OK, UserError
from attnjax.studies import collect, groups, sweep_file
from attnjax.training import experiment, loop, metrics
from attnjax.training import run as training_run

pytestmark = pytest.mark.usefixtures("shared_programs")

CONFIG = '''
"""A model of a few hundred parameters."""


def get_config():
    """The smallest run on images."""
    return {
        "model": {
            "name": "vit",
            "layers": "gated_attention",
            "params": "match",
            "patch_size": 4,
            "num_layers": 1,
            "embed_dim": 8,
            "num_heads": 2,
            "mlp_dim": 16,
            "dropout": 0.1,
        },
        "data": {"name": "digits", "augment": {"mixup": 0.2, "flip": True}},
        "task": {"label_smoothing": 0.1},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
        "train": {
            "steps": 4,
            "batch_size": 16,
            "log_every": 1,
            "save_every": 2,
            "tensorboard": False,
        },
        "eval": {"every": 2, "batch_size": 64, "batches": 2},
        "mesh": {"data": 8},
    }
'''
SWEEP = """
from attnjax.studies import Evaluation, evaluated, point, seeds

BLUR = {{"eval.corruption": "blur", "eval.severity": 3}}


def sweep():
    both = seeds(point({config!r}, row="gated"), 2, vectorize=True)
    return evaluated(both, [Evaluation("blurred", BLUR)])
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of the config."""
    path = tmp_path_factory.mktemp("vision") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def trained(file, run_door, tmp_path_factory):
    """(a finished run, what was said)."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    code, out, err = run_door(train.main, "--config", file, "--workdir", workdir)
    assert code == EXIT_OK, err
    return workdir, out


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained[0]


def rows(workdir, split=None):
    found = metrics.comparable(metrics.read(workdir / "metrics.jsonl"))
    return [row for row in found if split in (None, row["split"])]


def test_a_run_counts_images(trained):
    run, out = trained
    assert "digits: 1438 images to train on, 359 held out, 8x8x1, 10 classes" in out
    assert "images/s" in out and "held-out loss, nats per image" in out
    assert "uniform guess     2.3026" in out
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "manifest.json", "classes.json"} <= names
    assert "tokenizer.json" not in names
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images_seen"] == 4 * 16
    assert {"loss", "accuracy", "top5"} == set(summary["final"])
    assert f"accuracy          {summary['final']['accuracy']:.4f}" in out
    assert summary["time"]["images_per_second"] > 0
    assert summary["matched"]["baseline"] == "attention"
    model = attnjax.load(run).model
    assert summary["forward_flops_per_image"] == model.flops()
    assert not any("token" in name for name in summary)
    assert [row["step"] for row in rows(run, "eval")] == [2, 4]
    assert {"loss", "grad_norm"} <= set(rows(run, "train")[0])


class Killed(Exception):
    """The end of the process, as far as the run can tell."""


class KillAt(loop.Hook):
    def __init__(self, step):
        self.step = step

    def on_step(self, step, metrics):
        if step == self.step:
            raise Killed


def test_a_killed_run_goes_on_bit_for_bit(run, file, tmp_path):
    config = experiment.resolve(configs.load_file(str(file)))
    with pytest.raises(Killed):
        training_run.train(config, tmp_path / "r", hooks=(KillAt(3),))
    assert rows(tmp_path / "r")[-1]["step"] < 3
    assert training_run.train(config, tmp_path / "r") == EXIT_OK
    assert rows(tmp_path / "r") == rows(run)


def test_seeds_of_a_sweep_share_a_program_and_are_evaluated_on_shifted_images(
    run, file, run_door, tmp_path
):
    sweep = file.with_name("sweep.py")
    sweep.write_text(SWEEP.format(config=str(file)))
    study = sweep_file.load(sweep, tmp_path / "work")
    study.write()
    assert groups.work(study.workdir, study.points[0].hash, vectorize=True) == EXIT_OK
    first, second = (study.run_directory(point) for point in study.points)
    for ours, theirs in zip(rows(first), rows(run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert rows(second, "train") != rows(run, "train")
    found, _ = collect.collect(study.workdir)
    assert [one.is_done for one in found] == [True, True]
    blurred = next(row for row in found[0].rows if row["split"] == "blurred")
    assert {"loss", "accuracy", "top5", "step"} == set(blurred) - {"split"}
    code, out, err = run_door(report.main, study.workdir)
    assert code == 0, err
    assert "FLOPs/image" in out and "images/s" in out and "token" not in out


def measured(run_door, run, out, *words):
    code, _, err = run_door(evaluate.main, "--workdir", run, "--out", out, *words)
    assert code == 0, err
    return json.loads(out.read_text())


def test_evaluate_repeats_the_last_evaluation(run, run_door, tmp_path):
    found = measured(run_door, run, tmp_path / "m.json")
    last = rows(run, "eval")[-1]
    assert found["accuracy"] == last["accuracy"]
    assert found["loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert (found["data"], found["image_size"]) == ("digits", 8)


def test_evaluate_at_another_size_needs_resampled_positions(
    run, run_door, told, tmp_path
):
    size = "--config.data.image_size=12"
    words = told(evaluate.main, "--workdir", run, size, lines=None)
    assert "the run's model does not fit this data; got image_size=12" in words
    assert "position_embedding" in words and "config.model.positions_grid=2" in words
    grid = "--config.model.positions_grid=2"
    shift = ["--config.eval.corruption=contrast", "--config.eval.severity=5"]
    found = measured(run_door, run, tmp_path / "m.json", size, grid, *shift)
    assert (found["image_size"], found["corruption"]) == (12, "contrast")
    assert np.isfinite(found["loss"])


def test_evaluate_compares_names_under_shifts(run, run_door, told, tmp_path):
    few = ["--config.eval.batches=1", "--config.eval.batch_size=16"]
    words = ["--shifts=all", "--within=1", *few]
    found = measured(run_door, run, tmp_path / "m.json", *words)
    assert found["shifts"] == 63 and found["logit_change"] > 0
    assert found["unchanged"] <= found["consistency"] <= 1
    assert found["worst_accuracy"] <= found["accuracy"]
    words = told(evaluate.main, "--workdir", run, "--within=1")
    assert "--within: belongs to --shifts" in words


def test_evaluate_on_other_classes_is_refused(run, told):
    other = ["--config.data.name=glyphs", "--config.data.chars=abc"]
    words = told(evaluate.main, "--workdir", run, *other)
    assert "the classes of glyphs must be those of the run; got 3 (a, b, c)" in words


def test_a_loaded_run_names_images(run):
    loaded = attnjax.load(run)
    images = np.zeros((3, 8, 8, 1), np.float32)
    assert loaded.logits(images).shape == (3, 10)
    named = loaded.name(images)
    assert len(set(named)) == 1 and named[0] in loaded.class_names
    with pytest.raises(UserError, match=r"= \(8, 8, 1\); got"):
        loaded.logits(images[:, :4])


def test_what_needs_a_language_model_is_refused_in_one_line(run, told, tmp_path):
    words = told(generate.main, "--workdir", run)
    assert "attnjax.generate: needs a language model" in words
    export = ["--workdir", run, "--to", "hf", "--out", tmp_path / "out"]
    assert "needs a language model" in told(convert.main, *export)


def test_a_plan_counts_images(file, run_door, tmp_path):
    words = ["--config", file, "--target", "cpu:1", "--config.mesh.data=1"]
    code, out, err = run_door(plan.main, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["images_per_step"], found["train"]["fits"]) == (16, True)
    assert found["decode"] is None and "no decode step" in found["decode_note"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.data.image_size=10"], "patch_size: must divide .*image_size; got"),
        (["--config.data.name=digitz"], "unknown source 'digitz'.*digits"),
        (["--config.data.channels=2"], r"channels must be 1 \(grey\) or 3"),
        (["--config.model.layers=streaming_llm"], "an image model is bidirectional"),
        (["--config.mesh.sequence=8", "--config.mesh.data=1"], "stay on one device"),
        (["--config.train.sample_tokens=9"], "text is sampled from language models"),
        (["--config.eval.corruption=fog"], "unknown corruption 'fog'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_one_line(words, message, file, told, tmp_path):
    workdir = tmp_path / "r"
    found = told(train.main, "--config", file, "--workdir", workdir, *words)
    assert re.search(message, found), found
    assert not (workdir / "config.json").exists()


def test_a_run_of_another_kind_is_no_start(run, file, told, tmp_path):
    other = tmp_path / "lm"
    other.mkdir()
    (other / "config.json").write_text('{"model": {"name": "lm"}}')
    words = [f"--config.train.init_from={other}", "--workdir", tmp_path / "r"]
    found = told(train.main, "--config", file, *words)
    assert "must be a run of the same kind of model" in found
