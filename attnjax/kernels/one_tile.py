"""Small attention in one tile: dense scores, weights kept for the backward pass.

At these sizes the passes over the scores are the cost, not their memory, so the
derivative is written by hand with as few of them as possible.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]


def forward(request: Request, q, k, v, operands: Arrays):
    """Output, log-sum [B, T, H] or None, and what `backward` needs."""
    spec, dtype = request.spec, request.compute_dtype
    qh, kh, vh = (tiles.heads_first(x.astype(dtype)) for x in (q, k, v))
    tile, mask = _whole_tile(request, operands)
    raw = request.scale * tiles.products(qh, kh)
    s = tile_math.masked_scores(spec, raw, tile, mask)
    if not spec.weight_map.needs_sum:
        w, lse = tile_math.unnormalized(spec, s, None), None
    else:
        w, lse = _normalise(spec, s, operands)
    out = tiles.heads_first(tiles.mix(w, vh)).astype(q.dtype)
    lse_out = None if lse is None else jnp.swapaxes(lse[..., 0], 1, 2)
    return out, lse_out, (w, lse)


def _whole_tile(request: Request, operands: Arrays):
    place = (0, request.q_len, 0, request.kv_len)
    tile = tiles.make_tile(request, operands, place)
    return tile, tiles.visible(request.spec, tile)


def _normalise(spec, s: jax.Array, operands: Arrays):
    """Weights and log-sums [B, H, t, 1] of whole rows."""
    sink = tile_math.sink_column(spec, operands, s.dtype)
    row_max = None
    if spec.weight_map.needs_max:
        row_max = tile_math.finite(jnp.max(s, axis=-1, keepdims=True))
    u = tile_math.unnormalized(spec, s, row_max)
    total = jnp.sum(u, axis=-1, keepdims=True)
    lse = tile_math.log_sum(row_max, total, sink)
    if sink is None:
        return u / jnp.where(total > 0, total, 1), lse
    top = 0 if row_max is None else row_max
    return u * jnp.exp(top - lse), lse


def backward(request: Request, qkv, operands: Arrays, kept, cotangents):
    """Gradients of q, k, v and, by name, of the trained operands."""
    spec, dtype = request.spec, request.compute_dtype
    qh, kh, vh = (tiles.heads_first(x.astype(dtype)) for x in qkv)
    d_out, d_lse = cotangents
    d_out = tiles.heads_first(d_out.astype(dtype))
    w, lse = kept
    tile, mask = _whole_tile(request, operands)
    dw = tiles.products(d_out, vh)
    grads = {}
    raw = request.scale * tiles.products(qh, kh)
    s = tile_math.masked_scores(spec, raw, tile, mask)
    slope = spec.weight_map.slope(s, w, lse)
    if spec.weight_map.needs_sum:
        d_sum = jnp.swapaxes(d_lse, 1, 2)[..., None].astype(dtype)
        d_sum = d_sum - jnp.sum(dw * w, axis=-1, keepdims=True)
        ds = slope * (dw + d_sum)
        grads |= tile_math.sink_gradient(spec, operands, lse, d_sum)
    else:
        ds = slope * dw
    d_raw, spread = tile_math.score_gradients(spec, raw, ds, tile, mask)
    for operand in spec.score_operands:
        name = operand.name
        grads[name] = tile_math.reduce_tile(
            spread[name], operand, operands[name], keys_major=False
        )
    dq = request.scale * tiles.mix(d_raw, kh)
    dk = request.scale * tiles.collect(d_raw, qh, request.num_kv_heads)
    dv = tiles.collect(w, d_out, request.num_kv_heads)
    return *(tiles.heads_first(x) for x in (dq, dk, dv)), grads
