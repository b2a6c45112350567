"""The arithmetic of one tile, shared by every blocked form: scores to weights, and
the derivative of a tile's scores. Tiles are [B, H, t, s], row statistics [B, H, t, 1].
"""

import jax
import jax.numpy as jnp

from attnjax.kernels import tiles
from attnjax.kernels.masks import Tile
from attnjax.kernels.operands import Operand
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.weight_maps import WeightMap

# What a masked score is: so low that no score is lost beside it, and finite, so that
# a row with nothing visible makes no NaN on its way to becoming 0.
LOW = -1e30


def masked_scores(
    spec: AttentionSpec, raw: jax.Array, tile: Tile, mask: jax.Array | None
) -> jax.Array:
    """Scaled products to scores; `LOW` or less where masked.

    The mask is added where that is safe: XLA's CPU compiler joins an addition, and
    not a selection, to the product before it and the row maximum after it.
    """
    s = tiles.score_chain(spec, tile)(raw, {}) if spec.score else raw
    if mask is None:
        return s
    if all(step.finite for step in spec.score):
        return s + jnp.where(mask, 0, jnp.asarray(LOW, s.dtype))
    return jnp.where(mask, s, jnp.asarray(LOW, s.dtype))


def start_of_max(weight_map: WeightMap) -> float:
    """The row maximum before any key."""
    return LOW if weight_map.floor is None else weight_map.floor


def shift_of(weight_map: WeightMap, top: jax.Array | None) -> jax.Array | float | None:
    """What exponentials of a forward pass are shifted by."""
    return top if weight_map.needs_max else weight_map.bound


def weigh(
    weight_map: WeightMap, s: jax.Array, shift, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Numerators and what is summed, 0 where masked; one array twice unless split."""
    u = keep(weight_map, mask, weight_map.unnormalized(s, shift))
    if not weight_map.split:
        return u, u
    return u, keep(weight_map, mask, weight_map.summed(s, shift))


def keep(weight_map: WeightMap, mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x, 0 where masked; for a map that vanishes there it is 0 already."""
    if mask is None or weight_map.vanishes:
        return x
    return jnp.where(mask, x, 0)


def score_cotangent(
    weight_map: WeightMap, s: jax.Array, u: jax.Array, shift, mask, ct
) -> jax.Array:
    """ds, from u and s at the same shift.

    Args:
        ct: (dp, d_sum): cotangents of u and of the row's sum; None for no sum.
    """
    dp, d_sum = ct
    if not weight_map.split:
        dp = dp if d_sum is None else dp + d_sum
        return keep(weight_map, mask, weight_map.slope(s, u) * dp)
    up, down = weight_map.slopes(s, shift)
    ds = up * dp if d_sum is None else up * dp + down * d_sum
    return keep(weight_map, mask, ds)


def score_gradients(
    spec: AttentionSpec,
    raw: jax.Array,
    ds: jax.Array,
    tile: Tile,
    mask: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cotangents of the scaled products and of the score operands' tiles.

    Args:
        raw: scaled products.
        ds: cotangent of the scores.

    Returns:
        cotangent of raw, and by name the cotangent of each operand, spread over the
        tile (summed only for "table" operands).
    """
    if not spec.score:
        return ds, {}
    trained = tiles.trained_tiles(spec, tile, raw.shape)
    _, pull = jax.vjp(tiles.score_chain(spec, tile), raw, trained)
    d_raw, d_trained = pull(ds)
    if mask is None:
        return d_raw, d_trained
    whole = {operand.name for operand in spec.score_operands if operand.axes == "*"}
    d_trained = {
        name: x if name in whole else jnp.where(mask, x, 0)
        for name, x in d_trained.items()
    }
    return jnp.where(mask, d_raw, 0), d_trained


def reduce_tile(spread: jax.Array, operand: Operand, array: jax.Array) -> jax.Array:
    """Sum a spread cotangent to the shape of the operand's tile, in its own axes."""
    if operand.axes == "*":
        return spread
    summed = []
    for i, letter in enumerate("bhts"):
        axis = operand.axes.find(letter)
        if axis < 0 or array.shape[axis] == 1:
            summed.append(i)
    total = jnp.sum(spread, axis=summed, keepdims=True)
    missing = [i for i, letter in enumerate("bhts") if letter not in operand.axes]
    return jnp.squeeze(total, missing)


def sink_column(spec: AttentionSpec, operands, dtype) -> jax.Array | None:
    """The sink's logit as [1, 1 or H, 1, 1], or None."""
    sink = spec.weight_map.sink_logit(operands)
    if sink is None:
        return None
    return jnp.reshape(jnp.asarray(sink, dtype), (1, -1, 1, 1))


def row_results(
    top: jax.Array | None,
    total: jax.Array,
    sink: jax.Array | None,
    alive: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The factor from unnormalised weights to weights, and the log-sum, of each row.

    A row that sees nothing has factor 0 and log-sum -inf (the sink's logit, if any).

    Args:
        top: row maximum that the weights were shifted by; None for 0.
        total: sum of unnormalised weights.
        sink: logit that joins the sum, or None.
        alive: whether the row sees anything; None reads it from `top` and `total`.
    """
    if alive is None:
        alive = total > 0
        alive = alive if top is None else alive & (top > LOW / 2)
    safe = jnp.where(alive & (total > 0), total, 1)
    lse = jnp.log(safe) if top is None else jnp.log(safe) + top
    lse = jnp.where(alive & (total > 0), lse, -jnp.inf)
    if sink is None:
        return jnp.where(alive, 1 / safe, 0), lse
    lse = jnp.logaddexp(lse, sink)
    return jnp.exp((0 if top is None else top) - lse), lse


def sink_gradient(
    spec: AttentionSpec, operands, lse: jax.Array, d_lse: jax.Array
) -> dict[str, jax.Array]:
    """Gradient of the weight map's own operand from rows [B, H, t, 1].

    Args:
        lse: log-sums, the sink included.
        d_lse: the whole cotangent of the log-sum: its own minus delta.
    """
    if not spec.weight_map.operands:
        return {}
    sink = sink_column(spec, operands, lse.dtype)
    share = jnp.exp(sink - lse) * d_lse
    return {spec.weight_map.operands[0].name: jnp.sum(share, axis=(0, 2, 3))}
