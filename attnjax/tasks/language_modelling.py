"""Next-token prediction: loss, z-loss, and the numbers of an evaluation."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from attnjax.core.context import Context
from attnjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.task` of language modelling.

    Attributes:
        name: "language_modelling".
        z_loss: weight of the mean squared log-normaliser.
        loss_chunk: tokens whose logits exist at one time; 0 lets the size decide
            (chunks of about 16 million logits).
        prefix_len: tokens at the start of each sequence that see one another both
            ways (prefix LM) and carry no loss; 0 is plain causal.
    """

    name: Literal["language_modelling"] = "language_modelling"
    z_loss: float = 0.0
    loss_chunk: int = 0
    prefix_len: int = 0

    def __post_init__(self):
        for name in ("z_loss", "loss_chunk", "prefix_len"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must not be negative; got {getattr(self, name)}."
                )


LOGITS_AT_ONCE = 1 << 24


class LanguageModelling:
    """The task of a `models.lm.LM`.

    Args:
        config: `config.task`.
        model: an LM.
        use_segments: whether batches hold several documents a row that must not
            see one another.
    """

    def __init__(self, config: Config, model, *, use_segments: bool):
        self.config = config
        self.model = model
        self.use_segments = use_segments

    def weight(self, batch: dict) -> jax.Array:
        """Number of predicted tokens in a batch, float32."""
        return jnp.sum(self._weights(batch))

    def _weights(self, batch: dict) -> jax.Array:
        weights = batch["weights"]
        if self.config.prefix_len:
            inside = jnp.arange(weights.shape[-1]) < self.config.prefix_len
            weights = jnp.where(inside, 0.0, weights)
        return weights

    def loss(
        self, params: dict, buffers: dict, batch: dict, *, normaliser, prng_key, train
    ) -> tuple[jax.Array, tuple[dict, dict]]:
        """Loss of one (micro-)batch.

        Args:
            params, buffers: the model's arrays.
            batch: "tokens", "targets", "segment_ids", "positions" int32 [B, T] and
                "weights" float32 [B, T].
            normaliser: number of predicted tokens of the whole batch: losses of
                micro-batches then add up to the batch's.
            prng_key: for dropout.
            train: static.

        Returns:
            The scalar that is minimised, and (metrics, new buffers). Metrics:
            "loss" (mean nats per predicted token over `normaliser`), "z_loss" and
            each mixer loss.
        """
        hidden, out = self.model.hidden(
            params, buffers, batch["tokens"], self.context(batch, prng_key, train)
        )
        nll, z = self._cross_entropy(params, hidden, batch)
        metrics = {"loss": nll / normaliser}
        total = metrics["loss"]
        if self.config.z_loss:
            metrics["z_loss"] = z / normaliser
            total = total + self.config.z_loss * metrics["z_loss"]
        share = self.weight(batch) / normaliser
        for name, value in out.losses.items():
            metrics[name] = value * share
            total = total + metrics[name]
        return total, (metrics, out.buffers)

    def context(self, batch: dict, prng_key, train: bool) -> Context:
        """The mixers' context of a batch."""
        rows = batch["tokens"].shape[0]
        prefix = self.config.prefix_len
        return Context(
            positions=batch["positions"],
            segment_ids=batch["segment_ids"] if self.use_segments else None,
            prefix_len=jnp.full((rows,), prefix, jnp.int32) if prefix else None,
            prng_key=prng_key,
            train=train,
        )

    def _cross_entropy(self, params, hidden, batch) -> tuple[jax.Array, jax.Array]:
        """(sum of weighted nats, sum of weighted squared log-normalisers)."""
        targets, weights = batch["targets"], self._weights(batch)
        rows, length = targets.shape
        chunk = self._chunk(rows, length)
        if chunk >= length:
            return self._chunk_loss(params, hidden, targets, weights)

        def cut(a):
            split = a.reshape(rows, length // chunk, chunk, *a.shape[2:])
            return jnp.moveaxis(split, 1, 0)

        @jax.checkpoint
        def body(carry, xs):
            nll, z = self._chunk_loss(params, *xs)
            return (carry[0] + nll, carry[1] + z), None

        zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
        sums, _ = jax.lax.scan(
            body, (zero, zero), tuple(map(cut, (hidden, targets, weights)))
        )
        return sums

    def _chunk(self, rows: int, length: int) -> int:
        """Positions of a row whose logits exist at once; divides `length`."""
        tokens = self.config.loss_chunk or max(
            rows, LOGITS_AT_ONCE // self.model.vocab_size
        )
        wanted = max(1, tokens // rows)
        if wanted >= length:
            return length
        return max(d for d in range(1, wanted + 1) if length % d == 0)

    def _chunk_loss(self, params, hidden, targets, weights):
        logits = self.model.logits(params, hidden)
        # A max that carries no gradient, then one exponential: cheaper on a CPU than
        # log_softmax, whose result would be as large as the logits.
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        weights = weights.astype(logits.dtype)
        z = jnp.sum(weights * log_sum**2) if self.config.z_loss else 0.0 * log_sum[0, 0]
        return jnp.sum(weights * (log_sum - chosen)), z

    def evaluate(self, params: dict, buffers: dict, batch: dict) -> dict:
        """Sums over a batch: "nll" (nats), "correct" and "weight"."""
        hidden, _ = self.model.hidden(
            params, buffers, batch["tokens"], self.context(batch, None, False)
        )
        rows, length = batch["targets"].shape
        chunk = self._chunk(rows, length)
        weights = self._weights(batch)
        totals = {"nll": 0.0, "correct": 0.0, "weight": jnp.sum(weights)}
        for at in range(0, length, chunk):
            part = slice(at, at + chunk)
            logits = self.model.logits(params, hidden[:, part])
            targets, w = batch["targets"][:, part], weights[:, part]
            log_sum = jax.nn.logsumexp(logits, axis=-1)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            totals["nll"] += jnp.sum(w * (log_sum - chosen))
            totals["correct"] += jnp.sum(w * (jnp.argmax(logits, axis=-1) == targets))
        return totals

    def summary(self, totals: dict, *, bytes_per_token: float | None) -> dict:
        """Metrics of an evaluation from its sums.

        Returns:
            "loss" (nats per token), "perplexity", "accuracy", and "bits_per_byte"
            where tokens have a known length in bytes.
        """
        weight = float(totals["weight"])
        if weight == 0:
            raise UserError(
                "evaluation: the held-out split predicts no token; got an empty split. "
                "Give it more text or lower config.data.seq_len."
            )
        loss = float(totals["nll"]) / weight
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": float(totals["correct"]) / weight,
        }
        if bytes_per_token:
            metrics["bits_per_byte"] = loss / math.log(2) / bytes_per_token
        return metrics
