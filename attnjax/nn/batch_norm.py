"""Batch norm: without factors before the head of a probe, with them in MBConvs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from attnjax.nn.parameter import buffer, param


def batch_statistics(dim: int) -> dict[str, jax.Array]:
    """Running "mean" and "variance", float32 [C], before the first batch."""
    return {"mean": jnp.zeros(dim), "variance": jnp.ones(dim)}


def batch_norm(
    x: jax.Array,
    running: dict[str, jax.Array],
    *,
    train: bool,
    eps: float = 1e-6,
    momentum: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(x - mean) / sqrt(variance + eps) of each channel over the batch.

    Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1 and 2, without gamma and
    beta. The epsilon, and no factors, are those of arXiv 2506.10178's probes.

    Args:
        x: [B, C]; the batch is the global one, on however many devices it lies.
        running: as from `batch_statistics`.
        train: statistics of this batch, else the running ones.
        eps: added to the variance.
        momentum: share of this batch in the new running statistics.

    Returns:
        [B, C] in the dtype of x, computed in float32 or wider, and the new running
        statistics (the old ones without `train`). Their variance is that of a sample:
        times B / (B - 1).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, variance = running["mean"], running["variance"]
    if train:
        mean = jnp.mean(wide, axis=0)
        variance = jnp.mean(jnp.square(wide - mean), axis=0)
        sample = variance * (len(x) / max(len(x) - 1, 1))
        now = {"mean": mean, "variance": sample}
        running = jax.tree.map(
            lambda old, new: ((1 - momentum) * old + momentum * new).astype(old.dtype),
            running,
            jax.lax.stop_gradient(now),
        )
    y = (wide - mean) * jax.lax.rsqrt(variance + eps)
    return y.astype(x.dtype), running


class BatchNorm(nnx.Module):
    """Batch norm over the last axis with a learned scale and bias.

    Parameters: `scale` [C] (one at the start) and `bias` [C] (zero). Buffers: the
    running `mean` and `variance` [C], float32 or wider.

    Args:
        dim: C.
        eps: added to the variance.
        momentum: share of a batch in the new running statistics.
        dtype: compute dtype of the model; a float64 one has float64 buffers.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-3,
        momentum: float = 0.01,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps, self.momentum = eps, momentum
        self.scale = param(rngs, (dim,), initializers.ones, dtype=param_dtype)
        self.bias = param(rngs, (dim,), initializers.zeros, dtype=param_dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        start = batch_statistics(dim)
        self.mean = buffer(start["mean"].astype(wide))
        self.variance = buffer(start["variance"].astype(wide))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[..., C] -> the same, every place of every row one of the batch; in training
        the buffers move on."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        running = {"mean": self.mean[...], "variance": self.variance[...]}
        y, running = batch_norm(
            wide.reshape(-1, x.shape[-1]),
            running,
            train=train,
            eps=self.eps,
            momentum=self.momentum,
        )
        if train:
            self.mean.set_value(running["mean"])
            self.variance.set_value(running["variance"])
        y = y * self.scale[...].astype(y.dtype) + self.bias[...].astype(y.dtype)
        return y.reshape(x.shape).astype(x.dtype)
