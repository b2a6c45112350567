"""The arithmetic of one tile, shared by every blocked form: scores to weights, and
the derivative of a tile's scores. All arrays here have the tile's orientation,
[B, H, t, s] or, keys-major, [B, H, s, t]; row statistics broadcast against it.
"""

import jax
import jax.numpy as jnp

from attnjax.kernels import tiles
from attnjax.kernels.masks import Tile
from attnjax.kernels.operands import Operand
from attnjax.kernels.spec import AttentionSpec


def masked_scores(
    spec: AttentionSpec, raw: jax.Array, tile: Tile, mask: jax.Array | None
) -> jax.Array:
    """Scaled products to scores; -inf where masked."""
    s = tiles.score_chain(spec, tile)(raw, {}) if spec.score else raw
    return s if mask is None else jnp.where(mask, s, -jnp.inf)


def finite(row: jax.Array) -> jax.Array:
    """A row statistic with -inf (nothing visible) replaced by 0, so that
    exp(-inf - row) is 0 and not NaN."""
    return jnp.where(row == -jnp.inf, 0, row)


def unnormalized(
    spec: AttentionSpec, s: jax.Array, row_max: jax.Array | None
) -> jax.Array:
    """Unnormalised weights; row_max is finite."""
    return spec.weight_map.unnormalized(s, row_max)


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


def reduce_tile(
    spread: jax.Array, operand: Operand, array: jax.Array, *, keys_major: bool
) -> jax.Array:
    """Sum a spread cotangent to the shape of the operand's tile, in its own axes."""
    if operand.axes == "*":
        return spread
    if keys_major:
        spread = jnp.swapaxes(spread, 2, 3)
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


def log_sum(
    row_max: jax.Array | None, total: jax.Array, sink: jax.Array | None
) -> jax.Array:
    """log of the row's sum: -inf where nothing is visible and there is no sink.

    Args:
        row_max: what the sum was scaled by, finite; None for 0.
        total: sum of unnormalised weights.
    """
    some = total > 0
    lse = jnp.log(jnp.where(some, total, 1))
    lse = lse if row_max is None else lse + row_max
    lse = jnp.where(some, lse, -jnp.inf)
    return lse if sink is None else jnp.logaddexp(lse, sink)


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
