"""A tiny denoiser of latents through the front doors."""

import json
import types

import numpy as np
import pytest
from PIL import Image

import attnjax
from attnjax import evaluate, generate, train
from attnjax.analysis import sample_quality
from attnjax.core.errors import EXIT_OK, UserError
from attnjax.data import extract_latents
from attnjax.data.images.latent_files import LatentFacts, new_latents
from attnjax.decoding.run import LoadedClassifier
from attnjax.training import experiment, feeds

SIDE, CHANNELS = 4, 5
CONFIG = '''
"""A denoiser of latents, of a few hundred parameters."""


def get_config():
    """The smallest diffusion transformer."""
    model = {"name": "dit", "layers": "attention", "patch_size": 2, "num_layers": 1}
    return {
        "model": {**model, "embed_dim": 8, "num_heads": 2, "time_features": 8},
        "data": {"name": "latents:made", "augment": {"flip": True}},
        "task": {"noise": {"steps": 50}},
        "train": {"steps": 2, "batch_size": 8, "tensorboard": False},
        "eval": {"batches": 1, "draw": {"per_class": 1, "steps": 2}},
    }
'''


def make(path, **options):
    """A folder of random latents."""
    facts = LatentFacts(
        shape=(SIDE, SIDE, CHANNELS),
        class_names=("cat", "dog", "owl"),
        **{"scale": (0.5,), "shift": (0.25,), "has_flips": True, **options},
    )
    rng = np.random.default_rng(0)
    with new_latents(path, facts) as writer:
        for split, count in (("train", 17), ("eval", 11)):
            rows = rng.normal(size=(count, *facts.row_shape))
            writer.add(split, rows, np.arange(count) % 3)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The config, and where its data lies."""
    folder = tmp_path_factory.mktemp("latents")
    make(folder / "made")
    (folder / "tiny.py").write_text(CONFIG)
    return ["--config", folder / "tiny.py", f"--config.data.data_dir={folder}"]


@pytest.fixture(scope="module")
def trained(words, run_door, tmp_path_factory):
    """(a finished run, what was said)."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    code, out, err = run_door(train.main, *words, "--workdir", workdir)
    assert code == EXIT_OK, err
    return workdir, out + err


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


def test_a_run_tells_what_its_pictures_show(trained):
    run, said = trained
    assert "17 latents to train on, 11 held out, 4x4x5, 3 classes" in said
    assert "pictures show channels 1 to 3 from -3 (black) to 3 (white)" in said
    assert json.loads((run / "latents.json").read_text())["shift"] == [0.25]
    loaded = attnjax.load(run)
    assert loaded.model.channels == CHANNELS
    drawn = 2 * np.random.default_rng(1).normal(size=(3, SIDE, SIDE, CHANNELS))
    shown = loaded.pixels(drawn)
    assert shown.shape == (3, SIDE, SIDE, 3)
    wanted = np.clip(127.5 * (1 + drawn[..., :3] / 3), 0, 255)
    np.testing.assert_allclose(shown, wanted, atol=0.51)
    assert loaded.pixels(drawn[..., :2]).shape == (3, SIDE, SIDE, 1)
    # Three columns of 4 x 4, each enlarged eight times.
    picture = Image.open(run / "samples" / "step_2.png")
    assert picture.size == (3 * 34 - 2, 32) and picture.mode == "RGB"


def test_generate_writes_latents_where_no_autoencoder_is_given(
    run, run_door, told, tmp_path
):
    out = tmp_path / "some.npy"
    asked = ["--workdir", run, "--num_steps", "2", "--labels", "owl,cat", "--num", "2"]
    code, said, err = run_door(generate.main, *asked, "--out", out)
    assert code == 0, err
    assert "2 of each of owl, cat, in turn, as latents float32 [4, 4, 4, 5]" in said
    assert "--vae DIR, which decodes latents / (0.5) + (0.25)" in said
    drawn = np.load(out)
    assert drawn.shape == (4, SIDE, SIDE, CHANNELS) and np.isfinite(drawn).all()
    assert "must end in .npy; got" in told(generate.main, *asked, "--out", "x.png")
    missing = [*asked, "--vae", tmp_path, "--out", tmp_path / "x.png"]
    assert "--vae: must be the folder of an AutoencoderKL" in told(
        generate.main, *missing
    )


def test_evaluate_reads_latents_of_the_same_scale_alone(run, run_door, told, tmp_path):
    code, out, err = run_door(evaluate.main, "--workdir", run)
    assert code == 0 and "loss" in out, err
    other = make(tmp_path / "other", scale=(0.25,))
    assert "got latents of scale [0.25] and shift [0.25], the run learned" in told(
        evaluate.main, "--workdir", run, f"--config.data.name=latents:{other}"
    )


def test_a_plan_needs_the_index_alone(tmp_path):
    folder = make(tmp_path / "made")
    (folder / "train.latents.bin").unlink()
    given = {"model": {"name": "dit"}, "data": {"name": f"latents:{folder}"}}
    feed = feeds.make(experiment.resolve(given))
    sizes = {"image_size": SIDE, "channels": CHANNELS, "num_classes": 3}
    assert feed.planned_sizes() == sizes
    with pytest.raises(UserError, match="No such file"):
        feed.sizes()


def test_features_are_asked_for_in_one_way(run, told, tmp_path):
    asked = ["--workdir", run]
    for words, message in (
        (["--features_size", "299"], "--features_size: belongs to --features; got"),
        (["--vae", "x"], "--vae: belongs to --features; got vae=x without it"),
        (["--features", "torchscript:x"], "learned latents; got no --vae"),
        (["--features", "x:y", "--vae", "z"], "must be torchscript:FILE; got 'x:y'"),
        (["--features", "x", "--features_images", "1"], "must be at least 2"),
        (
            ["--features", "x", "--features_images", "9", "--features_reference", "r"],
            "--features_images: counts images of the data",
        ),
    ):
        assert message in told(evaluate.main, *asked, *words)


def test_a_judge_must_have_learned_the_same_latents(run, tmp_path):
    drawn = attnjax.load(run)
    settings = {"data": {"name": "latents:x"}, "model": {"name": "vit"}}
    model = types.SimpleNamespace(image_size=SIDE, channels=CHANNELS)

    def classifier(**facts):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        made = json.loads((run / "latents.json").read_text())
        (folder / "latents.json").write_text(json.dumps(made | facts))
        names = drawn.class_names
        return LoadedClassifier(folder, settings, model, {}, {}, 1, names)

    judge = sample_quality.Judge(classifier(), drawn)
    assert [float(x) for x in sample_quality._normalisation(judge.classifier)] == [0, 1]
    with pytest.raises(UserError, match=r"a classifier of latents \(scale \(0\.1,\)"):
        sample_quality.Judge(classifier(scale=[0.1]), drawn)
    settings["data"] = {"name": "digits"}
    with pytest.raises(UserError, match="a classifier of pixels, the samples are lat"):
        sample_quality.Judge(classifier(), drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.data.name=latents:mode", "must be a folder of latents"),
        ("--config.data.augment.mixup=0.1", "mixed images are no samples"),
        ("--config.data.augment.crop=pad", "crop is done to pixels"),
        ("--config.eval.corruption=blur", "latents have none; got corruption=blur"),
        ("--config.model.patch_size=3", "patch_size=3, image_size=4"),
        ("--config.data.image_size=4", "unknown key 'image_size'"),
    ],
)
def test_a_mistake_is_told_in_one_line(change, message, words, told, tmp_path):
    workdir = tmp_path / "r"
    more = ["--config.eval.severity=1"] if "corruption" in change else []
    assert message in told(train.main, *words, "--workdir", workdir, change, *more)
    assert not (workdir / "config.json").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "the images must be named; got no config.data.name. Add"),
        (["--config.data.name=latents:x"], "encodes pictures; got"),
        (["--config.data.name=digts"], "unknown source 'digts'"),
        (["--config.model.name=dit"], "unknown setting 'config.model.name'"),
        (["--config.data.name=glyphs"], "--num_train: must say how many images"),
        (["--config.data.name=digits", "--num_train", "0"], "must be at least 1"),
        (["--config.data.name=digits", "--batch_size", "0"], "must be at least 1"),
        (["--config.data.name=digits"], "which is no folder. Download it first"),
    ],
)
def test_an_extraction_that_cannot_be_is_told(asked, message, told, tmp_path):
    out = tmp_path / "out"
    words = ["--vae", tmp_path / "none", "--out", out, *asked]
    assert message in told(extract_latents.main, *words)
    assert not out.exists()


def test_missing_packages_and_other_autoencoders_are_named(told, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    asked = ["--vae", tmp_path, "--config.data.name=digits"]
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json must be JSON"),
        ('{"_class_name": "VQModel"}', "must be an AutoencoderKL; got VQModel"),
        ('{"_class_name": "AutoencoderKL"}', "pip install 'attnjax[vae]'"),
    ):
        config.write_text(text)
        out = ["--out", tmp_path / "out"]
        assert message in told(extract_latents.main, *asked, *out)
    assert "--out: must not be there yet" in told(
        extract_latents.main, *asked, "--out", tmp_path
    )


def test_a_run_on_pixels_has_nothing_to_decode(run, tmp_path, monkeypatch):
    loaded = attnjax.load(run)
    monkeypatch.setitem(loaded.__dict__, "latents", None)
    with pytest.raises(UserError, match="--vae: decodes latents, and .* learned pix"):
        loaded.require_latents("--vae")
