"""The loss of classification and its evaluation against closed forms in float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.tasks.classification import Classification, Config

B, K = 7, 11


class Head:
    """A model whose logits are its parameters."""

    num_classes = K

    def context(self, *, batch, prng_key, train, rows):
        return SimpleNamespace(batch=batch, train=train)

    def logits(self, params, buffers, images, ctx):
        out = SimpleNamespace(
            losses=params.get("losses", {}),
            metrics=params.get("metrics", {}),
            buffers=buffers,
        )
        return params["logits"], out


def params_of(seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return {"logits": (scale * rng.normal(size=(B, K))).astype(np.float32)}


def batch_of(*, mixed=True):
    rng = np.random.default_rng(1)
    label = rng.integers(0, K, B).astype(np.int32)
    mix = rng.uniform(0.5, 1.0, B) if mixed else np.ones(B)
    weight = np.ones(B, np.float32)
    weight[[2, 6]] = 0.0
    return {
        "image": np.zeros((B, 2, 2, 1), np.float32),
        "label": label,
        "other_label": np.where(mix < 1, (label + 3) % K, label).astype(np.int32),
        "mix": mix.astype(np.float32),
        "weight": weight,
    }


def closed_form(params, batch, smoothing):
    """(mean nats, their gradient) with whole targets, in float64."""
    z = np.float64(params["logits"])
    eye, mix = np.eye(K), np.float64(batch["mix"])[:, None]
    target = mix * eye[batch["label"]] + (1 - mix) * eye[batch["other_label"]]
    target = (1 - smoothing) * target + smoothing / K
    log_p = z - np.log(np.sum(np.exp(z), -1, keepdims=True))
    share = np.float64(batch["weight"]) / batch["weight"].sum()
    loss = -np.sum(share[:, None] * target * log_p)
    return loss, share[:, None] * (np.exp(log_p) - target)


def loss_of(task, params, batch, normaliser=None):
    normaliser = task.weight(batch) if normaliser is None else normaliser

    def loss(params):
        return task.loss(
            params, {}, batch, normaliser=normaliser, prng_key=None, train=True
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    ("smoothing", "mixed"), [(0.0, False), (0.3, False), (0.0, True), (0.1, True)]
)
def test_the_loss_is_that_of_the_whole_targets(smoothing, mixed):
    task = Classification(Config(label_smoothing=smoothing), Head())
    params, batch = params_of(), batch_of(mixed=mixed)
    (total, (metrics, _)), grads = loss_of(task, params, batch)
    expected, gradient = closed_form(params, batch, smoothing)
    assert float(task.weight(batch)) == B - 2
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert set(metrics) == {"loss"}
    np.testing.assert_allclose(grads["logits"], gradient, atol=1e-7)
    assert not np.any(grads["logits"][batch["weight"] == 0])


def test_smoothing_alone_has_its_closed_form():
    params = {"logits": np.zeros((B, K), np.float32)}
    for smoothing in (0.0, 0.5):
        task = Classification(Config(label_smoothing=smoothing), Head())
        (total, _), _ = loss_of(task, params, batch_of())
        np.testing.assert_allclose(total, np.log(K), rtol=1e-6)
    # One confident logit c: log(e^c + K - 1) - c (1 - s + s / K) where it is right.
    label, c, s = batch_of(mixed=False)["label"], 4.0, 0.2
    params = {"logits": np.float32(c * np.eye(K)[label])}
    task = Classification(Config(label_smoothing=s), Head())
    (total, _), _ = loss_of(task, params, batch_of(mixed=False))
    expected = np.log(np.exp(c) + K - 1) - c * (1 - s + s / K)
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_micro_batches_add_up_and_share_the_losses_of_mixers():
    task, params, batch = Classification(Config(), Head()), params_of(), batch_of()
    losses = {"losses": {"balance": 2.0}, "metrics": {"seen": 4.0}}
    whole, (metrics, _) = loss_of(task, params | losses, batch)[0]
    np.testing.assert_allclose(metrics["balance"], 2.0)
    np.testing.assert_allclose(whole, metrics["loss"] + 2.0, rtol=1e-6)
    parts, normaliser = [], task.weight(batch)
    for rows in (slice(0, 3), slice(3, B)):
        part = {name: value[rows] for name, value in batch.items()}
        own = {"logits": params["logits"][rows]} | losses
        parts.append(loss_of(task, own, part, normaliser)[0])
    np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-6)
    np.testing.assert_allclose(sum(p[1][0]["seen"] for p in parts), 4.0, rtol=1e-6)


def test_evaluation_counts_the_plain_label_and_leaves_padding_out():
    task = Classification(Config(label_smoothing=0.4, top_k=3), Head())
    params, batch = params_of(), batch_of()
    sums = jax.jit(task.evaluate)(params, {}, batch)
    assert task.totals == ("nll", "correct", "top3", "weight")
    assert set(sums) == set(task.totals)
    z, kept = np.float64(params["logits"]), batch["weight"] > 0
    order = np.argsort(-z, axis=-1)
    own = np.take_along_axis(z, batch["label"][:, None], -1)[:, 0]
    nll = np.log(np.sum(np.exp(z), -1)) - own
    np.testing.assert_allclose(sums["nll"], nll[kept].sum(), rtol=1e-6)
    hits = order == batch["label"][:, None]
    assert sums["correct"] == hits[kept, 0].sum()
    assert sums["top3"] == hits[kept, :3].sum()
    metrics = task.summary(sums)
    assert set(metrics) == {"loss", "accuracy", "top3"}
    assert metrics["top3"] == pytest.approx(hits[kept, :3].sum() / 5)


def test_equal_logits_are_ranked_by_their_number():
    task = Classification(Config(top_k=3), Head())
    batch = batch_of() | {"label": np.array([0, 1, 2, 3, 9, 10, 0], np.int32)}
    batch["weight"] = np.array([1, 1, 1, 1, 1, 1, 0], np.float32)
    sums = task.evaluate({"logits": jnp.zeros((B, K))}, {}, batch)
    assert (sums["correct"], sums["top3"]) == (1, 3)
    # A model that has diverged names nothing.
    sums = task.evaluate({"logits": jnp.full((B, K), jnp.nan)}, {}, batch)
    assert (sums["correct"], sums["top3"]) == (0, 0)


@pytest.mark.parametrize("top_k", [0, 1, K])
def test_a_top_k_that_says_nothing_is_left_out(top_k):
    task = Classification(Config(top_k=top_k), Head())
    assert task.totals == ("nll", "correct", "weight")
    assert set(task.summary({"nll": 3, "correct": 1, "weight": 2})) == {
        "loss",
        "accuracy",
    }


def test_an_empty_split_is_refused():
    task = Classification(Config(), Head())
    with pytest.raises(UserError, match="holds no image that can be read"):
        task.summary(dict.fromkeys(task.totals, 0.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ({"top_k": -1}, "top_k must not be negative; got -1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)
