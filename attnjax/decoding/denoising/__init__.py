"""Drawing samples from a noising process with any network that denoises."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.core.errors import UserError
from attnjax.decoding.denoising import chains, flows
from attnjax.decoding.denoising.draws import normal, split
from attnjax.tasks.denoising import Flow, Gaussian
from attnjax.tasks.denoising.sampling import SAMPLERS, Settings

__all__ = ["SAMPLERS", "Settings", "sample"]


def sample(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    process: Gaussian | Flow,
    *,
    shape: tuple[int, ...],
    prng_key: jax.Array,
    sampler: str,
    num_steps: int,
    start: jax.Array | None = None,
    return_evaluations: bool = False,
    **options,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Samples of a noising process, as one scan over its steps.

    Traceable: under `jax.jit`, with the network's parameters among the arguments, the
    whole sampler is one program. Equal keys give equal samples.

    Args:
        denoise: (x [B, ..., channels], times [B]) -> the network's raw output; times
            are int32 for a Gaussian, floats in [0, 1] for a flow, before `embedded`.
        process: what the network was trained on.
        shape: [B, ..., channels] of the samples.
        prng_key: of the first noise and of that of each step: one key, or typed keys
            [B], one a row, with which a row does not depend on its batch (but with
            dopri5, whose steps rows share).
        sampler, num_steps, options: the fields of `Settings`.
        start: the first noise instead of a draw, `shape`.
        return_evaluations: also return how often the network was evaluated, int32.

    Returns:
        [B, ..., channels], float32 (float64 for a `start` in float64).

    Raises:
        UserError: for options that make no sense, or that the process does not have.
    """
    settings = Settings(sampler=sampler, num_steps=num_steps, **options)
    settings.check(process)
    if prng_key.shape not in ((), tuple(shape)[:1]):
        raise UserError(
            "sample: prng_key must be one typed key, or one a row; got keys of shape "
            f"{prng_key.shape} for samples of shape {tuple(shape)}. Make them by "
            "jax.random.key."
        )
    start_key, steps_key = split(prng_key, 2)
    if start is None:
        start = normal(start_key, tuple(shape))
    elif start.shape != tuple(shape):
        raise UserError(
            f"sample: start must have the shape of the samples, {tuple(shape)}; "
            f"got start of shape {start.shape}. Give noise of that shape."
        )
    given = (denoise, process, settings)
    if sampler == "dopri5":
        found = flows.adaptive_ode(*given, start=start)
    elif sampler in ("euler", "heun"):
        found = flows.ode(*given, start=start), jnp.int32(settings.evaluations())
    else:
        draw = {"ddpm": chains.ddpm, "ddim": chains.ddim}.get(sampler, flows.sde)
        x = draw(*given, start=start, prng_key=steps_key)
        found = x, jnp.int32(settings.evaluations())
    return found if return_evaluations else found[0]
