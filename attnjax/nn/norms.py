"""RMSNorm and LayerNorm, computed in float32 (or float64) whatever comes in."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from attnjax.core.errors import unknown
from attnjax.nn.parameter import param


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: jax.Array, scale: jax.Array | None, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; dtype of x.

    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    wide = _wide(x)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(y.dtype)
    return y.astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, *, eps: float
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis; dtype of x.

    Source: Ba, Kiros and Hinton, arXiv 1607.06450, eq. 4.
    """
    wide = _wide(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps)
    if scale is not None:
        y = y * scale.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(x.dtype)


def _scale(rngs, dim: int, zero_centered: bool, dtype) -> nnx.Param:
    start = initializers.zeros if zero_centered else initializers.ones
    return param(rngs, (dim,), start, dtype=dtype)


def _whole(scale: nnx.Param | None, zero_centered: bool) -> jax.Array | None:
    """The factor itself, of a stored scale."""
    if scale is None:
        return None
    return 1.0 + _wide(scale[...]) if zero_centered else scale[...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a learned scale.

    Args:
        zero_centered: the scale is stored as its difference from 1, so that weight
            decay draws it to 1 and not to 0 (as Gemma and Qwen3-Next have it).
        learned: False leaves out the scale (and a bias).
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        use_bias: bool = False,
        zero_centered: bool = False,
        learned: bool = True,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if use_bias:
            raise ValueError("RMSNorm: has no bias; got use_bias=True. Use LayerNorm.")
        self.eps, self.zero_centered = eps, zero_centered
        self.scale = _scale(rngs, dim, zero_centered, param_dtype) if learned else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim]."""
        scale = _whole(self.scale, self.zero_centered)
        return rms_norm(x, scale, eps=self.eps)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with a learned scale and, if asked, a bias.

    Args:
        zero_centered, learned: as in `RMSNorm`.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        use_bias: bool = True,
        zero_centered: bool = False,
        learned: bool = True,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps, self.zero_centered = eps, zero_centered
        self.scale = _scale(rngs, dim, zero_centered, param_dtype) if learned else None
        self.bias = (
            param(rngs, (dim,), initializers.zeros, dtype=param_dtype)
            if use_bias and learned
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim]."""
        bias = None if self.bias is None else self.bias[...]
        scale = _whole(self.scale, self.zero_centered)
        return layer_norm(x, scale, bias, eps=self.eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(
    name: str,
    dim: int,
    *,
    eps: float,
    use_bias: bool = False,
    zero_centered: bool = False,
    learned: bool = True,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """The norm called `name` ("rms" or "layer"); a bias only where the kind has one."""
    if name not in NORMS:
        raise unknown("config.model.norm", "norm", name, NORMS)
    has_bias = use_bias and name == "layer"
    return NORMS[name](
        dim,
        eps=eps,
        use_bias=has_bias,
        zero_centered=zero_centered,
        learned=learned,
        param_dtype=param_dtype,
        rngs=rngs,
    )
