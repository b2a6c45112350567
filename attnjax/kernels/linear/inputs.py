"""From a caller's arrays to the bare recurrence, and back.

Padding, documents, the normaliser and the scale are settled here once, so that an
implementation sees numbers only.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnjax.kernels.compat import vary_together
from attnjax.kernels.linear.request import LinearRequest, state_shape


class Inputs(NamedTuple):
    """The bare recurrence, in the accumulation dtype.

    Attributes:
        q: [B, T, K, G, D], scaled.
        k: [B, T, K, D], 0 at padding.
        v: [B, T, K, E], 0 at padding; the last column is 1 with a normaliser.
        log_decay: [B, T, K, 1 or D], 0 at padding, or None.
        beta: [B, T, K], 0 at padding, or None.
        reset: bool [B, T], the tokens before which the state becomes 0, or None.
        state: [B, K, D, E].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    beta: jax.Array | None
    reset: jax.Array | None
    state: jax.Array


def prepare(request: LinearRequest, q, k, v, operands: Mapping) -> Inputs:
    """The inputs of the recurrence."""
    spec, dtype = request.spec, request.compute_dtype
    batch, length, kv_heads = request.batch, request.length, request.kv_heads
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    q = q.reshape(batch, length, kv_heads, -1, request.dim)
    if spec.scale is not None:
        q = q * jnp.asarray(spec.scale, dtype)
    if spec.normalise:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    log_decay, beta = operands.get("log_decay"), operands.get("beta")
    if log_decay is not None:
        log_decay = log_decay.astype(dtype)
        if spec.decay != "channel":
            log_decay = jnp.broadcast_to(log_decay, k.shape[:3])[..., None]
    beta = None if beta is None else beta.astype(dtype)
    reset, ids = None, operands.get("segment_ids")
    if ids is not None:
        valid = (ids != 0)[..., None]
        k, v = (jnp.where(valid[..., None], x, 0) for x in (k, v))
        if log_decay is not None:
            log_decay = jnp.where(valid[..., None], log_decay, 0)
        beta = None if beta is None else jnp.where(valid, beta, 0)
        reset = _resets(ids, operands.get("initial_segment"))
    state = operands.get("initial_state")
    if state is None:
        sizes = batch, kv_heads, request.dim, request.value_dim
        state = jnp.zeros(state_shape(spec, *sizes), dtype)
    return vary_together(Inputs(q, k, v, log_decay, beta, reset, state.astype(dtype)))


def finish(request: LinearRequest, out: jax.Array, operands: Mapping) -> jax.Array:
    """[B, T, K, G, E] of the recurrence -> [B, T, H, E] in q's dtype."""
    if request.spec.normalise:
        out, mass = out[..., :-1], out[..., -1:]
        seen = mass != 0
        out = jnp.where(seen, out / jnp.where(seen, mass, 1), 0)
    ids = operands.get("segment_ids")
    if ids is not None:
        out = jnp.where((ids != 0)[..., None, None, None], out, 0)
    shape = request.batch, request.length, request.heads, request.value_dim
    return out.reshape(shape).astype(request.dtype)


def _resets(ids: jax.Array, first: jax.Array | None) -> jax.Array:
    """Whether a token starts another document than the token before it was in.

    Padding (id 0) belongs to what is before it. `first` is the document of the
    initial state; None or 0 let the first document go on from it.
    """
    last = _last_places(ids)
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    earlier = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
    start = jnp.zeros_like(ids[:, 0]) if first is None else first.astype(ids.dtype)
    earlier = jnp.where(before < 0, start[:, None], earlier)
    return (ids != 0) & (earlier != 0) & (ids != earlier)


def _last_places(ids: jax.Array) -> jax.Array:
    """int32 [B, T], the last token up to each that is no padding, -1 for none."""
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    return jax.lax.cummax(jnp.where(ids != 0, places, -1), axis=1)


def last_document(ids: jax.Array) -> jax.Array:
    """int [B], the last id that is not 0; 0 if there is none."""
    last = _last_places(ids)[:, -1:]
    found = jnp.take_along_axis(ids, jnp.maximum(last, 0), axis=1)
    return jnp.where(last < 0, 0, found)[:, 0]
