"""Attention as the formula reads: dense scores, no tiling, no derivative of its own.

The oracle of every other implementation. Time O(T S (D + E)), memory O(B H T S).
Accumulates at the highest precision in float32, or float64 for float64 inputs.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import epilogue, tiles
from attnjax.kernels.masks import Tile
from attnjax.kernels.request import Request
from attnjax.kernels.reweight import Reweight
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.weight_maps import WeightMap

NAME = "reference"
# Never chosen by "auto": dense scores are asked for by name.
RANK: dict[str, int] = {}


def supports(request: Request) -> str | None:
    """None: it computes every spec on every target."""
    del request


def run(
    request: Request,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    operands: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """Output [B, T, H, E] in q's dtype, and log-sum-exp [B, T, H] if normalised."""
    spec, dtype = request.spec, request.compute_dtype
    highest = jax.lax.Precision.HIGHEST
    heads = [tiles.heads_first(x.astype(dtype)) for x in (q, k, v)]
    given = operands
    operands = tiles.place_queries(tiles.of_tiles(spec, operands), request.q_len)
    tile = tiles.make_tile(request, operands, (0, request.q_len, 0, request.kv_len))
    s = request.scale * tiles.products(heads[0], heads[1], highest)
    mask = tiles.visible(spec, tile)
    mask = jnp.ones((), bool) if mask is None else mask
    mask = jnp.broadcast_to(mask, s.shape)
    if spec.score:
        trained = tiles.trained_tiles(spec, tile, s.shape)
        for operand in spec.score_operands:
            if operand.axes != "*":
                trained[operand.name] = _stop_where(trained[operand.name], mask)
        s = tiles.score_chain(spec, tile)(_stop_where(s, mask), trained)
    # Masked scores are replaced before and after the weight map, so that neither
    # values nor gradients of masked places can reach the result.
    weights, lse = row_weights(spec, jnp.where(mask, s, 0), mask, tile)
    out = tiles.heads_first(tiles.mix(weights, heads[2], highest))
    out = epilogue.run_steps(spec.epilogue, out, given).astype(q.dtype)
    return out, None if lse is None else jnp.swapaxes(lse, 1, 2)


@jax.custom_vjp
def _stop_where(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x, whose cotangent becomes 0 where mask is False, even if it is NaN."""
    del mask
    return x


def _stop_where_fwd(x, mask):
    return x, mask


def _stop_where_bwd(mask, ct):
    return jnp.where(mask, ct, 0), None


_stop_where.defvjp(_stop_where_fwd, _stop_where_bwd)


def row_weights(
    spec: AttentionSpec, s: jax.Array, mask: jax.Array, tile: Tile
) -> tuple[jax.Array, jax.Array | None]:
    """What scores become: the weight map of whole rows, and `reweight`.

    Args:
        s: scores [B, H, T, S], finite at masked places too.
        mask: bool [B, H, T, S], what is seen.
        tile: the tile that covers everything; its operands are read.

    Returns:
        weights [B, H, T, S], and log-sums [B, H, T], None when nothing is summed or
        rows are reweighted.
    """
    weights, lse = _weights(spec.weight_map, s, mask, tile)
    if spec.reweight is None:
        return weights, lse
    return _taken_again(spec.reweight, weights, tile), None


def _weights(
    weight_map: WeightMap, s: jax.Array, mask: jax.Array, tile: Tile
) -> tuple[jax.Array, jax.Array | None]:
    """Weights and log-sum of the weight map alone."""
    if not weight_map.needs_sum:
        return jnp.where(mask, weight_map.unnormalized(s, None), 0), None
    sink = weight_map.sink_logit(tile.operands)
    low = jnp.where(mask, s, -jnp.inf)
    row_max = jnp.max(low, axis=-1, keepdims=True)
    if sink is not None:
        sink = jnp.reshape(jnp.asarray(sink, s.dtype), (1, -1, 1, 1))
        row_max = jnp.maximum(row_max, sink)
    if weight_map.floor is not None:
        row_max = jnp.maximum(row_max, weight_map.floor)
    row_max = jnp.where(jnp.isfinite(row_max), row_max, 0)
    if not weight_map.needs_max:
        row_max = jnp.full_like(row_max, weight_map.bound or 0)
    row_max = jax.lax.stop_gradient(row_max)
    u = jnp.where(mask, weight_map.unnormalized(s, row_max), 0)
    summed = u
    if weight_map.split:
        summed = jnp.where(mask, weight_map.summed(s, row_max), 0)
    total = jnp.sum(summed, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - row_max)
    some = total > 0
    safe = jnp.where(some, total, 1)
    lse = jnp.where(some, jnp.log(safe) + row_max, -jnp.inf)
    return u / safe, lse[..., 0]


def _taken_again(reweight: Reweight, p: jax.Array, tile: Tile) -> jax.Array:
    """Finished rows of weights [B, H, T, S], reweighted."""
    peak = jax.lax.stop_gradient(jnp.max(p, axis=-1, keepdims=True))
    b = reweight.apply(p, peak, tile)
    if not reweight.needs_sum:
        return b
    total = jnp.sum(b, axis=-1, keepdims=True) + reweight.extra(peak, tile)
    return b / jnp.where(total > 0, total, 1)
