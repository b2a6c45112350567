"""A table of vectors, looked up by token or used as the output head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from attnjax.nn.linear import rows_times
from attnjax.nn.parameter import param


class Embedding(nnx.Module):
    """A [V, C] table.

    Args:
        size: V.
        dim: C.
        std: standard deviation of its normal initialisation.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.table = param(
            rngs, (size, dim), initializers.normal(std), dtype=param_dtype
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int [...] -> [..., C] in the compute dtype."""
        return jnp.take(self.table[...], ids, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., C] -> logits [..., V] with the table as the (tied) output head."""
        return rows_times(x.astype(self.dtype), self.table[...].astype(self.dtype).T)
