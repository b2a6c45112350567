"""Attention with its scores and weights laid open, for hooks on them.

The same scores, mask and weight map as `kernels.attention`, taken from the kernels'
own parts on one tile that covers everything. Memory O(B H T S).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax import kernels
from attnjax.kernels import tiles
from attnjax.mixers.slots.base import Call


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: kernels.AttentionSpec,
    operands: Mapping[str, jax.Array],
    call: Call,
) -> jax.Array:
    """`kernels.attention` with the hooks "scores" and "weights", [B, H, T, S] each.

    Interventions on scores come before the mask: what is hidden stays hidden, and
    records hold -inf there. Interventions on weights come last and are used as they
    are, without another normalisation.

    Args:
        query: [B, T, H, D].
        key: [B, S, K, D].
        value: [B, S, K, E].
        spec, operands: as for `kernels.attention`.
        call: has the hooks.

    Returns:
        [B, T, H, E] in the dtype of `query`.
    """
    target = kernels.default_target()
    request = kernels.make_request(query, key, value, spec, operands, target)
    operands = tiles.place_queries(operands, request.q_len)
    tile = tiles.make_tile(request, operands, (0, request.q_len, 0, request.kv_len))
    mask = tiles.visible(spec, tile)
    wide = request.compute_dtype
    q, k, v = (tiles.heads_first(x.astype(wide)) for x in (query, key, value))
    scores = tiles.score_chain(spec, tile)(request.scale * tiles.products(q, k), {})
    scores = call.intervene("scores", scores, head_axis=1)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    call.record("scores", scores, head_axis=1)
    weights = _weights(spec, scores, operands)
    weights = call.probe("weights", weights, head_axis=1)
    return tiles.heads_first(tiles.mix(weights, v)).astype(query.dtype)


def _weights(spec: kernels.AttentionSpec, scores: jax.Array, operands) -> jax.Array:
    """The weight map on whole rows; a row that sees nothing is 0."""
    weight_map = spec.weight_map
    if not weight_map.needs_sum:
        return weight_map.unnormalized(scores, None)
    sink = weight_map.sink_logit(dict(operands))
    if sink is not None:
        sink = jnp.reshape(jnp.asarray(sink, scores.dtype), (1, -1, 1, 1))
    row_max = jnp.zeros((), scores.dtype)
    if weight_map.needs_max:
        row_max = jnp.max(scores, axis=-1, keepdims=True)
        row_max = row_max if sink is None else jnp.maximum(row_max, sink)
        row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
        row_max = jax.lax.stop_gradient(row_max)
    unnormalized = weight_map.unnormalized(scores, row_max)
    total = jnp.sum(unnormalized, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - row_max)
    return unnormalized / jnp.where(total > 0, total, 1)
