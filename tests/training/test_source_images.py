"""Runs on images of one size that start runs on another (train.init_from)."""

import json

import jax
import pytest

from attnjax.core.errors import UserError
from attnjax.training import experiment, run
from attnjax.training.checkpoints import Checkpointer

SMALL = dict(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, patch_size=4)


def build(image_size, train=(), **model):
    config = experiment.resolve(
        {
            "model": {"name": "vit", "positions": "sincos", **SMALL, **model},
            "data": {"name": "digits", "image_size": image_size},
            "train": {"batch_size": 4, **dict(train)},
        }
    )
    return experiment.build(config, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run on 2 x 2 patches that has trained no step."""
    path = tmp_path_factory.mktemp("source")
    here = build(8)
    params, buffers = jax.jit(here.model.init, static_argnums=0)(0)
    (path / "config.json").write_text(json.dumps(here.config))
    meta = {"layout": here.model.layout.to_json(), **here.feed.sizes_of(here.model)}
    with Checkpointer(path / "checkpoints", keep_last=1, keep_best=0) as saved:
        saved.save(0, {"params": params, "buffers": buffers}, meta)
    return path


def test_fixed_positions_of_another_size_must_be_said(source):
    train = {"init_from": str(source)}
    with pytest.raises(UserError, match=r"positions_grid: must be said .*on 2 x 2 pat"):
        run.state_from_source(build(12, train))
    for grid in (2, 3):
        run.state_from_source(build(12, train, positions_grid=grid))
    run.state_from_source(build(8, train))
