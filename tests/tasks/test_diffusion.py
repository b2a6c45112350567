"""Taking noise out of images: loss, and the sums of an evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.models import dit
from attnjax.tasks.diffusion import Config, Diffusion

B, SIDE = 6, 4
SMALL = dict(embed_dim=8, num_heads=2, num_layers=1, patch_size=2, mlp_dim=8)


def task_of(*, label_dropout=0.5, channels=2, **task):
    config = schema.build(
        dit.Config, dit.resolve({**SMALL, "label_dropout": label_dropout})
    )
    made = schema.build(Config, schema.resolve(Config, task, path="config.task"))
    model = dit.DiT(
        config,
        image_size=SIDE,
        channels=1,
        out_channels=channels,
        num_classes=3,
    )
    return Diffusion(made, model)


def start(task, seed=0):
    rng = np.random.default_rng(seed)
    params, buffers = jax.eval_shape(task.model.init, 0)
    params = jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), params
    )
    return params, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), buffers)


def batch_of(seed=1, count=B):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(count, SIDE, SIDE, 1)).astype(np.float32),
        "label": np.arange(count, dtype=np.int32) % 3,
        "weight": np.ones(count, np.float32),
        "index": np.arange(count, dtype=np.int32),
    }


def loss_of(task, params, buffers, batch, **options):
    options = {"normaliser": 6.0, "train": True, **options}
    key = jax.random.key(3)
    return task.loss(params, buffers, batch, prng_key=key, **options)


def test_a_guess_of_zero_has_the_mean_square_of_the_target():
    batch = batch_of(count=512)
    for noise, channels, wanted in (
        ({"process": "gaussian", "learn_sigma": False}, 1, 1.0),
        ({"process": "flow"}, 1, 1.0 + np.mean(batch["image"] ** 2)),
    ):
        task = task_of(channels=channels, noise=noise)
        params, buffers = jax.jit(task.model.init)(0)
        sums = jax.jit(task.evaluate)(params, buffers, batch)
        assert task.summary(sums)["loss"] == pytest.approx(wanted, rel=0.05)


def test_the_loss_has_parts_and_shrinks_with_the_normaliser():
    task = task_of()
    state = start(task)
    total, (metrics, _) = loss_of(task, *state, batch_of())
    assert set(metrics) == {"loss", "mse", "vlb"}
    np.testing.assert_allclose(total, metrics["mse"] + metrics["vlb"], rtol=1e-6)
    half, _ = loss_of(task, *state, batch_of(), normaliser=12.0)
    np.testing.assert_allclose(2 * half, total, rtol=1e-6)


def test_padding_weighs_nothing():
    task = task_of()
    state, batch = start(task), batch_of()
    batch["weight"][2] = 0.0
    before = loss_of(task, *state, batch)[0], task.evaluate(*state, batch)
    batch["image"][2] += 9.0
    after = loss_of(task, *state, batch)[0], task.evaluate(*state, batch)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert before[1]["weight"] == B - 1


def test_labels_are_dropped_in_training_alone():
    task = task_of(label_dropout=0.999999)
    state, batch = start(task), batch_of()
    other = batch | {"label": (batch["label"] + 1) % 3}
    dropped = [loss_of(task, *state, b)[0] for b in (batch, other)]
    assert dropped[0] == dropped[1]
    told = [loss_of(task, *state, b, train=False)[0] for b in (batch, other)]
    assert told[0] != told[1]
    sums = [task.evaluate(*state, b)["loss"] for b in (batch, other)]
    assert sums[0] != sums[1]


def test_an_evaluation_does_not_depend_on_its_batches():
    task = task_of()
    state, batch = start(task), batch_of()
    whole = task.evaluate(*state, batch)
    parts = [
        task.evaluate(*state, {name: value[rows] for name, value in batch.items()})
        for rows in (slice(0, 2), slice(2, B))
    ]
    for name in task.totals:
        added = parts[0][name] + parts[1][name]
        np.testing.assert_allclose(added, whole[name], rtol=1e-5, err_msg=name)


def test_the_noise_levels_share_the_loss():
    task = task_of(levels=3, noise={"process": "flow"}, channels=1)
    sums = jax.jit(task.evaluate)(*start(task), batch_of(count=64))
    assert task.totals[-2:] == ("loss_2", "weight_2")
    shares = [float(sums[f"weight_{i}"]) for i in range(3)]
    assert sum(shares) == 64 and min(shares) > 8
    losses = [float(sums[f"loss_{i}"]) for i in range(3)]
    assert sum(losses) == pytest.approx(float(sums["loss"]), rel=1e-5)
    summary = task.summary(sums)
    assert summary["loss_level3"] == pytest.approx(losses[2] / shares[2])
    assert "loss_level1" not in task_of(levels=1).summary(
        dict.fromkeys(task.totals, 1.0) | {"vlb": 1.0}
    )


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="levels must be at least 1; got 0"):
        task_of(levels=0)
    with pytest.raises(UserError, match="path is of the other process; got process=g"):
        task_of(noise={"path": "vp"})
    task = task_of()
    with pytest.raises(UserError, match="holds no image that can be read"):
        task.summary(dict.fromkeys(task.totals, 0.0))
