"""Flow matching (SiT): straight and curved paths from noise to data."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.tasks.denoising.common import (
    Prediction,
    check_output,
    column,
    row_means,
    wide,
)

# The VP path's noise rates at its data and its noise end.
LEAST_RATE, MOST_RATE = 0.1, 20.0
TARGETS = ("velocity", "noise", "score")
PATHS = ("linear", "gvp", "vp")
WEIGHTINGS = ("none", "velocity", "likelihood")


@dataclasses.dataclass(frozen=True)
class Scales:
    """A path at some times: alpha, sigma and their derivatives in t, like the times."""

    alpha: jax.Array
    sigma: jax.Array
    d_alpha: jax.Array
    d_sigma: jax.Array

    @property
    def pull(self) -> jax.Array:
        """g = (alpha'/alpha) sigma^2 - sigma sigma', half the squared diffusion of the
        process that adds the noise; infinite where alpha is 0."""
        return self.d_alpha / self.alpha * self.sigma**2 - self.sigma * self.d_sigma

    @property
    def turn(self) -> jax.Array:
        """alpha' sigma - alpha sigma', the determinant of (x_t, v) in (data, noise)."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


@dataclasses.dataclass(frozen=True)
class Flow:
    """x_t = alpha_t data + sigma_t noise for t from 0 (noise) to 1 (data).

    linear: alpha = t, sigma = 1 - t. gvp: alpha = sin(pi t/2), sigma = cos(pi t/2).
    vp: log alpha = -(1-t)^2 (20 - 0.1)/4 - (1-t) 0.1/2, sigma = sqrt(1 - alpha^2).
    Static and hashable. Channels are the last axis.
    Source: Ma et al. (SiT), arXiv 2401.08740, and their code, whose time runs so.

    Attributes:
        path: "linear", "gvp" or "vp".
        target: what the network predicts: "velocity" v = alpha' data + sigma' noise,
            "noise", or "score" = -noise/sigma.
        weighting: of the squared error of a noise, or of sigma times a score: "none"
            is 1, "velocity" is (g/sigma)^2, "likelihood" is g/sigma^2, with g of
            `Scales.pull`. For a velocity only "none".
        training_cut: times are drawn from [cut, 1 - cut], on the vp path from
            [0, 1 - cut]; None takes the authors': 1e-5 for vp, 0 for velocities on the
            other paths, 1e-3 for noises and scores on them.
        sampling_cut: the same for samplers; None takes 1e-3 for vp and else as above.

    Raises:
        ValueError: for unknown names, cuts out of range, or a weighting of velocities.
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    target: Literal["velocity", "noise", "score"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    training_cut: float | None = None
    sampling_cut: float | None = None

    def __post_init__(self):
        names = {"path": PATHS, "target": TARGETS, "weighting": WEIGHTINGS}
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; "
                    f"got {getattr(self, name)!r}."
                )
        if self.target == "velocity" and self.weighting != "none":
            raise ValueError(
                "weighting is for the targets noise and score; got target=velocity, "
                f"weighting={self.weighting}. Leave it out."
            )
        needs_cut = self.path == "vp" or self.target != "velocity"
        for name in ("training_cut", "sampling_cut"):
            cut = getattr(self, name)
            if cut is not None and not 0 <= cut < 0.5:
                raise ValueError(f"{name} must be in [0, 0.5); got {cut}.")
            if cut == 0 and needs_cut:
                raise ValueError(
                    f"{name} must be positive for path={self.path} and target="
                    f"{self.target}, which divide by 0 at an end; got {cut}."
                )

    def interval(self, *, sampling: bool = False) -> tuple[float, float]:
        """First and last time of training, or of an ODE sampler."""
        cut = self.sampling_cut if sampling else self.training_cut
        if self.path == "vp":
            cut = cut if cut is not None else (1e-3 if sampling else 1e-5)
            return 0.0, 1.0 - cut
        if cut is None:
            cut = 0.0 if self.target == "velocity" else 1e-3
        return cut, 1.0 - cut

    def sample_times(self, prng_key: jax.Array, batch: int) -> jax.Array:
        """float32 [batch], uniform over `interval()`."""
        first, last = self.interval()
        return jax.random.uniform(prng_key, (batch,), jnp.float32, first, last)

    def embedded(self, times: jax.Array) -> jax.Array:
        """float32 [B], what the time embedding is given: t itself, in [0, 1]."""
        return times.astype(jnp.float32)

    def level(self, times: jax.Array) -> jax.Array:
        """float32 [B], 1 - t: 0 nearly clean, 1 nearly pure noise."""
        return 1.0 - times.astype(jnp.float32)

    def output_channels(self, channels: int) -> int:
        """Channels of the network's output for data of `channels`: as many."""
        return channels

    def scales(self, times: jax.Array) -> Scales:
        """The path at `times`, of any shape; vp's sigma' is infinite at t = 1."""
        if self.path == "linear":
            one = jnp.ones_like(times)
            return Scales(times, 1 - times, one, -one)
        if self.path == "gvp":
            angle = times * np.pi / 2
            sine, cosine = jnp.sin(angle), jnp.cos(angle)
            return Scales(sine, cosine, cosine * np.pi / 2, -sine * np.pi / 2)
        left = 1 - times
        log_alpha = -(left**2) * (MOST_RATE - LEAST_RATE) / 4 - left * LEAST_RATE / 2
        rate = (LEAST_RATE + left * (MOST_RATE - LEAST_RATE)) / 2
        alpha = jnp.exp(log_alpha)
        # 1 - alpha^2 without the loss of digits near the data.
        sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
        return Scales(alpha, sigma, alpha * rate, -(alpha**2) * rate / sigma)

    def noised(self, data: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """x_t: data and unit noise [B, ...], times [B]."""
        data = wide(data)
        at = self._scales(times, data)
        return at.alpha * data + at.sigma * noise

    def prediction(
        self, output: jax.Array, noised: jax.Array, times: jax.Array
    ) -> Prediction:
        """What an output [B, ..., channels] says about `noised` at `times`.

        Entries that a path does not have at an end are infinite or NaN there: the score
        at t = 1, and the data that a noise or a score speaks of at t = 0.

        Raises:
            ValueError: if the output has another number of channels.
        """
        noised = wide(noised)
        check_output("Flow", output, noised, noised.shape[-1])
        output = wide(output)
        at = self._scales(times, noised)
        if self.target == "velocity":
            velocity = output
            data = (at.sigma * velocity - at.d_sigma * noised) / at.turn
            noise = (at.d_alpha * noised - at.alpha * velocity) / at.turn
        else:
            noise = output if self.target == "noise" else -at.sigma * output
            data = (noised - at.sigma * noise) / at.alpha
            velocity = at.d_alpha * data + at.d_sigma * noise
        score = output if self.target == "score" else -noise / at.sigma
        return Prediction(
            data=data, noise=noise, velocity=velocity, score=score, log_variance=None
        )

    def losses(
        self,
        output: jax.Array,
        *,
        data: jax.Array,
        noise: jax.Array,
        noised: jax.Array,
        times: jax.Array,
    ) -> dict[str, jax.Array]:
        """Losses of each row, float32 [B].

        Returns:
            "mse" (mean over an image of the squared error of the velocity, of the
            noise, or of sigma times the score), and "loss", that times the weighting.
        """
        data, noise = wide(data), wide(noise)
        check_output("Flow", output, noised, noised.shape[-1])
        output = wide(output)
        at = self._scales(times, data)
        if self.target == "velocity":
            error = output - (at.d_alpha * data + at.d_sigma * noise)
        elif self.target == "noise":
            error = output - noise
        else:
            error = at.sigma * output + noise
        mse = row_means(error**2)
        return {"loss": self._weight(times) * mse, "mse": mse}

    def _weight(self, times: jax.Array) -> jax.Array:
        if self.weighting == "none":
            return jnp.ones_like(times)
        at = self.scales(times)
        if self.weighting == "velocity":
            return (at.pull / at.sigma) ** 2
        return at.pull / at.sigma**2

    def _scales(self, times: jax.Array, like: jax.Array) -> Scales:
        """The path at times [B], [B, 1, ...]."""
        return self.scales(column(times.astype(like.dtype), like))
