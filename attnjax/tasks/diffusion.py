"""Learning to take noise out of images: loss, and the numbers of an evaluation."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from attnjax.core.errors import UserError
from attnjax.tasks import denoising
from attnjax.tasks.mixer_reports import with_reports

# Of the times and the noise of held-out images: the same at every evaluation.
EVAL_SEED = 20_231


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.task` of diffusion.

    Attributes:
        name: "diffusion".
        noise: how data become noise and what is predicted of the way back; see
            `tasks.denoising.Config`.
        levels: an evaluation also tells the loss of this many equal shares of the
            noise levels apart (1: it does not).
    """

    name: Literal["diffusion"] = "diffusion"
    noise: denoising.Config = dataclasses.field(default_factory=denoising.Config)
    levels: int = 4

    def __post_init__(self):
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1; got {self.levels}.")


class Diffusion:
    """The task of a `models.dit.DiT` or a `models.mmdit.MMDiT`.

    Batches are dicts of "image" float32 [B, H, W, Ch], what the model is told ("label"
    int32 [B], or "caption" int32 [B, M]) and "weight" float32 [B], of which 0 is
    padding; those of an evaluation have "index" int32 [B],
    the place of each image in its split, too: its time and its noise are a function of
    it, so that evaluations differ by the parameters alone.

    Args:
        config: `config.task`.
        model: a denoiser.
        rows: how batches lie on the devices (a NamedSharding of their first axis), or
            None on one device.

    Attributes:
        process: a `tasks.denoising` process.
        totals: the names of the sums that `evaluate` makes.
    """

    def __init__(self, config: Config, model, *, rows=None):
        self.config = config
        self.model = model
        self.rows = rows
        self.process = denoising.make(config.noise)
        parts = jax.eval_shape(self._parts)
        self._names = ("loss", *(name for name in sorted(parts) if name != "loss"))
        levels = range(config.levels) if config.levels > 1 else ()
        shares = [name for i in levels for name in (f"loss_{i}", f"weight_{i}")]
        self.totals = (*self._names, "weight", *shares)

    def _parts(self) -> dict:
        """The losses of one image, for their names."""
        model = self.model
        side, channels = model.image_size, model.channels
        image = jnp.zeros((1, side, side, channels))
        output = jnp.zeros((1, side, side, model.out_channels))
        times = self.process.sample_times(jax.random.key(0), 1)
        return self.process.losses(
            output, data=image, noise=image, noised=image, times=times
        )

    def weight(self, batch: dict) -> jax.Array:
        """Number of images in a batch, float32."""
        return jnp.sum(batch["weight"])

    def _losses(self, params, buffers, batch, labels, times, noise, **context):
        """{name: float32 [B]}, and the layers' StackOut."""
        data = batch["image"]
        noised = self.process.noised(data, noise, times)
        ctx = self.model.context(batch=len(data), rows=self.rows, **context)
        output, out = self.model.predict(
            params, buffers, noised, self.process.embedded(times), labels, ctx
        )
        losses = self.process.losses(
            output, data=data, noise=noise, noised=noised, times=times
        )
        return losses, out

    def loss(
        self, params: dict, buffers: dict, batch: dict, *, normaliser, prng_key, train
    ) -> tuple[jax.Array, tuple[dict, dict]]:
        """Loss of one (micro-)batch.

        Args:
            params, buffers: the model's arrays.
            batch: see the class.
            normaliser: number of images of the whole batch: losses of micro-batches
                then add up to the batch's.
            prng_key: for times, noise, dropped labels and dropout.
            train: static.

        Returns:
            The scalar that is minimised, and (metrics, new buffers). Metrics: "loss"
            and its parts ("mse", "vlb" where the variance is learned), means per image
            over `normaliser`, and each loss (as weighted) and metric of a mixer.
        """
        count = len(batch["weight"])
        keys = jax.random.split(prng_key, 4)
        times = self.process.sample_times(keys[0], count)
        noise = jax.random.normal(keys[1], batch["image"].shape, jnp.float32)
        labels = batch[self.model.told]
        if train:
            labels = self.model.drop_labels(labels, keys[2])
        losses, out = self._losses(
            params, buffers, batch, labels, times, noise, prng_key=keys[3], train=train
        )
        weights = batch["weight"]
        metrics = {
            name: jnp.sum(weights * losses[name]) / normaliser for name in self._names
        }
        total = metrics["loss"]
        share = self.weight(batch) / normaliser
        total, metrics = with_reports(total, metrics, out, share)
        return total, (metrics, out.buffers)

    def evaluate(self, params: dict, buffers: dict, batch: dict) -> dict:
        """Sums over a batch of `totals`: the parts of the loss, "weight", and both for
        each share of the noise levels, of images that are told their class."""
        shape = batch["image"].shape[1:]

        def draw(index):
            key = jax.random.fold_in(jax.random.key(EVAL_SEED), index)
            of_time, of_noise = jax.random.split(key)
            time = self.process.sample_times(of_time, 1)[0]
            return time, jax.random.normal(of_noise, shape, jnp.float32)

        times, noise = jax.vmap(draw)(batch["index"])
        labels, weights = batch[self.model.told], batch["weight"]
        losses, _ = self._losses(params, buffers, batch, labels, times, noise)
        sums = {name: jnp.sum(weights * losses[name]) for name in self._names}
        sums["weight"] = jnp.sum(weights)
        count = self.config.levels
        level = jnp.floor(self.process.level(times) * count).astype(jnp.int32)
        level = jnp.clip(level, 0, count - 1)
        for i in range(count):
            here = weights * (level == i)
            sums[f"loss_{i}"] = jnp.sum(here * losses["loss"])
            sums[f"weight_{i}"] = jnp.sum(here)
        return {name: sums[name] for name in self.totals}

    def summary(self, totals: dict) -> dict:
        """Metrics of an evaluation from its sums.

        Returns:
            "loss" and its parts, per image, and "loss_level<i>", i from 1 (the least
            noise) to `config.levels`, where any image was drawn there.
        """
        weight = float(totals["weight"])
        if weight == 0:
            raise UserError(
                "evaluation: the held-out split holds no image that can be read; got "
                "an empty split. Name another split or folder in config.data."
            )
        metrics = {name: float(totals[name]) / weight for name in self._names}
        if self.config.levels > 1:
            for i in range(self.config.levels):
                share = float(totals[f"weight_{i}"])
                if share:
                    metrics[f"loss_level{i + 1}"] = float(totals[f"loss_{i}"]) / share
        return metrics
