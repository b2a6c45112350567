"""Denoising diffusion: a chain of Gaussian steps, its losses and its predictions."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.tasks.denoising.chain import Chain, betas, chain, respaced
from attnjax.tasks.denoising.common import (
    Prediction,
    check_output,
    column,
    row_means,
    wide,
)

# Half the width of a bin: data are taken for bytes that were scaled to [-1, 1].
HALF_BIN = 1 / 255
# Data beyond it are the outermost bytes, whose bins are open.
OUTERMOST = 0.999
SMALLEST_SHARE = 1e-12


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps for t = 0..steps-1, a_t = prod(1 - b).

    Static and hashable; the tables are float64 numpy and are used as float32 (float64
    for float64 arrays). Channels are the last axis.
    Source: Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672; Peebles
    and Xie, arXiv 2212.09748, and their code. Differs: the decoder's normal CDF is
    exact where their code has a tanh approximation.

    Attributes:
        steps: number of steps, >= 2.
        schedule: "linear" (for more than 20 steps) or "cosine", see `chain.betas`.
        target: what the network predicts: "eps", "x0", or
            "v" = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans and Ho, arXiv 2202.00512).
        learn_sigma: the network has as many channels again, the code f of the variance
            of a step back: log var = (f + 1)/2 log b_t + (1 - f)/2 log b~_t. They
            are learned by the variational bound, which leaves the mean alone.
        vlb_weight: of the bound, in bits per dimension, beside the mean squared error.
        variance: without `learn_sigma`, the variance of a step back: "posterior" (None
            means that) or "beta".

    Raises:
        ValueError: for values out of range, or that would have no effect.
    """

    steps: int = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    target: Literal["eps", "v", "x0"] = "eps"
    learn_sigma: bool = True
    vlb_weight: float = 1.0
    variance: Literal["posterior", "beta"] | None = None

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2; got steps={self.steps}.")
        _one_of("schedule", self.schedule, ("linear", "cosine"))
        _one_of("target", self.target, ("eps", "v", "x0"))
        if not self.vlb_weight > 0:
            raise ValueError(
                f"vlb_weight must be positive; got vlb_weight={self.vlb_weight}. "
                "learn_sigma=False learns no variance."
            )
        if not self.learn_sigma and self.vlb_weight != 1.0:
            raise ValueError(
                "vlb_weight has no effect with learn_sigma=False; got vlb_weight="
                f"{self.vlb_weight}. Leave it out."
            )
        if self.variance is not None:
            _one_of("variance", self.variance, ("posterior", "beta"))
            if self.learn_sigma:
                raise ValueError(
                    "variance is learned with learn_sigma=True; got variance="
                    f"{self.variance}. Leave it out or give learn_sigma=False."
                )
        # Refuses a schedule that these steps cannot have.
        betas(self.schedule, self.steps)

    @functools.cached_property
    def tables(self) -> Chain:
        """The chain of all steps."""
        return chain(betas(self.schedule, self.steps))

    def respaced(self, num_steps: int) -> Chain:
        """The chain over `num_steps` (2 to `steps`) of the steps."""
        return respaced(self.tables, num_steps)

    def sample_times(self, prng_key: jax.Array, batch: int) -> jax.Array:
        """int32 [batch], uniform over 0..steps-1."""
        return jax.random.randint(prng_key, (batch,), 0, self.steps, jnp.int32)

    def embedded(self, times: jax.Array) -> jax.Array:
        """float32 [B], what the time embedding is given: the step's number."""
        return times.astype(jnp.float32)

    def level(self, times: jax.Array) -> jax.Array:
        """float32 [B], t / (steps - 1): 0 nearly clean, 1 nearly pure noise."""
        return times.astype(jnp.float32) / (self.steps - 1)

    def output_channels(self, channels: int) -> int:
        """Channels of the network's output for data of `channels`."""
        return channels * (2 if self.learn_sigma else 1)

    def noised(self, data: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """A draw of q(x_t | x_0): data and unit noise [B, ...], times int32 [B]."""
        data = wide(data)
        signal, spread = self._scales(times, data)
        return signal * data + spread * noise

    def prediction(
        self, output: jax.Array, noised: jax.Array, times: jax.Array
    ) -> Prediction:
        """What an output [B, ..., output_channels] says about `noised` at `times`.

        `log_variance` is that of one step of the chain of all steps.

        Raises:
            ValueError: if the output has another number of channels.
        """
        noised = wide(noised)
        value, code = self.split(output, noised)
        signal, spread = self._scales(times, noised)
        if self.target == "eps":
            data, noise = (noised - spread * value) / signal, value
        elif self.target == "v":
            data = signal * noised - spread * value
            noise = spread * noised + signal * value
        else:
            data, noise = value, (noised - signal * value) / spread
        log_variance = self.log_variance(
            code,
            log_beta=self._table(self.tables.log_beta, times, noised),
            posterior=self._table(self.tables.posterior_log_variance, times, noised),
        )
        return Prediction(
            data=data,
            noise=noise,
            velocity=None,
            score=-noise / spread,
            log_variance=log_variance,
        )

    def split(self, output: jax.Array, noised: jax.Array):
        """The predicted part of an output, and the code of the variance or None."""
        channels = noised.shape[-1]
        check_output("Gaussian", output, noised, self.output_channels(channels))
        output = wide(output)
        if not self.learn_sigma:
            return output, None
        return output[..., :channels], output[..., channels:]

    def log_variance(
        self, code: jax.Array | None, *, log_beta: jax.Array, posterior: jax.Array
    ) -> jax.Array:
        """log variance of a step back between its two bounds; `code` is not squashed.

        Source: Nichol and Dhariwal, arXiv 2102.09672, equation 15.
        """
        if code is not None:
            share = (code + 1) / 2
            return share * log_beta + (1 - share) * posterior
        return log_beta if self.variance == "beta" else posterior

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
            "mse" (mean over an image of the squared error of the target), with
            `learn_sigma` "vlb" (bits per dimension: the divergence of the step back
            from q(x_{t-1} | x_t, x_0), at t = 0 the negative log likelihood of bytes),
            and "loss" = mse + vlb_weight vlb.
        """
        data, noise, noised = wide(data), wide(noise), wide(noised)
        value, code = self.split(output, noised)
        wanted = {"eps": noise, "x0": data}.get(self.target)
        if wanted is None:
            signal, spread = self._scales(times, data)
            wanted = signal * noise - spread * data
        mse = row_means((wanted - value) ** 2)
        if code is None:
            return {"loss": mse, "mse": mse}
        # The bound trains the variance alone.
        frozen = jnp.concatenate([jax.lax.stop_gradient(value), code], axis=-1)
        guess = self.prediction(frozen, noised, times)
        vlb = self._bound(guess, data, times)
        return {"loss": mse + self.vlb_weight * vlb, "mse": mse, "vlb": vlb}

    def _bound(self, guess: Prediction, data: jax.Array, times: jax.Array):
        """[B] bits per dimension of one term of the variational bound."""
        # The means' parts from x_t are the same and cancel.
        weight = self._table(self.tables.data_weight, times, data)
        nats = normal_kl(
            weight * (data - guess.data),
            self._table(self.tables.posterior_log_variance, times, data),
            guess.log_variance,
        )
        # Step 0 ends at the data itself: its mean is the estimate of x_0.
        decoder = bin_nll(data, mean=guess.data, log_std=guess.log_variance / 2)
        nats = jnp.where(column(times == 0, data), decoder, nats)
        return row_means(nats) / np.log(2.0)

    def _scales(self, times: jax.Array, like: jax.Array):
        """sqrt(a_t) and sqrt(1 - a_t) for the rows of `like`."""
        kept = self.tables.alpha_bar
        signal = self._table(np.sqrt(kept), times, like)
        return signal, self._table(np.sqrt(1 - kept), times, like)

    def _table(self, values: np.ndarray, times: jax.Array, like: jax.Array):
        """The entries of a table [steps] at times [B], [B, 1, ...]."""
        return column(jnp.asarray(values, like.dtype)[times], like)


def _one_of(name: str, value: str, known: tuple[str, ...]):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


def normal_kl(
    gap: jax.Array, log_variance: jax.Array, other_log_variance: jax.Array
) -> jax.Array:
    """KL(N(m, v) || N(m', v')) in nats, with gap = m - m', elementwise."""
    ratio = log_variance - other_log_variance
    return 0.5 * (jnp.exp(ratio) - 1 - ratio + gap**2 * jnp.exp(-other_log_variance))


def bin_nll(data: jax.Array, *, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """-log of the share of N(mean, std) in the bin of each byte, nats, elementwise.

    Bytes lie on [-1, 1], bins are 2/255 wide and the outermost are open. Shares below
    1e-12 count as that, and then have no gradient.
    Source: Ho et al., arXiv 2006.11239, equation 13.
    """
    scale = jnp.exp(-log_std)
    centred = data - mean
    # In the lower tail, where a difference of two CDFs keeps its digits.
    below = -jnp.abs(centred)
    ndtr = jax.scipy.special.ndtr
    share = ndtr(scale * (below + HALF_BIN)) - ndtr(scale * (below - HALF_BIN))
    first = ndtr(scale * (centred + HALF_BIN))
    last = ndtr(-scale * (centred - HALF_BIN))
    share = jnp.where(data < -OUTERMOST, first, share)
    share = jnp.where(data > OUTERMOST, last, share)
    return -jnp.log(jnp.maximum(share, SMALLEST_SHARE))
