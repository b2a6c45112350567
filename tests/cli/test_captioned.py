"""A tiny denoiser that reads captions is trained, and its picture is its captions'."""

import re

import numpy as np
import pytest
from PIL import Image

import attnjax
from attnjax import train
from attnjax.core.errors import EXIT_OK
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


def test_a_run_draws_a_caption_a_column(run):
    """On one device, of what eight trained."""
    loaded = attnjax.load(run)
    assert isinstance(loaded, LoadedCaptioned)
    how = dict(steps=1, sampler="euler", guidance=2.0)
    images = loaded.draw_prompts(["a zero", "a one", "a two"], **how)
    wanted = np.concatenate(list(loaded.pixels(images)[..., 0]), axis=1)
    found = np.asarray(Image.open(run / "samples" / "step_2.png"))
    found = [found[::4, 34 * i : 34 * i + 32 : 4] for i in range(3)]
    np.testing.assert_allclose(np.concatenate(found, 1), wanted.astype(int), atol=1)


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
