"""Dropout of entries and of whole rows, as functions."""

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


def drop_path(x: jax.Array, rate: jax.Array | float, *, prng_key) -> jax.Array:
    """Zero a `rate` of the rows of x [B, ...] and scale the rest by 1 / (1 - rate).

    Args:
        x: what a residual branch adds.
        rate: probability in [0, 1), float32 scalar, traced or not.
        prng_key: decides which rows.

    Raises:
        ValueError: when the key is missing.
    """
    if prng_key is None:
        raise ValueError("drop_path: needs a prng_key; got None.")
    keep = jax.random.uniform(prng_key, (x.shape[0],)) >= rate
    factor = jnp.where(keep, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)
    return x * factor.reshape(-1, *(1,) * (x.ndim - 1))
