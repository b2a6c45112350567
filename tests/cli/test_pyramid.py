"""A tiny pyramid through the front doors, over eight devices."""

import json

import jax
import numpy as np

import attnjax
from attnjax import train
from attnjax.core.errors import EXIT_OK
from attnjax.models.layout import path_of

CONFIG = '''
"""Two stages of a layer each."""


def get_config():
    """The smallest pyramid."""
    return {
        "model": {
            "name": "pyramid",
            "layers": ["attention", "gated_attention"],
            "depths": (1, 1),
            "embed_dim": 8,
            "num_heads": 2,
            "mlp_dim": 16,
            "params": "match",
            "patch_size": 2,
            "stem": "conv",
            "cpe": True,
            "drop_path": 0.2,
            "remat": "none",
        },
        "data": {"name": "digits"},
        "train": {
            "steps": 2,
            "batch_size": 16,
            "log_every": 1,
            "tensorboard": False,
        },
        "eval": {"every": 2, "batch_size": 64, "batches": 1},
        "mesh": {"data": 4, "fsdp": 2},
    }
'''


def test_a_pyramid_is_trained_and_loaded(run_door, told, tmp_path):
    file, run = tmp_path / "tiny.py", tmp_path / "run"
    file.write_text(CONFIG)
    code, _, err = run_door(train.main, "--config", file, "--workdir", run)
    assert code == EXIT_OK, err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["matched"]["baseline"] == "attention"
    loaded = attnjax.load(run)
    assert summary["forward_flops_per_image"] == loaded.model.flops()
    started, _ = jax.jit(loaded.model.init)(0)
    held = [
        "/".join(path_of(path))
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(started),
            jax.tree.leaves(loaded.params),
            strict=True,
        )
        if np.array_equal(old, new)
    ]
    # The head starts at zero, so that the first step moves nothing below it.
    assert not held
    assert loaded.logits(np.zeros((3, 8, 8, 1), np.float32)).shape == (3, 10)

    new = ["--config", file, "--workdir", tmp_path / "new"]
    words = told(train.main, *new, "--config.data.image_size=6")
    assert "must be a multiple of all strides together" in words
    other = ["--config.train.init_convert=dha", f"--config.train.init_from={run}"]
    words = told(train.main, *new, *other)
    assert "converts layers of models of one width" in words
