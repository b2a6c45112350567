"""Attention with its scores and weights laid open, for hooks on them.

The same scores, mask and weight map as `kernels.attention`, taken from the kernels'
own parts on one tile that covers everything. Memory O(B H T S).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax import kernels
from attnjax.kernels import epilogue, tiles
from attnjax.mixers.slots import blending
from attnjax.mixers.slots.base import Call


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: kernels.AttentionSpec,
    operands: Mapping[str, jax.Array],
    call: Call,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.attention` with the hooks "scores" and "weights", [B, H, T, S] each.

    Interventions on scores come before the mask: what is hidden stays hidden, and
    records hold -inf there. Interventions on weights come last and are used as they
    are, without another normalisation: they come after the second pass of `reweight`.

    Args:
        query: [B, T, H, D].
        key: [B, S, K, D].
        value: [B, S, K, E].
        spec, operands: as for `kernels.attention`.
        call: has the hooks.

    Returns:
        [B, T, H, E] in the dtype of `query`, and with `return_lse` the log-sums
        [B, T, H].
    """
    target = kernels.default_target()
    request = kernels.make_request(query, key, value, spec, operands, target)
    kernels.choices.tell_explicit(request)
    given = operands
    operands = tiles.place_queries(tiles.of_tiles(spec, operands), request.q_len)
    tile = tiles.make_tile(request, operands, (0, request.q_len, 0, request.kv_len))
    mask = tiles.visible(spec, tile)
    wide = request.compute_dtype
    q, k, v = (tiles.heads_first(x.astype(wide)) for x in (query, key, value))

    def scores_of(q):
        scores = request.scale * tiles.products(q, k)
        scores = tiles.score_chain(spec, tile)(scores, {})
        scores = call.intervene("scores", scores, head_axis=1)
        return scores if mask is None else jnp.where(mask, scores, -jnp.inf)

    def weights_of(scores):
        weights, lse, rest = _weights(spec, scores, operands)
        if spec.reweight is None:
            return weights, lse, rest
        return _taken_again(spec.reweight, weights, tile), lse, None

    scores = scores_of(q)
    call.record("scores", scores, head_axis=1)
    weights, lse, rest = weights_of(scores)
    rows = blending.Rows(
        seen=scores > -jnp.inf,
        rest=rest,
        smoothed=lambda mean: weights_of(scores_of(tiles.mix(mean, q)))[0],
        among=lambda left: weights_of(jnp.where(left, scores, -jnp.inf))[0],
    )
    weights = call.probe("weights", weights, head_axis=1, rows=rows)
    out = tiles.heads_first(tiles.mix(weights, v))
    out = epilogue.run_steps(spec.epilogue, out, given).astype(query.dtype)
    return (out, jnp.swapaxes(lse, 1, 2)) if spec.return_lse else out


def _weights(spec: kernels.AttentionSpec, scores: jax.Array, operands):
    """The weight map on whole rows, and their log-sums [B, H, T] (None without a
    sum); a row that sees nothing is 0.

    Third, the share of a row that a sink takes, [B, H, T, 1], where softmax makes
    shares, else None.
    """
    weight_map = spec.weight_map
    seen = scores > -jnp.inf
    # Formulas get finite scores: not all of them are 0, or finite, at -inf.
    finite = jnp.where(seen, scores, 0)
    if not weight_map.needs_sum:
        return jnp.where(seen, weight_map.unnormalized(finite, None), 0), None, None
    sink = weight_map.sink_logit(dict(operands))
    if sink is not None:
        sink = jnp.reshape(jnp.asarray(sink, scores.dtype), (1, -1, 1, 1))
    shift = _shift(weight_map, scores, sink)
    found = jnp.where(seen, weight_map.unnormalized(finite, shift), 0)
    summed = found
    if weight_map.split:
        summed = jnp.where(seen, weight_map.summed(finite, shift), 0)
    total = jnp.sum(summed, axis=-1, keepdims=True)
    taken = jnp.zeros_like(total) if sink is None else jnp.exp(sink - shift)
    total = total + taken
    safe = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, jnp.log(safe) + shift, -jnp.inf)
    rest = taken / safe if isinstance(weight_map, kernels.Softmax) else None
    return found / safe, lse[..., 0], rest


def _shift(weight_map: kernels.WeightMap, scores: jax.Array, sink) -> jax.Array:
    """The row's maximum where the map is shifted by it, else a constant."""
    if not weight_map.needs_max:
        return jnp.asarray(weight_map.bound or 0, scores.dtype)
    shift = jnp.max(scores, axis=-1, keepdims=True)
    for least in (sink, weight_map.floor):
        shift = shift if least is None else jnp.maximum(shift, least)
    return jax.lax.stop_gradient(jnp.where(shift == -jnp.inf, 0, shift))


def _taken_again(reweight: kernels.Reweight, p: jax.Array, tile) -> jax.Array:
    """The second pass on whole rows of weights [B, H, T, S]."""
    peak = jax.lax.stop_gradient(jnp.max(p, axis=-1, keepdims=True))
    b = reweight.apply(p, peak, tile)
    if not reweight.needs_sum:
        return b
    total = jnp.sum(b, axis=-1, keepdims=True) + reweight.extra(peak, tile)
    return b / jnp.where(total > 0, total, 1)
