"""Dropout as a function."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, *, prng_key, train: bool) -> jax.Array:
    """Zero a `rate` of the entries of x and scale the rest by 1 / (1 - rate).

    Args:
        x: any shape.
        rate: probability in [0, 1); 0 returns x itself.
        prng_key: needed when `train` and rate > 0.
        train: False returns x itself.

    Raises:
        ValueError: when a key is needed and missing.
    """
    if not train or rate == 0.0:
        return x
    if prng_key is None:
        raise ValueError(
            f"dropout: needs a prng_key when training; got rate={rate}, None."
        )
    keep = jax.random.bernoulli(prng_key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
