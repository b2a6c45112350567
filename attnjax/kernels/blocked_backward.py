"""The backward pass over tiles: weights recomputed from the rows' log-sums.

Gradients of keys and values are carried whole, features first (see `tiles.collect`),
and added to in place; the order is fixed, so results repeat bit for bit.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.blocked_forward import join_blocks, pad_operands, split_blocks
from attnjax.kernels.tile_table import tile_at

Arrays = Mapping[str, jax.Array]


def backward(plan: BlockPlan, qkv, operands: Arrays, kept, cotangents):
    """Gradients of q, k, v and, by name, of the trained operands."""
    q, k, v = qkv
    request, table = plan.request, kept[2]
    dtype, scale = request.compute_dtype, request.scale
    blocks = (
        split_blocks(k.astype(dtype), plan.block_k, plan.num_k),
        split_blocks(v.astype(dtype), plan.block_k, plan.num_k),
    )
    padded = pad_operands(plan, operands)
    rows, sink_grads = _rows(plan, q, operands, kept, cotangents)
    trained = {op.name: op for op in request.spec.score_operands}
    start = (
        jnp.zeros_like(blocks[0].mT),
        jnp.zeros_like(blocks[1].mT),
        {name: jnp.zeros_like(padded[name], dtype) for name in trained},
    )

    def row(carry, x):
        i, row_i, full, num_full, partial, num_partial = x

        def visit(indices, masked, n, inner):
            d_q, d_k, d_v, d_ops = inner
            j = indices[n]
            tile, mask = tile_at(plan, padded, i, j)
            mask = mask if masked else None
            grads = _tile_gradients(
                request, row_i, (blocks[0][j], blocks[1][j]), tile, mask
            )
            d_k = d_k.at[j].add(grads[1])
            d_v = d_v.at[j].add(grads[2])
            d_ops = {
                name: _add_tile(plan, d_ops[name], grads[3][name], op, i, j)
                for name, op in trained.items()
            }
            return d_q + grads[0], d_k, d_v, d_ops

        inner = (jnp.zeros_like(row_i["q"]), *carry)
        inner = jax.lax.fori_loop(
            0, num_full, lambda n, c: visit(full, False, n, c), inner
        )
        inner = jax.lax.fori_loop(
            0, num_partial, lambda n, c: visit(partial, True, n, c), inner
        )
        return inner[1:], inner[0]

    steps = jnp.arange(plan.num_q, dtype=jnp.int32)
    xs = jax.tree.map(jnp.asarray, (steps, rows, *table))
    (d_k, d_v, d_ops), d_q = jax.lax.scan(row, start, xs)
    d_ops = {
        name: x[tuple(slice(0, n) for n in operands[name].shape)]
        for name, x in d_ops.items()
    }
    d_q = join_blocks(d_q, request.q_len) * scale
    d_k, d_v = (join_blocks(x.mT, request.kv_len) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_ops | sink_grads


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
    if not request.spec.weight_map.needs_max:
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
    u = spec.weight_map.unnormalized(s, row.get("shift"))
    ds = tiles.products(row["d_out"], v)
    if "d_sum" in row:
        ds = ds + row["d_sum"]
    ds = spec.weight_map.slope(s, u) * ds
    d_raw, spread = tile_math.score_gradients(spec, raw, ds, tile, mask)
    kv_heads = request.num_kv_heads
    return (
        tiles.mix(d_raw, k),
        tiles.collect(d_raw, row["q"], kv_heads),
        tiles.collect(u, row["d_out"], kv_heads),
        spread,
    )


def _add_tile(plan: BlockPlan, total, spread, operand, i, j):
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
