"""Next-token prediction: loss, z-loss, and the numbers of an evaluation."""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from attnjax import kernels, nn
from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.tasks import sink_metrics
from attnjax.tasks.mixer_reports import with_reports


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.task` of language modelling.

    Attributes:
        name: "language_modelling".
        z_loss: weight of the mean squared log-normaliser.
        loss_chunk: tokens whose logits a device holds at one time; 0: the size decides
            (chunks of about 16 million logits).
        prefix_len: tokens at the start of each sequence, or of each document where
            documents do not see one another, that see one another both ways (prefix
            LM) and carry no loss; 0 is plain causal.
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
        rows: how batches lie on the devices (a NamedSharding of their first axis, or
            of the first two where the devices share tokens), or None on one device.
        sequence_form: how attention is computed where they do (see `Context`). With
            "ring" the tokens of a batch lie in the order `kernels.zigzag`.

    Attributes:
        totals: the names of the sums that `evaluate` makes.
    """

    totals = ("nll", "correct", "weight")

    def __init__(
        self,
        config: Config,
        model,
        *,
        use_segments: bool,
        rows=None,
        sequence_form: str | None = None,
    ):
        self.config = config
        self.model = model
        self.use_segments = use_segments
        self.rows = rows
        self.sequence_form = sequence_form

    def weight(self, batch: dict) -> jax.Array:
        """Number of predicted tokens in a batch, float32."""
        return jnp.sum(self._weights(batch))

    def _weights(self, batch: dict) -> jax.Array:
        weights = batch["weights"]
        if self.config.prefix_len:
            # Counted as the mask counts it, else a token would see its own target.
            places = self.places(weights.shape[-1])
            if places is None:
                places = jnp.arange(weights.shape[-1])
            if self.use_segments:
                places = batch["positions"]
            weights = jnp.where(places < self.config.prefix_len, 0.0, weights)
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
            "loss" (mean nats per predicted token over `normaliser`), "z_loss", and
            each loss (as weighted) and metric of a mixer, of which micro-batches have
            a share as large as theirs of the predicted tokens.
        """
        with self._sharing():
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
        total, metrics = with_reports(total, metrics, out, share)
        return total, (metrics, out.buffers)

    @property
    def sharers(self) -> int:
        """How many devices share the tokens of a row."""
        if self.sequence_form is None:
            return 1
        return self.rows.mesh.shape[self.rows.spec[1]]

    def _sharing(self):
        """For what is traced about tokens that devices share."""
        return nn.axes_apart(apart=self.sequence_form is not None)

    def places(self, length: int) -> jax.Array | None:
        """int32 [1, T], the place in its row of each token; None if in order."""
        if self.sequence_form != "ring":
            return None
        return jnp.asarray(kernels.zigzag(length, self.sharers), jnp.int32)[None]

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
            rows=self.rows,
            sequence_form=self.sequence_form,
            places=self.places(batch["tokens"].shape[1]),
        )

    def _cross_entropy(self, params, hidden, batch) -> tuple[jax.Array, jax.Array]:
        """(sum of weighted nats, sum of weighted squared log-normalisers)."""
        arrays = (hidden, batch["targets"], self._weights(batch))
        return self._sum_over_chunks(partial(self._chunk_loss, params), arrays)

    def _sum_over_chunks(self, sums, arrays):
        """`sums(*arrays)`, with the logits of one chunk of positions at a time.

        Args:
            sums: (hidden [B, L, C], targets [B, L], weights [B, L]) -> scalars that
                add up over positions; a position without weight adds nothing.
            arrays: the three for all T positions.
        """
        rows, length = arrays[1].shape
        count = self._chunks(rows, length)
        if count == 1:
            return sums(*arrays)
        # Each device cuts the tokens that it has.
        parts = self.sharers
        own = length // parts
        size = -(-own // count)

        def cut(a):
            rest = a.shape[2:]
            a = a.reshape(rows, parts, own, *rest)
            a = jnp.pad(
                a, [(0, 0), (0, 0), (0, count * size - own)] + [(0, 0)] * len(rest)
            )
            a = jnp.moveaxis(a.reshape(rows, parts, count, size, *rest), 2, 0)
            return a.reshape(count, rows, parts * size, *rest)

        @jax.checkpoint
        def body(totals, xs):
            return jax.tree.map(jnp.add, totals, sums(*xs)), None

        xs = jax.tree.map(cut, arrays)
        first = jax.eval_shape(sums, *jax.tree.map(lambda a: a[0], xs))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        return jax.lax.scan(body, zeros, xs)[0]

    def _chunks(self, rows: int, length: int) -> int:
        """Into how many parts the positions of a row are cut."""
        tokens = self.config.loss_chunk or LOGITS_AT_ONCE // self.model.vocab_size
        if self.rows is not None:
            # Each device holds the logits of its own rows and tokens.
            rows, length = self.rows.shard_shape((rows, length))
        return -(-length // max(1, tokens // rows))

    def _chunk_loss(self, params, hidden, targets, weights):
        logits = self.model.logits(params, hidden)
        # A max that carries no gradient, then one exponential: cheaper on a CPU than
        # log_softmax, whose result would be as large as the logits.
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        weights = weights.astype(logits.dtype)
        squares = log_sum**2 if self.config.z_loss else jnp.zeros_like(log_sum)
        return jnp.sum(weights * (log_sum - chosen)), jnp.sum(weights * squares)

    def evaluate(self, params: dict, buffers: dict, batch: dict) -> dict:
        """Sums over a batch: "nll" (nats), "correct" and "weight"."""
        with self._sharing():
            hidden, _ = self.model.hidden(
                params, buffers, batch["tokens"], self.context(batch, None, False)
            )
            arrays = (hidden, batch["targets"], self._weights(batch))
            return self._sum_over_chunks(partial(self._chunk_sums, params), arrays)

    def _chunk_sums(self, params, hidden, targets, weights) -> dict:
        logits = self.model.logits(params, hidden)
        weights = weights.astype(logits.dtype)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        correct = jnp.argmax(logits, axis=-1) == targets
        return {
            "nll": jnp.sum(weights * nll),
            "correct": jnp.sum(weights * correct),
            "weight": jnp.sum(weights),
        }

    def explain(self, params: dict, buffers: dict, batch: dict, *, length, most):
        """`sink_metrics.measure` of the first rows of a batch.

        Args:
            length: tokens of each row that are read, static.
            most: how many rows count; padding never does.
        """
        valid = jnp.sum(batch["weights"], axis=-1) > 0
        valid = valid & (jnp.arange(valid.shape[0]) < most)
        tokens, rows = batch["tokens"], self.rows
        places = self.places(tokens.shape[1])
        if places is not None:
            tokens = jnp.take(tokens, jnp.argsort(places[0]), axis=1)
        if self.sequence_form is not None:
            # The maps of a few tokens: every device that shares them has all.
            rows = NamedSharding(rows.mesh, PartitionSpec(rows.spec[0]))
        return sink_metrics.measure(
            self.model, params, buffers, tokens[:, :length], valid, rows=rows
        )

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
