"""A tiny denoiser that reads captions through the front doors, as a user goes."""

import re

import numpy as np
import pytest
from PIL import Image

import attnjax
from attnjax import generate, train
from attnjax.core.errors import EXIT_OK, UserError
from attnjax.decoding.run import LoadedCaptioned

CONFIG = '''
"""A denoiser of a few thousand parameters that reads captions."""


def get_config():
    """The smallest multimodal diffusion transformer."""
    return {
        "model": {
            "name": "mmdit",
            "patch_size": 4,
            "num_layers": 1,
            "remat": "none",
            "embed_dim": 8,
            "num_heads": 2,
            "mlp_dim": 8,
            "time_features": 8,
            "text": {"num_layers": 1, "embed_dim": 4, "num_heads": 2, "max_len": 10},
        },
        "data": {"name": "digits"},
        "task": {"levels": 1, "noise": {"process": "flow"}},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 1, "ema_decay": 0.9},
        "train": {"steps": 2, "batch_size": 8, "log_every": 1, "tensorboard": False},
        "eval": {
            "batches": 1,
            "draw": {
                "per_class": 1,
                "classes": 3,
                "steps": 1,
                "sampler": "euler",
                "guidance": 2.0,
            },
        },
        "mesh": {"data": 8},
    }
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of the config."""
    path = tmp_path_factory.mktemp("captioned") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(file, run_door, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    code, _, err = run_door(train.main, "--config", file, "--workdir", workdir)
    assert code == EXIT_OK, err
    return workdir


def test_generate_draws_a_caption(run, run_door, told, tmp_path):
    out = tmp_path / "some.png"
    words = ["--workdir", run, "--out", out, "--num_steps", "1", "--num", "2"]
    words += ["--sampler", "euler"]
    code, said, err = run_door(generate.main, *words, "--prompt", "a seven")
    assert code == 0, err
    assert f"wrote {out}: 2 of each of a seven" in said
    assert Image.open(out).size == (34 - 2, 2 * 34 - 2)
    assert "is drawn alone; got --labels too" in told(
        generate.main, *words, "--prompt", "a seven", "--labels", "7"
    )
    assert "prompt: a caption has at most 9 bytes" in told(
        generate.main, *words, "--prompt", "seventeen!"
    )
    assert "--temperature: does nothing for a denoiser" in told(
        generate.main, *words, "--temperature", "1"
    )


def test_a_loaded_run_draws_captions_as_its_picture_shows_them(run):
    """On one device, of what eight trained."""
    loaded = attnjax.load(run)
    assert isinstance(loaded, LoadedCaptioned)
    rows = loaded.prompts(["a three", "an eight", ""])
    np.testing.assert_array_equal(loaded.labels(["3", 8, "no_class"]), rows)
    how = dict(steps=1, sampler="euler", guidance=2.0)
    images = loaded.draw_prompts(["a zero", "a one", "a two"], **how)
    np.testing.assert_array_equal(images, loaded.draw([0, 1, 2], **how))
    wanted = np.concatenate(list(loaded.pixels(images)[..., 0]), axis=1)
    found = np.asarray(Image.open(run / "samples" / "step_2.png"))
    found = [found[::4, 34 * i : 34 * i + 32 : 4] for i in range(3)]
    np.testing.assert_allclose(np.concatenate(found, 1), wanted.astype(int), atol=1)
    with pytest.raises(UserError, match=r"must be UTF-8; got 'a \\udcff', whose .* 3"):
        loaded.prompts(["a \udcff"])
    with pytest.raises(UserError, match="unknown class 'a three'"):
        loaded.labels(["a three"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config.model.caption_dropout=0"],
            "without captions; got guidance=2, config.model.caption_dropout=0",
        ),
        (
            ["--config.model.text.max_len=8"],
            "at most 7 bytes of UTF-8, .*max_len=8 .*got 8 in 'an eight'",
        ),
        (["--config.data.augment.mixup=0.1"], "config.model.name=mmdit"),
        (["--config.model.label_dropout=0.1"], "label_dropout"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_one_line(words, message, file, told, tmp_path):
    found = told(train.main, "--config", file, "--workdir", tmp_path / "r", *words)
    assert re.search(message, found), found
