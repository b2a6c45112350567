"""The backward pass over tiles: weights recomputed from the rows' log-sums.

Gradients of keys and values are carried whole, features first (see `tiles.collect`),
and added to in place; the order is fixed, so results repeat bit for bit.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.blocked_forward import (
    block_at,
    join_blocks,
    pad_operands,
    split_blocks,
    visit_row,
)
from attnjax.kernels.tile_table import tile_at

Arrays = Mapping[str, jax.Array]


def backward(plan: BlockPlan, qkv, operands: Arrays, kept, cotangents):
    """Gradients of q, k, v and, by name, of the trained operands."""
    q, k, v = qkv
    request = plan.request
    dtype = request.compute_dtype
    blocks = [split_blocks(x.astype(dtype), plan.block_k, plan.num_k) for x in (k, v)]
    padded = pad_operands(plan, operands)
    rows, sink_grads = _rows(plan, q, operands, kept, cotangents)
    trained = {operand.name: operand for operand in request.spec.score_operands}

    def row(totals, x):
        i, row_i, *table_row = x

        def visit(j, masked, carry):
            d_q, totals = carry
            tile, mask = tile_at(plan, padded, i, j)
            kv = [block_at(x, j) for x in blocks]
            part = _tile_gradients(request, row_i, kv, tile, mask if masked else None)
            d_operands = {
                name: add_tile(plan, totals[2][name], part[3][name], operand, i, j)
                for name, operand in trained.items()
            }
            d_k, d_v = (add_block(*x, j) for x in zip(totals, part[1:3], strict=False))
            return d_q + part[0], (d_k, d_v, d_operands)

        d_q = jnp.zeros_like(row_i["q"])
        d_q, totals = visit_row(table_row, visit, (d_q, totals))
        return totals, d_q

    start = [jnp.zeros_like(x.mT) for x in blocks]
    start.append({name: jnp.zeros_like(padded[name], dtype) for name in trained})
    steps = jnp.arange(plan.num_q, dtype=jnp.int32)
    xs = jax.tree.map(jnp.asarray, (steps, rows, *kept[2]))
    (d_k, d_v, d_operands), d_q = jax.lax.scan(row, tuple(start), xs)
    d_operands = {
        name: x[tuple(slice(0, n) for n in operands[name].shape)]
        for name, x in d_operands.items()
    }
    d_q = join_blocks(d_q, request.q_len) * request.scale
    d_k, d_v = (join_blocks(x.mT, request.kv_len) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_operands | sink_grads


def add_block(total: jax.Array, part: jax.Array, j: jax.Array) -> jax.Array:
    """Add to block j, in place."""
    return jax.lax.dynamic_update_index_in_dim(total, block_at(total, j) + part, j, 0)


def _rows(plan: BlockPlan, q, operands: Arrays, kept, cotangents):
    """Per block of queries: scaled q, the output's cotangent, and row statistics
    [B, H, t, 1]; and the gradient of the weight map's own operand."""
    request = plan.request
    dtype, size = request.compute_dtype, (plan.block_q, plan.num_q)
    out, lse, _ = kept
    d_out, d_lse = cotangents
    rows = {
        "q": split_blocks(q.astype(dtype) * request.scale, *size),
        "d_out": split_blocks(d_out.astype(dtype), *size),
    }
    if not request.spec.weight_map.needs_sum:
        return rows, {}
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)
    d_sum = d_lse.astype(dtype) - delta
    grads = tile_math.sink_gradient(
        request.spec,
        operands,
        *(jnp.swapaxes(x, 1, 2)[..., None] for x in (lse, d_sum)),
    )
    # Rows that see nothing: exp(LOW - 0) is 0, exp(LOW - (-inf)) would not be.
    shift = jnp.where(lse == -jnp.inf, 0, lse)[..., None]
    d_sum = d_sum[..., None]
    if not request.spec.weight_map.exponential:
        factor = jnp.exp(-shift)
        rows["d_out"] = split_blocks(d_out.astype(dtype) * factor, *size)
        d_sum, shift = d_sum * factor, jnp.zeros_like(shift)
    rows["shift"], rows["d_sum"] = (split_blocks(x, *size) for x in (shift, d_sum))
    return rows, grads


def _tile_gradients(request, row, kv, tile, mask):
    """What one tile adds to the gradients of q, k, v and the score operands."""
    spec, (k, v) = request.spec, kv
    raw = tiles.products(row["q"], k)
    s = tile_math.masked_scores(spec, raw, tile, mask)
    shift = row.get("shift")
    u = spec.weight_map.unnormalized(s, shift)
    u = tile_math.keep(spec.weight_map, mask, u)
    ct = tiles.products(row["d_out"], v), row.get("d_sum")
    ds = tile_math.score_cotangent(spec.weight_map, s, u, shift, mask, ct)
    d_raw, spread = tile_math.score_gradients(spec, raw, ds, tile, mask)
    kv_heads = request.num_kv_heads
    return (
        tiles.mix(d_raw, k),
        tiles.collect(d_raw, row["q"], kv_heads),
        tiles.collect(u, row["d_out"], kv_heads),
        spread,
    )


def add_tile(plan: BlockPlan, total, spread, operand, i, j):
    """Add a tile's spread cotangent to the operand's gradient."""
    part = tile_math.reduce_tile(spread, operand, total)
    if operand.axes == "*":
        return total + part
    starts = [jnp.int32(0)] * total.ndim
    for letter, first in (("t", i * plan.block_q), ("s", j * plan.block_k)):
        axis = operand.axes.find(letter)
        if axis >= 0 and total.shape[axis] > 1:
            starts[axis] = first
    old = jax.lax.dynamic_slice(total, starts, part.shape)
    return jax.lax.dynamic_update_slice(total, old + part, starts)
