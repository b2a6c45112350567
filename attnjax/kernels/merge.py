"""Joining attention over disjoint sets of keys into attention over all of them."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from attnjax.kernels.weight_maps import Softmax, WeightMap

PLAIN = Softmax()


def merge(
    parts: Sequence[tuple[jax.Array, jax.Array | None]],
    *,
    weight_map: WeightMap = PLAIN,
    operands: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Outputs over parts of the keys, joined as if the keys had been together.

    A map that divides by a sum merges by the logs of its sums, any other by addition.
    What joins the sum without a key, a sink or eps, must be counted once: compute the
    parts with `weight_map.bare()` and it is added here. Epilogues come after, and
    rows that were taken twice (`reweight`) do not merge.

    Args:
        parts: (output [B, T, H, E], log-sum [B, T, H]) of each part; log-sums None
            for maps without a sum.
        weight_map: the map of the whole.
        operands: the map's own operands (`sink`).

    Returns:
        (output in the dtype of the first, log-sum of the whole or None).

    Raises:
        ValueError: without parts, or without the log-sums that the map needs.
    """
    if not parts:
        raise ValueError("merge: parts must not be empty; got none.")
    outs = [out for out, _ in parts]
    if not weight_map.needs_sum:
        return _added(outs), None
    if any(lse is None for _, lse in parts):
        raise ValueError(
            f"merge: {weight_map} divides by a sum, so each part must come with its "
            "log-sum; got None. Compute the parts with return_lse=True."
        )
    logs = [lse for _, lse in parts]
    sink = weight_map.sink_logit(dict(operands or {}))
    if sink is not None:
        sink = jnp.asarray(sink, logs[0].dtype)
        logs.append(jnp.broadcast_to(sink, logs[0].shape))
    shares, lse = _shares(jnp.stack(logs))
    wide = shares.dtype
    scaled = [
        out.astype(wide) * share[..., None]
        for out, share in zip(outs, shares[: len(outs)], strict=True)
    ]
    return sum(scaled[1:], scaled[0]).astype(outs[0].dtype), lse


def _added(outs: Sequence[jax.Array]) -> jax.Array:
    wide = jnp.promote_types(outs[0].dtype, jnp.float32)
    total = outs[0].astype(wide)
    for out in outs[1:]:
        total = total + out.astype(wide)
    return total.astype(outs[0].dtype)


def _shares(logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the first axis and its log-sum; all -inf gives 0 and -inf, and no
    NaN on the way back."""
    top = jax.lax.stop_gradient(jnp.max(logs, axis=0))
    top = jnp.where(top == -jnp.inf, 0, top)
    terms = jnp.exp(logs - top)
    total = jnp.sum(terms, axis=0)
    some = total > 0
    safe = jnp.where(some, total, 1)
    return terms / safe, jnp.where(some, jnp.log(safe) + top, -jnp.inf)
