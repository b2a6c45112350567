"""The forward pass of a few queries against a long cache.

The tiled pass lays keys and values out by head before it starts, a copy of the whole
cache, which is most of the time when there are few queries. Here blocks are cut from
the cache where it lies, and only those that the mask leaves: a window in a cache of
any length costs what the window costs.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.blocked_forward import absorb, empty_rows, finish, visit_row
from attnjax.kernels.tile_table import TileTable

Arrays = Mapping[str, jax.Array]


def forward(plan: BlockPlan, q, k, v, operands: Arrays, table: TileTable):
    """Output [B, T, H, E] and log-sum [B, T, H] or None.

    Args:
        operands: as they are, not padded.
    """
    request = plan.request
    dtype, block = request.compute_dtype, plan.block_k
    q_heads = tiles.heads_first(q.astype(dtype) * request.scale)

    def visit(j, masked, carry):
        # The last block ends with the cache: what it shares with the one before it
        # is masked.
        start = jnp.minimum(j * block, request.kv_len - block)
        k_j, v_j = (
            tiles.heads_first(_cut(x, start, block).astype(dtype)) for x in (k, v)
        )
        place = (0, request.q_len, start, block)
        tile = tiles.make_tile(request, operands, place)
        mask = None
        if masked:
            own = jnp.arange(block, dtype=jnp.int32) + start >= j * block
            mask = tiles.visible(request.spec, tile)
            own = own[None, None, None, :]
            mask = own if mask is None else mask & own
        raw = tiles.products(q_heads, k_j)
        s = tile_math.masked_scores(request.spec, raw, tile, mask)
        return absorb(request.spec, carry, s, mask, v_j)

    row = tuple(jnp.asarray(x)[0] for x in table)
    carry = visit_row(row, visit, empty_rows(request, q_heads))
    out, lse = finish(request.spec, carry, operands)
    out = tiles.heads_first(out).astype(request.core_dtype)
    return out, None if lse is None else tiles.heads_first(lse)[..., 0]


def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
