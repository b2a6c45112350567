"""The quickstart of a denoiser that reads captions, made tiny, learns."""

from pathlib import Path

import jax
import numpy as np

from attnjax.core import config as configs
from attnjax.models import text_encoder
from attnjax.training import experiment, feeds, loop
from attnjax.training.step import init_state, make_step

QUICKSTART = Path(__file__).parents[2] / "configs" / "mmdit_quickstart.py"
TINY = {
    "model.patch_size": 4,
    "model.num_layers": 1,
    "model.embed_dim": 8,
    "model.mlp_dim": 8,
    "model.time_features": 8,
    "model.remat": "none",
    "model.text.embed_dim": 8,
    "optim.warmup_steps": 0,
    "train.steps": 1,
    "train.batch_size": 8,
}


def test_the_quickstart_takes_a_step():
    """From random arrays, where no gate is closed, its text encoder learns too."""
    given = configs.load_file(str(QUICKSTART))
    config = experiment.resolve(configs.apply_values(given, TINY.items()))
    here = experiment.build(config, devices=jax.devices()[:1])
    shapes = jax.eval_shape(lambda: init_state(here.recipe))
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    rng = np.random.default_rng(0)
    state["params"] = jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), state["params"]
    )
    batch = loop.build_batch(here, 0)
    assert batch["caption"].shape == (8, 12)
    after, row = jax.jit(make_step(here.recipe))(state, batch)
    assert np.isfinite(row["loss"])
    tables = [s["params"]["text_encoder"]["token_embedding"] for s in (state, after)]
    assert np.any(tables[0]["table"] != tables[1]["table"])


def test_a_label_is_told_as_the_caption_of_its_class():
    given = configs.load_file(str(QUICKSTART))
    given |= {"data": {"name": "digits"}}
    feed = feeds.make(experiment.resolve(given))
    (length,) = feed.told_shape
    wanted = [
        text_encoder.encode(text, length, owner="test")
        for text in ("a seven", "a zero", "an eight")
    ]
    np.testing.assert_array_equal(feed.told(np.asarray([7, 0, 8])), wanted)
