"""Small attention in one tile: dense scores, weights kept for the backward pass.

At these sizes the passes over the scores are the cost, not their memory, so the
derivative is written by hand with as few of them as possible.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.masks import Mask
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]


def forward(request: Request, q, k, v, operands: Arrays):
    """Output, log-sum [B, T, H] or None, and what `backward` needs."""
    spec, dtype = request.spec, request.compute_dtype
    qh, kh, vh = (tiles.heads_first(x.astype(dtype)) for x in (q, k, v))
    tile, mask = _whole_tile(request, operands)
    raw = tiles.products(qh * request.scale, kh)
    s = tile_math.masked_scores(spec, raw, tile, mask)
    weight_map = spec.weight_map
    if not weight_map.needs_sum:
        u, _ = tile_math.weigh(weight_map, s, None, mask)
        out = tiles.heads_first(tiles.mix(u, vh)).astype(request.core_dtype)
        return out, None, (u, None, None, None)
    top = None
    if weight_map.needs_max:
        least = tile_math.start_of_max(weight_map)
        top = jnp.max(s, axis=-1, keepdims=True, initial=least)
    shift = tile_math.shift_of(weight_map, top)
    u, summed = tile_math.weigh(weight_map, s, shift, mask)
    total = jnp.sum(summed, axis=-1, keepdims=True)
    # Whether a row sees anything is read from the mask: another reader of the row
    # maximum would keep XLA from computing u in one pass.
    alive = True if mask is None else mask.any(axis=-1, keepdims=True)
    sink = tile_math.sink_column(spec, operands, s.dtype)
    factor, lse = tile_math.row_results(shift, total, sink, alive)
    out = tiles.heads_first(tiles.mix(u, vh) * factor).astype(request.core_dtype)
    kept = (u, factor, lse, shift if weight_map.split else None)
    return out, jnp.swapaxes(lse[..., 0], 1, 2), kept


def _whole_tile(request: Request, operands: Arrays):
    """The tile and its mask; a mask of indices alone is a constant."""
    place = (0, request.q_len, 0, request.kv_len)
    tile = tiles.make_tile(request, operands, place)
    mask = request.spec.mask
    if request.static_positions and not mask.operands and "kv_mask" not in operands:
        sizes = (request.batch, request.num_heads, request.q_len, request.kv_len)
        return tile, _constant_mask(mask, *sizes)
    return tile, tiles.visible(request.spec, tile)


@functools.lru_cache(maxsize=128)
def _constant_mask(
    mask: Mask, batch: int, num_heads: int, q_len: int, kv_len: int
) -> np.ndarray | None:
    """What a mask of indices alone shows of the whole; None for everything."""

    def evaluate():
        tile = tiles.index_tile(batch, num_heads, (0, q_len, 0, kv_len))
        visible = mask.visible(tile)
        return jnp.ones((), bool) if visible is None else visible

    with jax.ensure_compile_time_eval():
        constant = np.asarray(jax.jit(evaluate)())
    return None if constant.all() else constant


def backward(request: Request, qkv, operands: Arrays, kept, cotangents):
    """Gradients of q, k, v and, by name, of the trained operands."""
    spec, dtype = request.spec, request.compute_dtype
    qh, kh, vh = (tiles.heads_first(x.astype(dtype)) for x in qkv)
    qh = qh * request.scale
    u, factor, lse, shift = kept
    d_out = tiles.heads_first(cotangents[0].astype(dtype))
    d_out = d_out if factor is None else d_out * factor
    ds, d_sum, grads = tiles.products(d_out, vh), None, {}
    if factor is not None:
        d_lse = jnp.swapaxes(cotangents[1], 1, 2)[..., None].astype(dtype)
        d_sum = d_lse - jnp.sum(ds * u, axis=-1, keepdims=True)
        grads |= tile_math.sink_gradient(spec, operands, lse, d_sum)
        d_sum = d_sum * factor
    tile, mask = _whole_tile(request, operands)
    raw = tiles.products(qh, kh)
    s = tile_math.masked_scores(spec, raw, tile, mask)
    ct = ds, d_sum
    ds = tile_math.score_cotangent(spec.weight_map, s, u, shift, mask, ct)
    d_raw, spread = tile_math.score_gradients(spec, raw, ds, tile, mask)
    for operand in spec.score_operands:
        name = operand.name
        grads[name] = tile_math.reduce_tile(spread[name], operand, operands[name])
    dq = tiles.heads_first(request.scale * tiles.mix(d_raw, kh))
    dk = tiles.collect(d_raw, qh, request.num_kv_heads)
    dv = tiles.collect(u, d_out, request.num_kv_heads)
    return dq, *(x.transpose(0, 3, 1, 2) for x in (dk, dv)), grads
