"""The forward pass over tiles: for each block of queries, a loop over its keys."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.request import Request
from attnjax.kernels.tile_table import TileTable, tile_at

Arrays = Mapping[str, jax.Array]


def split_blocks(x: jax.Array, block: int, num: int) -> jax.Array:
    """[B, T, H, D] to [num, B, H, block, D], zeros after the end."""
    b, t, h, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, num * block - t), (0, 0), (0, 0)))
    return x.reshape(b, num, block, h, d).transpose(1, 0, 3, 2, 4)


def join_blocks(x: jax.Array, length: int) -> jax.Array:
    """[num, B, H, block, D] to [B, length, H, D]."""
    num, b, h, block, d = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, num * block, h, d)[:, :length]


def pad_operands(plan: BlockPlan, operands: Arrays) -> dict[str, jax.Array]:
    """Lengthen the operands' t and s axes to whole blocks."""
    known = tiles.declarations(plan.request.spec)
    longer = {"t": plan.num_q * plan.block_q, "s": plan.num_k * plan.block_k}
    padded = {}
    for name, array in operands.items():
        axes = known[name].axes
        width = [(0, 0)] * array.ndim
        for axis, letter in enumerate(axes):
            if letter in longer and array.shape[axis] > 1:
                width[axis] = (0, longer[letter] - array.shape[axis])
        padded[name] = jnp.pad(array, width) if any(map(any, width)) else array
    return padded


def block_at(blocks: jax.Array, j: jax.Array) -> jax.Array:
    """Block j, which exists: without the bounds checks of `blocks[j]`."""
    return jax.lax.dynamic_index_in_dim(blocks, j, keepdims=False)


def visit_row(table_row: tuple, visit, carry):
    """Run `visit(j, masked, carry)` over a row's blocks: full ones, then partial."""
    full, num_full, partial, num_partial = table_row

    def over(indices, masked):
        return lambda n, inner: visit(block_at(indices, n), masked, inner)

    carry = jax.lax.fori_loop(0, num_full, over(full, False), carry)
    return jax.lax.fori_loop(0, num_partial, over(partial, True), carry)


def forward(plan: BlockPlan, q, k, v, operands: Arrays, table: TileTable):
    """Output [B, T, H, E] in q's dtype and log-sum [B, T, H] or None.

    Args:
        operands: padded to whole blocks.
    """
    request = plan.request
    dtype = request.compute_dtype
    qb = split_blocks(q.astype(dtype) * request.scale, plan.block_q, plan.num_q)
    kb = split_blocks(k.astype(dtype), plan.block_k, plan.num_k)
    vb = split_blocks(v.astype(dtype), plan.block_k, plan.num_k)

    def row(_, x):
        i, q_i, *table_row = x

        def visit(j, masked, carry):
            tile, mask = tile_at(plan, operands, i, j)
            raw = tiles.products(q_i, block_at(kb, j))
            mask = mask if masked else None
            s = tile_math.masked_scores(request.spec, raw, tile, mask)
            return absorb(request.spec, carry, s, mask, block_at(vb, j))

        carry = visit_row(table_row, visit, empty_rows(request, q_i))
        return None, finish(request.spec, carry, operands)

    steps = jnp.arange(plan.num_q, dtype=jnp.int32)
    rows = jax.tree.map(jnp.asarray, (steps, qb, *table))
    _, (out, lse) = jax.lax.scan(row, None, rows)
    out = join_blocks(out, request.q_len).astype(request.core_dtype)
    return out, None if lse is None else join_blocks(lse, request.q_len)[..., 0]


def empty_rows(request: Request, q: jax.Array):
    """(accumulated output, row maximum, row sum) before any key."""
    rows = q.shape[:3]
    weight_map = request.spec.weight_map
    acc = jnp.zeros_like(q, shape=(*rows, request.value_dim))
    top = total = None
    if weight_map.needs_max:
        top = jnp.full_like(q, tile_math.start_of_max(weight_map), shape=(*rows, 1))
    if weight_map.needs_sum:
        total = jnp.zeros_like(q, shape=(*rows, 1))
    return acc, top, total


def absorb(spec, carry, s: jax.Array, mask: jax.Array | None, v: jax.Array):
    """Add one tile of scores to the running rows."""
    acc, top, total = carry
    new_top = None
    if top is not None:
        new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
        fade = jnp.exp(top - new_top)
        acc, total = acc * fade, total * fade
    shift = tile_math.shift_of(spec.weight_map, new_top)
    u, summed = tile_math.weigh(spec.weight_map, s, shift, mask)
    if total is not None:
        total = total + jnp.sum(summed, axis=-1, keepdims=True)
    return acc + tiles.mix(u, v), new_top, total


def finish(spec, carry, operands: Arrays):
    """Output rows and their log-sums."""
    acc, top, total = carry
    if total is None:
        return acc, None
    sink = tile_math.sink_column(spec, operands, acc.dtype)
    shift = tile_math.shift_of(spec.weight_map, top)
    factor, lse = tile_math.row_results(shift, total, sink)
    return acc * factor, lse
