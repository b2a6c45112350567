"""A tiny denoiser of images through the front doors, as a user goes through them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import attnjax
from attnjax import evaluate, generate, plan, train
from attnjax.core.errors import EXIT_OK, UserError
from attnjax.decoding import pictures
from attnjax.training import metrics

CONFIG = '''
"""A denoiser of a few hundred parameters."""


def get_config():
    """The smallest diffusion transformer."""
    return {
        "model": {
            "name": "dit",
            "layers": "attention",
            "patch_size": 4,
            "num_layers": 1,
            "embed_dim": 8,
            "num_heads": 2,
            "mlp_dim": 8,
            "time_features": 8,
        },
        "data": {"name": "digits"},
        "task": {"levels": 2, "noise": {"steps": 50}},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
        "train": {
            "steps": 4,
            "batch_size": 16,
            "log_every": 1,
            "save_every": 2,
            "tensorboard": False,
        },
        "eval": {
            "every": 2,
            "batch_size": 64,
            "batches": 2,
            "draw": {"per_class": 2, "classes": 4, "steps": 3, "guidance": 2.0},
        },
        "mesh": {"data": 8},
    }
'''


CLASSIFIER = '''
"""A classifier of a few hundred parameters."""


def get_config():
    """The smallest run on images."""
    model = {"name": "vit", "layers": "attention", "patch_size": 4, "num_layers": 1}
    return {
        "model": {**model, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8},
        "data": {"name": "digits"},
        "train": {"steps": 1, "batch_size": 8, "tensorboard": False},
        "eval": {"batches": 1},
        "mesh": {"data": 8},
    }
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of the config."""
    path = tmp_path_factory.mktemp("denoiser") / "tiny.py"
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
def run(trained):
    return trained[0]


def rows(workdir):
    return metrics.comparable(metrics.read(workdir / "metrics.jsonl"))


def test_a_run_tells_its_losses_and_draws_a_class_a_column(trained):
    run, out = trained
    assert "held-out loss, mean squared error + bits\n" in out
    summary = json.loads((run / "summary.json").read_text())
    parts = {"loss", "mse", "vlb", "loss_level1", "loss_level2"}
    assert set(summary["final"]) == parts
    # Four columns and two rows of 8 x 8 images, each enlarged four times.
    for step in (2, 4):
        picture = Image.open(run / "samples" / f"step_{step}.png")
        assert picture.size == (4 * 34 - 2, 2 * 34 - 2)
    assert f"samples           {run / 'samples' / 'step_4.png'}" in out


def test_evaluate_repeats_the_last_evaluation(run, run_door, tmp_path):
    out = tmp_path / "m.json"
    code, _, err = run_door(evaluate.main, "--workdir", run, "--out", out)
    assert code == 0, err
    last = [row for row in rows(run) if row["split"] == "eval"][-1]
    found = json.loads(out.read_text())
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_generate_draws_the_classes_that_are_asked_for(run, run_door, told, tmp_path):
    out = tmp_path / "some.png"
    words = ["--workdir", run, "--out", out, "--num_steps", "3", "--num", "2"]
    code, said, err = run_door(generate.main, *words, "--labels", "7,1,3")
    assert code == 0, err
    assert f"wrote {out}: 2 of each of 7, 1, 3; 3 predictions" in said
    assert Image.open(out).size == (3 * 34 - 2, 2 * 34 - 2)
    other = ["--workdir", run, "--labels", "1"]
    assert "must end in .png or" in told(generate.main, *other, "--out", "x.xyz")
    assert "got the folder" in told(generate.main, *other, "--out", tmp_path)
    assert "rescale does nothing without guidance" in told(
        generate.main, *words, "--rescale", "0.5"
    )
    assert "unknown class 'x'" in told(generate.main, *words, "--labels", "x")
    assert "--prompt: does nothing for a denoiser" in told(
        generate.main, *words, "--prompt", "a"
    )
    assert "euler" in told(generate.main, *words, "--sampler", "euler")
    perturbed = [*words, "--perturb_heads", "0:0,1"]
    assert "perturb_heads does nothing without perturb_scale" in told(
        generate.main, *perturbed
    )
    assert "layers must be in 0..0; got layer 2" in told(
        generate.main, *words, "--perturb_scale", "1", "--perturb_heads", "2:all"
    )
    code, said, err = run_door(
        generate.main,
        *perturbed,
        "--perturb_scale",
        "2",
        "--perturb_interval",
        "0,.8",
    )
    assert code == 0 and "wrote" in said, err


def test_a_loaded_run_draws(run):
    loaded = attnjax.load(run)
    assert loaded.labels(["3", 7]).tolist() == [3, 7]
    images = loaded.draw(["3", 3], steps=2, seed=1)
    assert images.shape == (2, 8, 8, 1)
    assert loaded.pixels(images).dtype == np.uint8
    with pytest.raises(UserError, match="draw: steps must be at least 1; got 0"):
        loaded.draw([1], steps=0)
    with pytest.raises(UserError, match="unknown setting 'step'. Did you mean steps"):
        loaded.draw([1], step=3)


@pytest.fixture(scope="module")
def judge(file, run_door, tmp_path_factory):
    """A classifier of the same images."""
    workdir = tmp_path_factory.mktemp("judge") / "vit"
    source = file.with_name("vit.py")
    source.write_text(CLASSIFIER)
    code, _, err = run_door(train.main, "--config", source, "--workdir", workdir)
    assert code == 0, err
    return workdir


def test_a_classifier_judges_samples(run, judge, run_door, told, tmp_path):
    out = tmp_path / "m.json"
    words = ["--workdir", run, "--out", out, "--judge", judge]
    few = ["--per_class", "3", "--num_steps", "2", "--guidance", "1.5"]
    few += ["--perturb_scale", "1", "--perturb", "uniform", "--rescale", "0.5"]
    code, _, err = run_door(evaluate.main, *words, *few)
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["samples"] == 30 and 0 <= found["named"] <= 1
    assert found["frechet"] > found["frechet_held_out"] > 0
    assert "must be a run of a classifier" in told(
        evaluate.main, "--workdir", run, "--judge", run
    )
    assert "looks at the samples of a denoiser" in told(
        evaluate.main, "--workdir", judge, "--judge", judge
    )
    asked = ["--workdir", run, "--judge", judge]
    assert "kind gaussian" in told(evaluate.main, *asked, "--sampler", "heun")
    size = "--config.data.image_size=16"
    assert "the samples have 8" in told(evaluate.main, *asked, size)
    assert "--judge: '/nowhere' is not a run" in told(
        evaluate.main, "--workdir", run, "--judge", "/nowhere"
    )
    target = "--config.task.noise.target=x0"
    assert "must be what the run learned" in told(
        evaluate.main, "--workdir", run, target, lines=None
    )
    assert "--guidance: belongs to the samples" in told(
        evaluate.main, "--workdir", run, "--guidance", "2"
    )


def test_the_picture_is_what_the_loaded_run_draws(run):
    loaded = attnjax.load(run)  # the averaged parameters
    made = loaded.draw([0, 1, 2, 3] * 2, steps=3, guidance=2.0)
    wanted = pictures.sheet(loaded.pixels(made), columns=4)
    found = np.asarray(Image.open(run / "samples" / "step_4.png"))
    # Eight devices round otherwise than one.
    np.testing.assert_allclose(found, wanted.astype(int), atol=1)


def test_a_plan_counts_images(file, run_door):
    words = ["--config", file, "--target", "cpu:1", "--config.mesh.data=1"]
    code, out, err = run_door(plan.main, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["images_per_step"], found["train"]["fits"]) == (16, True)
    assert "no decode step" in found["decode_note"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.task.noise.process=flw"], "flw"),
        (["--config.task.noise.path=vp"], "path is of the other process"),
        (["--config.model.label_dropout=0"], "got guidance=2, .*label_dropout=0"),
        (["--config.data.augment.mixup=0.1"], "mixed images are no samples"),
        (["--config.eval.draw.perturb_heads=0:1"], "nothing without perturb_scale"),
        (
            [
                "--config.eval.draw.perturb_scale=2",
                "--config.eval.draw.perturb_heads=1:0",
            ],
            "perturb: layers must be in 0..0; got layer 1",
        ),
        (["--config.model.layers=streaming_llm"], "an image model is bidirectional"),
        (["--config.eval.explain=3"], "those of texts; got explain=3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_one_line(words, message, file, told, tmp_path):
    workdir = tmp_path / "r"
    found = told(train.main, "--config", file, "--workdir", workdir, *words)
    assert re.search(message, found), found
    assert not (workdir / "config.json").exists()
