"""Samplers of Gaussian chains: ancestral (DDPM) and implicit (DDIM) steps back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.decoding.denoising.draws import normal, split
from attnjax.tasks.denoising import Gaussian
from attnjax.tasks.denoising.chain import Chain
from attnjax.tasks.denoising.sampling import Settings

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def ddpm(
    denoise: Denoise,
    process: Gaussian,
    settings: Settings,
    *,
    start: jax.Array,
    prng_key: jax.Array,
) -> jax.Array:
    """Ancestral sampling of p(x_{k-1} | x_k) over a respaced chain.

    The mean is that of q(x_{k-1} | x_k, x_0) at the estimate of x_0; the variance, a
    learned one too, lies between the bounds of the respaced chain's own steps.
    Source: Ho et al., arXiv 2006.11239, algorithm 2; Nichol and Dhariwal, arXiv
    2102.09672, section 4. Differs: nothing.

    Args:
        denoise: (x, times int32 [B]) -> the network's output; times are those of the
            chain that was trained.
        start: pure noise [B, ...].

    Returns:
        Data, like `start`.
    """
    tables = process.respaced(settings.num_steps)

    def step(x, entry, prng_key):
        data, _, code = _estimate(denoise, process, settings, x, entry)
        mean = entry["data_weight"] * data + entry["noised_weight"] * x
        log_variance = process.log_variance(
            code, log_beta=entry["log_beta"], posterior=entry["posterior_log_variance"]
        )
        noise = normal(prng_key, x.shape, x.dtype)
        return mean + jnp.where(
            entry["is_last"], 0, jnp.exp(0.5 * log_variance) * noise
        )

    names = ("data_weight", "noised_weight", "log_beta", "posterior_log_variance")
    entries = {name: getattr(tables, name) for name in names}
    return _back(step, tables, entries, start, prng_key)


def ddim(
    denoise: Denoise,
    process: Gaussian,
    settings: Settings,
    *,
    start: jax.Array,
    prng_key: jax.Array,
) -> jax.Array:
    """Implicit sampling: x_{k-1} from the estimates of x_0 and of the noise in x_k.

    x_{k-1} = sqrt(a') x_0 + sqrt(1 - a' - s^2) eps + s z, with a' = alpha_bar_{k-1} and
    s = eta sqrt((1 - a') / (1 - a) (1 - a / a')). A learned variance is not used.
    Source: Song et al., arXiv 2010.02502, equations 12 and 16. Differs: nothing; the
    steps are spaced as ddpm's.

    Args:
        denoise, start: as in `ddpm`.
    """
    tables = process.respaced(settings.num_steps)
    kept, before = tables.alpha_bar, tables.alpha_bar_before
    spread = (settings.eta or 0.0) * np.sqrt(
        (1 - before) / (1 - kept) * (1 - kept / before)
    )
    entries = {
        "signal": np.sqrt(before),
        # With eta = 1 the rounding may leave less than nothing.
        "kept_noise": np.sqrt(np.maximum(1 - before - spread**2, 0)),
        "new_noise": spread,
    }

    def step(x, entry, prng_key):
        data, noise, _ = _estimate(denoise, process, settings, x, entry)
        x = entry["signal"] * data + entry["kept_noise"] * noise
        if not settings.eta:
            return x
        return x + entry["new_noise"] * normal(prng_key, x.shape, x.dtype)

    return _back(step, tables, entries, start, prng_key)


def _estimate(denoise, process, settings, x, entry):
    """Estimates of the data and of the noise in x, and the code of the variance."""
    times = jnp.full((x.shape[0],), entry["time"])
    output = denoise(x, times)
    guess = process.prediction(output, x, times)
    code = process.split(output, x)[1]
    if settings.clip is None:
        return guess.data, guess.noise, code
    # The noise that goes with what the data are limited to.
    data = jnp.clip(guess.data, -settings.clip, settings.clip)
    kept, spread = entry["root_kept"], entry["root_left"]
    return data, (x - kept * data) / spread, code


def _back(step, tables: Chain, entries: dict, start: jax.Array, prng_key: jax.Array):
    """Scan `step(x, entry, prng_key)` from the last step of the chain to the first."""
    roots = {
        "root_kept": np.sqrt(tables.alpha_bar),
        "root_left": np.sqrt(1 - tables.alpha_bar),
    }
    columns = {
        name: jnp.asarray(values[::-1], start.dtype)
        for name, values in (entries | roots).items()
    }
    columns["time"] = jnp.asarray(tables.times[::-1])
    columns["is_last"] = jnp.arange(len(tables))[::-1] == 0
    keys = split(prng_key, len(tables))

    def body(x, now):
        entry, key = now
        return step(x, entry, key), None

    return jax.lax.scan(body, start, (columns, keys))[0]
