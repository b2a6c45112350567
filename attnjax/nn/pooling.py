"""One vector for a set of tokens."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from attnjax.nn.linear import Linear
from attnjax.nn.parameter import param


class AttentivePool(nnx.Module):
    """M learned queries attend to the raw tokens; each pools its own channels.

    y_j = softmax_n(q_j . x_n / sqrt(C)) (x W)_j, where (x W)_j is the j-th of M equal
    blocks of the E channels of x W; y joins the blocks. There is no map of keys,
    queries or output. The scale is that of the whole width C.

    Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing for Masked
    Image Modeling", arXiv 2506.10178 (efficient probing).

    Parameters: query [M, C], value [C, E].

    Args:
        dim: C.
        queries: M, which divides E.
        out_dim: E (None: C).
        query_std, value_std: of their first values (value_std None: 1 / sqrt(C)).
    """

    def __init__(
        self,
        dim: int,
        queries: int,
        *,
        out_dim: int | None = None,
        query_std: float = 0.02,
        value_std: float | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        out_dim = dim if out_dim is None else out_dim
        if queries < 1 or out_dim % queries:
            raise ValueError(
                "AttentivePool: queries must divide out_dim; got "
                f"queries={queries}, out_dim={out_dim}."
            )
        self.dtype = jnp.dtype(dtype)
        start = initializers.normal(query_std)
        self.query = param(rngs, (queries, dim), start, dtype=param_dtype)
        self.value = Linear(
            dim,
            out_dim,
            std=dim**-0.5 if value_std is None else value_std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def weights(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, N, C] -> float32 (or wider) [B, M, N], rows sum to 1.

        Args:
            mask: bool [B, N], the tokens that count; None for all.
        """
        query = self.query[...].astype(self.dtype)
        scores = jnp.einsum("mc,bnc->bmn", query, x.astype(self.dtype))
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        scores = scores * x.shape[-1] ** -0.5
        where = None if mask is None else mask[:, None, :]
        return jax.nn.softmax(scores, axis=-1, where=where)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, N, C] -> [B, E] in the compute dtype; mask as in `weights`."""
        weights = self.weights(x, mask).astype(self.dtype)
        value = self.value(x)
        blocks = value.reshape(*value.shape[:2], weights.shape[1], -1)
        return jnp.einsum("bmn,bnme->bme", weights, blocks).reshape(len(x), -1)
