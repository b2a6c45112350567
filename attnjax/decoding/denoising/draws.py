"""Random draws by one key for a batch, or by a key for each of its rows."""

import jax
import jax.numpy as jnp


def normal(prng_key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Unit normal `shape` = [B, ...]; row b of keys [B] is drawn by key b alone."""
    if prng_key.ndim == 0:
        return jax.random.normal(prng_key, shape, dtype)
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:], dtype))(prng_key)


def split(prng_key: jax.Array, count: int) -> jax.Array:
    """Keys [count] of one key, or [count, B] of keys [B]."""
    if prng_key.ndim == 0:
        return jax.random.split(prng_key, count)
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(prng_key)
