"""Batch norm without factors: what stands before the head of a probe."""

import jax
import jax.numpy as jnp


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
