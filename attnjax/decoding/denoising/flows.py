"""Samplers of flows: the ODE by Euler, Heun or adaptive steps, and the SDE by
Euler-Maruyama or by Heun steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.decoding.denoising import adaptive
from attnjax.decoding.denoising.draws import normal, split
from attnjax.tasks.denoising import Flow
from attnjax.tasks.denoising.flow import Scales
from attnjax.tasks.denoising.sampling import Settings

Denoise = Callable[[jax.Array, jax.Array], jax.Array]

# w(t) of the SDE, by its name: of the path's scales at t, and t.
DIFFUSION: dict[str, Callable[[Scales, jax.Array], jax.Array]] = {
    "constant": lambda at, t: jnp.ones_like(t),
    "sigma": lambda at, t: at.sigma,
    "linear": lambda at, t: 1 - t,
    "sbdm": lambda at, t: at.pull,
    "decreasing": lambda at, t: (jnp.cos(np.pi * t) + 1) ** 2 / 4,
    "increasing_decreasing": lambda at, t: jnp.sin(np.pi * t) ** 2,
}


def ode(
    denoise: Denoise, flow: Flow, settings: Settings, *, start: jax.Array
) -> jax.Array:
    """dx = v dt from the noise to the data, in `num_steps` equal steps.

    Source: Ma et al. (SiT), arXiv 2401.08740, equation 2. Differs: their code's
    num_steps counts times, one more than steps.

    Args:
        denoise: (x, times [B] of x's dtype) -> the network's output.
        start: pure noise [B, ...].

    Returns:
        Data, like `start`.
    """
    first, last = flow.interval(sampling=True)
    ends = np.linspace(first, last, settings.num_steps + 1)
    size = (last - first) / settings.num_steps

    def velocity(x, t):
        return _guess(denoise, flow, x, t).velocity

    def euler(x, now):
        return x + size * velocity(x, now[0]), None

    def heun(x, now):
        slope = velocity(x, now[0])
        ahead = velocity(x + size * slope, now[1])
        return x + size / 2 * (slope + ahead), None

    times = (jnp.asarray(ends[:-1], start.dtype), jnp.asarray(ends[1:], start.dtype))
    body = heun if settings.sampler == "heun" else euler
    return jax.lax.scan(body, start, times)[0]


def adaptive_ode(
    denoise: Denoise, flow: Flow, settings: Settings, *, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dx = v dt from the noise to the data by `adaptive.dopri5`, which finds its steps.

    Source: Ma et al. (SiT), arXiv 2401.08740, section 4, and their code's tolerances.
    Differs: their last step may pass the end and is brought back by interpolation;
    here it ends there.

    Args:
        denoise, start: as in `ode`.

    Returns:
        Data, like `start`, NaN where `num_steps` tried steps did not suffice, and how
        often the network was evaluated, int32.
    """
    first, last = flow.interval(sampling=True)
    atol = 1e-6 if settings.atol is None else settings.atol
    rtol = 1e-3 if settings.rtol is None else settings.rtol
    return adaptive.dopri5(
        lambda x, t: _guess(denoise, flow, x, t).velocity,
        start,
        first=first,
        last=last,
        atol=atol,
        rtol=rtol,
        max_steps=settings.num_steps,
    )


def sde(
    denoise: Denoise,
    flow: Flow,
    settings: Settings,
    *,
    start: jax.Array,
    prng_key: jax.Array,
) -> jax.Array:
    """dx = (v + w s) dt + sqrt(2 w) dW, then one step to the end without noise.

    num_steps - 1 steps of equal size, and the last step of `last_step_size`. A step is
    one of Euler-Maruyama, or of "sde_heun": the noise is added first, then a Heun step
    of the drift from there.
    Source: Ma et al. (SiT), arXiv 2401.08740, equation 4, and their code's sampling of
    the SDE. Differs: nothing.

    Args:
        denoise, start: as in `ode`.
    """
    first, last = settings.sde_interval(flow)
    times = np.linspace(first, last, settings.num_steps)
    size = times[1] - times[0]
    form = DIFFUSION[settings.diffusion or "sigma"]

    def drift(x, t):
        guess = _guess(denoise, flow, x, t)
        diffusion = form(flow.scales(t), t)
        return guess, guess.velocity + diffusion * guess.score, diffusion

    def euler(x, now):
        t, key = now
        _, slope, diffusion = drift(x, t)
        noise = normal(key, x.shape, x.dtype)
        return x + size * slope + jnp.sqrt(2 * diffusion * size) * noise, None

    def heun(x, now):
        t, key = now
        diffusion = form(flow.scales(t), t)
        noise = normal(key, x.shape, x.dtype)
        x = x + jnp.sqrt(2 * diffusion * size) * noise
        slope = drift(x, t)[1]
        ahead = drift(x + size * slope, t + size)[1]
        return x + size / 2 * (slope + ahead), None

    keys = split(prng_key, settings.num_steps - 1)
    steps = (jnp.asarray(times[:-1], start.dtype), keys)
    body = heun if settings.sampler == "sde_heun" else euler
    x = jax.lax.scan(body, start, steps)[0]
    guess, slope, _ = drift(x, jnp.asarray(last, x.dtype))
    if settings.last_step == "tweedie":
        # x/alpha + sigma^2/alpha score is the estimate of the data.
        return guess.data
    slope = guess.velocity if settings.last_step == "euler" else slope
    return x + (1.0 - last) * slope


def _guess(denoise, flow, x, t):
    """The flow's prediction at one time for all rows."""
    times = jnp.broadcast_to(t, (x.shape[0],))
    return flow.prediction(denoise(x, times), x, times)
