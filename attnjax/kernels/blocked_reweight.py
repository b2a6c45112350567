"""Blocked attention whose finished rows are taken again: two passes over the keys.

Forward, each block of queries first collects its rows' sums and peaks, then adds up
b v and b. Backward, with p the weights of the weight map, o the output, B the sum of b
and dp = do.v, the first pass collects
    D = sum_j p_j db_j,   db = slope(p) (dp - do.o) / B   (do.o only with `needs_sum`)
and the second gives dp's place in the ordinary backward pass to db and -D to d_sum.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.blocked_backward import add_block, add_tile
from attnjax.kernels.blocked_forward import (
    block_at,
    join_blocks,
    pad_operands,
    split_blocks,
    visit_row,
)
from attnjax.kernels.request import Request
from attnjax.kernels.tile_table import TileTable, tile_at

Arrays = Mapping[str, jax.Array]


def forward(plan: BlockPlan, qkv, operands: Arrays, table: TileTable):
    """Output [B, T, H, E], and what `backward` keeps.

    Args:
        operands: padded to whole blocks.
    """
    request = plan.request
    spec = request.spec
    qb, kb, vb = _blocks(plan, qkv)

    def row(_, x):
        i, q_i, *table_row = x

        def score(j, masked):
            return _scores(plan, operands, (q_i, block_at(kb, j)), (i, j), masked)

        def sums(j, masked, carry):
            return _collect(request, carry, *score(j, masked)[1:])

        stats = visit_row(table_row, sums, _empty_stats(request, q_i))
        stats = _finish_stats(request, stats, operands)

        def outputs(j, masked, carry):
            tile, s, mask = score(j, masked)
            p = _weights(request, s, mask, stats)
            b = spec.reweight.apply(p, stats["peak"], tile)
            acc, total = carry
            total = total + jnp.sum(b, axis=-1, keepdims=True)
            return acc + tiles.mix(b, block_at(vb, j)), total

        acc = jnp.zeros_like(q_i, shape=(*q_i.shape[:3], request.value_dim))
        acc, total = visit_row(table_row, outputs, (acc, jnp.zeros_like(stats["peak"])))
        first = tiles.make_tile(request, operands, _place(plan, i, 0))
        factor = _factor(spec.reweight, total, stats["peak"], first)
        return None, (acc * factor, stats | {"factor": factor})

    steps = jnp.arange(plan.num_q, dtype=jnp.int32)
    rows = jax.tree.map(jnp.asarray, (steps, qb, *table))
    _, (out, stats) = jax.lax.scan(row, None, rows)
    out = join_blocks(out, request.q_len).astype(request.core_dtype)
    return out, (out, stats, table)


def backward(plan: BlockPlan, qkv, operands: Arrays, kept, cotangents):
    """Gradients of q, k, v and, by name, of the trained operands."""
    request = plan.request
    spec, dtype = request.spec, request.compute_dtype
    qb, kb, vb = _blocks(plan, qkv)
    padded = pad_operands(plan, operands)
    out, stats, table = kept
    d_out = split_blocks(cotangents[0].astype(dtype), plan.block_q, plan.num_q)
    delta = jnp.zeros_like(stats["factor"])
    if spec.reweight.needs_sum:
        o = split_blocks(out.astype(dtype), plan.block_q, plan.num_q)
        delta = jnp.sum(d_out * o, axis=-1, keepdims=True)
    trained = {operand.name: operand for operand in spec.score_operands}

    def row(totals, x):
        i, row_i, *table_row = x

        def parts(j, masked):
            k_j, v_j = block_at(kb, j), block_at(vb, j)
            tile, s, mask = _scores(plan, padded, (row_i["q"], k_j), (i, j), masked)
            p = _weights(request, s, mask, row_i)
            dp = (tiles.products(row_i["d_out"], v_j) - row_i["delta"]) * row_i[
                "factor"
            ]
            dp = spec.reweight.slope(p, row_i["peak"], tile) * dp
            return (k_j, v_j), (tile, s, mask), p, dp

        def first(j, masked, total):
            *_, p, dp = parts(j, masked)
            return total + jnp.sum(p * dp, axis=-1, keepdims=True)

        d_sum = -visit_row(table_row, first, jnp.zeros_like(row_i["delta"]))

        def second(j, masked, carry):
            d_q, (d_k, d_v, d_operands) = carry
            (k_j, _), (tile, s, mask), p, dp = parts(j, masked)
            ds = _through_map(request, s, mask, (dp, d_sum), row_i)
            raw = tiles.products(row_i["q"], k_j)
            d_raw, spread = tile_math.score_gradients(spec, raw, ds, tile, mask)
            b = spec.reweight.apply(p, row_i["peak"], tile) * row_i["factor"]
            heads = request.num_kv_heads
            d_k = add_block(d_k, tiles.collect(d_raw, row_i["q"], heads), j)
            d_v = add_block(d_v, tiles.collect(b, row_i["d_out"], heads), j)
            d_operands = {
                name: add_tile(plan, d_operands[name], spread[name], operand, i, j)
                for name, operand in trained.items()
            }
            return d_q + tiles.mix(d_raw, k_j), (d_k, d_v, d_operands)

        d_q = jnp.zeros_like(row_i["q"])
        d_q, totals = visit_row(table_row, second, (d_q, totals))
        return totals, (d_q, d_sum)

    start = (jnp.zeros_like(kb.mT), jnp.zeros_like(vb.mT))
    d_trained = {name: jnp.zeros_like(padded[name], dtype) for name in trained}
    rows = {"q": qb, "d_out": d_out, "delta": delta, **stats}
    steps = jnp.arange(plan.num_q, dtype=jnp.int32)
    xs = jax.tree.map(jnp.asarray, (steps, rows, *table))
    totals, (d_q, d_sum) = jax.lax.scan(row, (*start, d_trained), xs)
    return _joined(plan, operands, totals, (d_q, d_sum, stats))


def _joined(plan: BlockPlan, operands: Arrays, totals, rows):
    """Gradients in the caller's shapes."""
    request = plan.request
    d_k, d_v, d_operands = totals
    d_q, d_sum, stats = rows
    d_operands = {
        name: x[tuple(slice(0, n) for n in operands[name].shape)]
        for name, x in d_operands.items()
    }
    if request.spec.weight_map.operands:
        lse, d_lse = (
            jnp.swapaxes(join_blocks(x, request.q_len), 1, 2)
            for x in (stats["lse"], d_sum)
        )
        d_operands |= tile_math.sink_gradient(request.spec, operands, lse, d_lse)
    d_q = join_blocks(d_q, request.q_len) * request.scale
    d_k, d_v = (join_blocks(x.mT, request.kv_len) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_operands


def _blocks(plan: BlockPlan, qkv):
    dtype = plan.request.compute_dtype
    q, k, v = (x.astype(dtype) for x in qkv)
    return (
        split_blocks(q * plan.request.scale, plan.block_q, plan.num_q),
        split_blocks(k, plan.block_k, plan.num_k),
        split_blocks(v, plan.block_k, plan.num_k),
    )


def _place(plan: BlockPlan, i, j):
    return (i * plan.block_q, plan.block_q, j * plan.block_k, plan.block_k)


def _scores(plan: BlockPlan, operands: Arrays, qk, ij, masked: bool):
    """A tile, its scores, and its mask (None where it needs none)."""
    tile, mask = tile_at(plan, operands, *ij)
    mask = mask if masked else None
    s = tile_math.masked_scores(plan.request.spec, tiles.products(*qk), tile, mask)
    return tile, s, mask


def _empty_stats(request: Request, q: jax.Array):
    """(row maximum of scores, row sum, largest numerator) before any key."""
    start = tile_math.start_of_max(request.spec.weight_map)
    zero = jnp.zeros_like(q, shape=(*q.shape[:3], 1))
    return jnp.full_like(zero, start), zero, zero


def _collect(request: Request, carry, s: jax.Array, mask):
    """Add one tile of scores to the row statistics."""
    weight_map = request.spec.weight_map
    top, total, peak = carry
    new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    if weight_map.needs_max:
        fade = jnp.exp(top - new_top)
        total, peak = total * fade, peak * fade
    shift = tile_math.shift_of(weight_map, new_top)
    u, summed = tile_math.weigh(weight_map, s, shift, mask)
    total = total + jnp.sum(summed, axis=-1, keepdims=True)
    return new_top, total, jnp.maximum(peak, jnp.max(u, axis=-1, keepdims=True))


def _finish_stats(request: Request, carry, operands: Arrays) -> dict[str, jax.Array]:
    """Row statistics [B, H, t, 1]: factor from numerators to weights, log-sum, the
    shift of exponentials, and the largest weight."""
    spec = request.spec
    top, total, peak = carry
    ones = jnp.ones_like(total)
    seen = top > tile_math.LOW / 2
    if not spec.weight_map.needs_sum:
        return {"unit": ones, "lse": 0 * ones, "peak": jnp.where(seen, peak, 0)}
    sink = tile_math.sink_column(spec, operands, total.dtype)
    shift = tile_math.shift_of(spec.weight_map, top)
    alive = seen & (total > 0)
    factor, lse = tile_math.row_results(shift, total, sink, alive)
    unit = ones if spec.weight_map.exponential else factor
    return {"unit": unit, "lse": lse, "peak": jnp.where(alive, peak * factor, 0)}


def _shift(request: Request, stats) -> jax.Array | None:
    """The log-sum, finite, for exponential maps."""
    if not request.spec.weight_map.exponential:
        return None
    return jnp.where(stats["lse"] == -jnp.inf, 0, stats["lse"])


def _weights(request: Request, s: jax.Array, mask, stats) -> jax.Array:
    """p: the finished weights of the weight map."""
    weight_map = request.spec.weight_map
    u = weight_map.unnormalized(s, _shift(request, stats))
    return tile_math.keep(weight_map, mask, u) * stats["unit"]


def _through_map(request: Request, s: jax.Array, mask, ct, stats) -> jax.Array:
    """ds from the cotangents of the weights and of the log-sum."""
    weight_map = request.spec.weight_map
    shift, (dp, d_sum) = _shift(request, stats), ct
    u = tile_math.keep(weight_map, mask, weight_map.unnormalized(s, shift))
    ct = dp * stats["unit"], d_sum * stats["unit"] if weight_map.needs_sum else None
    return tile_math.score_cotangent(weight_map, s, u, shift, mask, ct)


def _factor(reweight, total: jax.Array, peak: jax.Array, tile) -> jax.Array:
    """1 over the sum of b, or 1."""
    if not reweight.needs_sum:
        return jnp.ones_like(total)
    total = total + reweight.extra(peak, tile)
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
