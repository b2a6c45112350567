"""What both noising processes share: the prediction, and rows against images."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network's output says about a noised batch, float32 [B, ..., channels].

    Attributes:
        data: estimate of the clean data.
        noise: estimate of the unit noise in it.
        velocity: estimate of dx_t/dt (flows), or None.
        score: estimate of the gradient of log p_t at the noised batch; infinite where
            no noise is left.
        log_variance: of one step back (Gaussian), broadcasts against `data`, or None.
    """

    data: jax.Array
    noise: jax.Array
    velocity: jax.Array | None
    score: jax.Array
    log_variance: jax.Array | None


def wide(array: jax.Array) -> jax.Array:
    """`array` in float32, or in float64 if it is."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def column(values: jax.Array, like: jax.Array) -> jax.Array:
    """One number a row [B] as [B, 1, ...], of as many axes as `like`."""
    return jnp.reshape(values, values.shape + (1,) * (like.ndim - values.ndim))


def row_means(array: jax.Array) -> jax.Array:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return jnp.mean(array, axis=tuple(range(1, array.ndim)))


def check_output(owner: str, output: jax.Array, noised: jax.Array, channels: int):
    """Refuse an output that would broadcast against the noised batch by accident."""
    wanted = (*noised.shape[:-1], channels)
    if output.shape != wanted:
        raise ValueError(
            f"{owner}: output must have the shape of noised with {channels} channels, "
            f"{wanted}; got output of shape {output.shape}. Give the network that many "
            "output channels, or drop those it has too many."
        )
