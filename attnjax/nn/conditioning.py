"""What tells a network the time and the condition of a denoising step."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax.nn.linear import Linear


def time_features(times: jax.Array, dim: int, *, period: float = 10000.0) -> jax.Array:
    """Times [B] -> float32 (or wider) [B, dim]: cos, then sin, of t f_i, with
    f_i = period^(-i / (dim / 2)).

    Source: Ho et al., arXiv 2006.11239, section 4, in the order of Dhariwal and
    Nichol, arXiv 2105.05233.
    """
    if dim % 2:
        raise ValueError(f"time_features: dim must be even; got dim={dim}.")
    times = jnp.asarray(times)
    wide = times.astype(jnp.promote_types(times.dtype, jnp.float32))
    half = dim // 2
    frequency = jnp.exp(-math.log(period) / half * jnp.arange(half, dtype=wide.dtype))
    angle = wide[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Times [B] -> [B, C]: two linear maps of `time_features` with SiLU between.

    Source: Peebles and Xie, arXiv 2212.09748, section 3.2.

    Args:
        dim: C.
        features: width of the features.
        std: of the first weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        features: int = 256,
        std: float = 0.02,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = dict(
            use_bias=True, std=std, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.features = features
        self.hidden = Linear(features, dim, **stored)
        self.out = Linear(dim, dim, **stored)

    def __call__(self, times: jax.Array) -> jax.Array:
        """[B] -> [B, C] in the compute dtype."""
        hidden = self.hidden(time_features(times, self.features))
        return self.out(jax.nn.silu(hidden))


class Modulation(nnx.Module):
    """Shifts, scales and gates from a condition: a linear map of its SiLU.

    All of it is 0 at the start, so that a gated sub-layer adds nothing (adaLN-Zero).
    Source: Peebles and Xie, arXiv 2212.09748, section 3.2.

    Args:
        dim: C.
        parts: how many vectors of C it makes.
    """

    def __init__(
        self,
        dim: int,
        parts: int,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.parts = parts
        self.linear = Linear(
            dim,
            parts * dim,
            use_bias=True,
            std=0.0,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        """[B, C] -> `parts` arrays [B, 1, C]."""
        made = self.linear(jax.nn.silu(condition))
        return jnp.split(made[:, None], self.parts, axis=-1)


def shifted(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift; dtype of x."""
    return x * (1 + scale).astype(x.dtype) + shift.astype(x.dtype)
