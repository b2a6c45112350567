"""Naming the class of an image: loss, and the numbers of an evaluation."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from attnjax.core.errors import UserError
from attnjax.tasks.mixer_reports import with_reports


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.task` of classification.

    Attributes:
        name: "classification".
        label_smoothing: share of the target that all classes have alike, in [0, 1)
            (Szegedy et al., arXiv:1512.00567, section 7); training alone.
        top_k: an evaluation also counts images whose class is among the k likeliest
            (0: it does not). Where there are no more classes than k it cannot fail
            and is left out.
    """

    name: Literal["classification"] = "classification"
    label_smoothing: float = 0.0
    top_k: int = 5

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing must be in [0, 1); got {self.label_smoothing}."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative; got {self.top_k}.")


class Classification:
    """The task of a `models.vit.ViT`.

    Batches are dicts of "image" float32 [B, H, W, Ch], "label" and "other_label"
    int32 [B], "mix" and "weight" float32 [B]: the target of a row is
    mix onehot(label) + (1 - mix) onehot(other_label), and rows of weight 0 are padding.

    Args:
        config: `config.task`.
        model: a ViT.
        rows: how batches lie on the devices (a NamedSharding of their first axis), or
            None on one device.

    Attributes:
        totals: the names of the sums that `evaluate` makes.
    """

    def __init__(self, config: Config, model, *, rows=None):
        self.config = config
        self.model = model
        self.rows = rows
        self._top = f"top{config.top_k}"
        has_top = 1 < config.top_k < model.num_classes
        more = (self._top,) if has_top else ()
        self.totals = ("nll", "correct", *more, "weight")

    def weight(self, batch: dict) -> jax.Array:
        """Number of images in a batch, float32."""
        return jnp.sum(batch["weight"])

    def _logits(self, params, buffers, batch, prng_key, train):
        """float32 [B, classes], and the layers' StackOut."""
        images = batch["image"]
        ctx = self.model.context(
            batch=images.shape[0], prng_key=prng_key, train=train, rows=self.rows
        )
        return self.model.logits(params, buffers, images, ctx)

    def loss(
        self, params: dict, buffers: dict, batch: dict, *, normaliser, prng_key, train
    ) -> tuple[jax.Array, tuple[dict, dict]]:
        """Loss of one (micro-)batch.

        Args:
            params, buffers: the model's arrays.
            batch: see the class.
            normaliser: number of images of the whole batch: losses of micro-batches
                then add up to the batch's.
            prng_key: for dropout.
            train: static.

        Returns:
            The scalar that is minimised, and (metrics, new buffers). Metrics: "loss"
            (mean nats per image over `normaliser`, of the smoothed and mixed targets),
            and each loss (as weighted) and metric of a mixer, of which micro-batches
            have a share as large as theirs of the images.
        """
        logits, out = self._logits(params, buffers, batch, prng_key, train)
        weights = batch["weight"].astype(logits.dtype)
        nats = self._cross_entropy(logits, batch)
        metrics = {"loss": jnp.sum(weights * nats) / normaliser}
        total = metrics["loss"]
        share = self.weight(batch) / normaliser
        total, metrics = with_reports(total, metrics, out, share)
        return total, (metrics, out.buffers)

    def _cross_entropy(self, logits: jax.Array, batch: dict) -> jax.Array:
        """[B] nats against the targets.

        The target's entries add up to 1, so it is log sum exp(z) less the target's
        mean of z, and no [B, classes] target is made.
        """
        mix = batch["mix"].astype(logits.dtype)
        wanted = mix * _chosen(logits, batch["label"])
        wanted = wanted + (1.0 - mix) * _chosen(logits, batch["other_label"])
        smooth = self.config.label_smoothing
        if smooth:
            wanted = (1.0 - smooth) * wanted + smooth * jnp.mean(logits, axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - wanted

    def evaluate(self, params: dict, buffers: dict, batch: dict) -> dict:
        """Sums over a batch of `totals`: "nll" (nats of the plain label, whatever the
        smoothing), "correct", "top<k>" and "weight"."""
        logits, _ = self._logits(params, buffers, batch, None, False)
        weights = batch["weight"].astype(logits.dtype)
        own = _chosen(logits, batch["label"])
        nll = jax.nn.logsumexp(logits, axis=-1) - own
        # Which of two equal logits is the likelier does not depend on the label.
        rank = _rank(logits, batch["label"])
        sums = {
            "nll": jnp.sum(weights * nll),
            "correct": jnp.sum(weights * (rank < 1)),
            "weight": jnp.sum(weights),
        }
        if self._top in self.totals:
            sums[self._top] = jnp.sum(weights * (rank < self.config.top_k))
        return {name: sums[name] for name in self.totals}

    def summary(self, totals: dict) -> dict:
        """Metrics of an evaluation from its sums.

        Returns:
            "loss" (nats per image), "accuracy" (top-1) and "top<k>".
        """
        weight = float(totals["weight"])
        if weight == 0:
            raise UserError(
                "evaluation: the held-out split holds no image that can be read; got "
                "an empty split. Name another split or folder in config.data."
            )
        metrics = {
            "loss": float(totals["nll"]) / weight,
            "accuracy": float(totals["correct"]) / weight,
        }
        if self._top in self.totals:
            metrics[self._top] = float(totals[self._top]) / weight
        return metrics


def _chosen(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B] the logits [B, classes] of the labels [B]."""
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def _rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """int32 [B]: how many classes are likelier than the label; of equal ones, those
    with a lower number come first, as in argmax. A row with a NaN is never right."""
    own = _chosen(logits, labels)[:, None]
    numbers = jnp.arange(logits.shape[-1])
    before = (logits > own) | ((logits == own) & (numbers < labels[:, None]))
    lost = jnp.any(jnp.isnan(logits), axis=-1)
    return jnp.sum(before, axis=-1) + jnp.where(lost, logits.shape[-1], 0)
