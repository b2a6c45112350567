"""Guidance of denoising networks: classifier-free, and by a perturbed pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.core.errors import UserError

# What it is told, an array or a tree of arrays [B, ...], is its third argument.
Network = Callable[[jax.Array, jax.Array, Any], jax.Array]
EVERYWHERE = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Push:
    """Guidance away from a perturbed pass: weight (f_c - f_pert) is added.

    f_pert is the conditional pass of the same network with its attention perturbed.
    Others write f_pert + s (f_c - f_pert): their s is weight + 1.
    Source: Ahn et al., arXiv 2403.17377, equation 7; arXiv 2506.10978.

    Attributes:
        denoise: the perturbed network: (x, times [B], labels [B]) -> output.
        weight: w >= 0; 0 runs no third pass.
        interval: noise levels, from 0 (clean) to 1 (noise), in which it acts; where
            no row is inside, no third pass is run.
        decay: d >= 0: at noise level n the weight is max(0, w - d (1 - n)); a 0 is as
            outside of the interval. Of a published w - a (1000 - t), with steps t from
            1000 down, d = 1000 a.
    """

    denoise: Network
    weight: float | jax.Array
    interval: tuple[float, float] = EVERYWHERE
    decay: float | jax.Array = 0.0

    def weights(self, times: jax.Array, level) -> jax.Array | float:
        """The weight at times [B]: [B], or one number without decay."""
        if _is(self.decay, 0):
            return self.weight
        return jnp.maximum(self.weight - self.decay * (1 - level(times)), 0)

    def inside(self, times: jax.Array, level) -> jax.Array | None:
        """bool [B], where it acts, or None for everywhere."""
        near = _inside(self.interval, level, times)
        if _is(self.decay, 0):
            return near
        left = self.weights(times, level) > 0
        return left if near is None else near & left


def guided(
    denoise: Network,
    *,
    scale: float,
    labels: Any,
    null_label: Any,
    channels: int | None = None,
    interval: tuple[float, float] = EVERYWHERE,
    level: Callable[[jax.Array], jax.Array] | None = None,
    rescale: float = 0.0,
    push: Push | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """f_u + scale (f_c - f_u) + weight (f_c - f_pert): guidance by other passes.

    Classifier-free guidance runs both halves in one pass, and `push` a pass of its
    own. Predicted channels are guided; what the output has beyond the channels of x (a
    learned variance) is the conditional half's. A scale of 1 without a push runs the
    conditional pass alone, at half the cost.
    Source: Ho and Salimans, arXiv 2207.12598; interval: Kynkaanniemi et al., arXiv
    2404.07724; rescale: Lin et al., arXiv 2305.08891, section 3.4; push: see `Push`.

    Args:
        denoise: (x [B, ..., channels], times [B], labels [B]) -> output.
        scale: >= 0; 0 is the prediction without a label, 1 that with it.
        labels: int [B], rows [B, M], or any tree of arrays [B, ...], of the rows that
            the returned function is given.
        null_label: the label (or row, or tree of rows, each alike for all) of no label;
            None for a network that has none, which takes no scale but 1.
        channels: how many of the predicted channels, from the first, are guided; the
            others are the conditional half's. None: all. The authors of DiT guide 3
            of 4.
        interval: noise levels, from 0 (clean) to 1 (noise), in which the scale acts;
            elsewhere it is 1, at half the cost where no row is inside.
        level: times [B] -> noise levels [B], `process.level`; needed for an interval.
        rescale: share in [0, 1] of a prediction that is brought back to the standard
            deviation, over a row's guided channels, of the conditional one.
        push: guidance by a perturbed pass.

    Returns:
        (x, times) -> output, which samplers take.

    Raises:
        UserError: for values out of range.
    """
    _check(scale, interval, level, rescale)
    if push is not None:
        _check_push(push, level)
        push = None if _is(push.weight, 0) else push
    is_plain = _is(scale, 1)
    if null_label is None and not is_plain:
        raise UserError(
            "guidance: scale needs a null_label, with which the network was also "
            f"trained; got scale={scale}, null_label=None. Use scale=1."
        )
    if is_plain and push is None:
        return lambda x, times: denoise(x, times, labels)

    def halves(x, times, inside):
        both = jax.tree.map(_with_row, labels, null_label)
        output = denoise(jnp.concatenate([x, x]), jnp.concatenate([times, times]), both)
        with_label, without = jnp.split(output, 2)
        return with_label, _where(inside, without, with_label)

    def alone(x, times, inside):
        del inside
        found = denoise(x, times, labels)
        return found, found

    def run(x: jax.Array, times: jax.Array) -> jax.Array:
        count = _guided_channels(channels, x.shape[-1])
        if is_plain:
            output, without = alone(x, times, None)
        else:
            inside = _inside(interval, level, times)
            output, without = _either(inside, halves, alone, x, times)
        f_c = output[..., :count]
        f_u = None if is_plain else without[..., :count]
        if push is None:
            f_pert, weight = f_c, 0.0
        else:
            near, weight = push.inside(times, level), push.weights(times, level)
            f_pert = _pushed(push, labels, near, x, times, output)[..., :count]
            if jnp.ndim(weight):
                weight = weight.reshape((-1,) + (1,) * (f_pert.ndim - 1))
        result = perturbed_guidance(
            f_c, f_pert, weight=weight, f_u=f_u, scale=1.0 if is_plain else scale
        )
        if rescale:
            ratio = _spread(f_c) / _spread(result)
            result = result * (1 + rescale * (ratio - 1))
        rest = output[..., count:]
        return jnp.concatenate([result.astype(output.dtype), rest], axis=-1)

    return run


def _with_row(rows: jax.Array, row) -> jax.Array:
    """[B, ...] -> [2 B, ...]: the second half is `row`, B times."""
    row = jnp.broadcast_to(jnp.asarray(row, rows.dtype), rows.shape)
    return jnp.concatenate([rows, row])


def _pushed(push: Push, labels, inside, x, times, output):
    """The perturbed pass; rows where it does not act are the conditional one."""

    def run(x, times, inside):
        return _where(inside, push.denoise(x, times, labels), output)

    return _either(inside, run, lambda x, times, inside: output, x, times)


def _either(inside, run, other, x, times):
    """`run` where any row is inside (or all are: None), else `other`."""
    if inside is None:
        return run(x, times, None)
    return jax.lax.cond(jnp.any(inside), run, other, x, times, inside)


def _inside(interval, level, times: jax.Array) -> jax.Array | None:
    """bool [B], or None for everywhere."""
    if tuple(interval) == EVERYWHERE:
        return None
    now = level(times)
    return (interval[0] <= now) & (now <= interval[1])


def _where(inside: jax.Array | None, one: jax.Array, other: jax.Array) -> jax.Array:
    if inside is None:
        return one
    return jnp.where(inside.reshape((-1,) + (1,) * (one.ndim - 1)), one, other)


def _is(value, number: int) -> bool:
    """Whether a value that is not traced is this number."""
    return isinstance(value, int | float) and value == number


def perturbed_guidance(
    f_c: jax.Array,
    f_pert: jax.Array,
    *,
    weight: float,
    f_u: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """f_c + weight (f_c - f_pert), beside classifier-free guidance where f_u is given.

    With f_u: f_u + scale (f_c - f_u) + weight (f_c - f_pert).
    Source: Ahn et al., arXiv 2403.17377.

    Args:
        f_c: predictions, of the label where there is one, [B, ...].
        f_pert: the same of a network whose attention was perturbed.
        f_u: predictions without the label.

    Raises:
        UserError: for a scale without f_u, where it would have no effect.
    """
    pushed = weight * (f_c - f_pert)
    if f_u is not None:
        return f_u + scale * (f_c - f_u) + pushed
    if scale != 1.0:
        raise UserError(
            "perturbed_guidance: scale needs f_u, the prediction without a label; got "
            f"scale={scale}, f_u=None. Give f_u or leave scale out."
        )
    return f_c + pushed


def _check(scale, interval, level, rescale):
    if isinstance(scale, int | float) and not scale >= 0:
        raise UserError(
            f"guidance: scale must not be negative; got scale={scale}. "
            "1 is the conditional prediction, more pushes away from the null label."
        )
    _check_interval(interval, level)
    if not 0 <= rescale <= 1:
        raise UserError(
            f"guidance: rescale must be in [0, 1]; got rescale={rescale}. 0 is off."
        )


def _check_push(push: Push, level) -> None:
    if isinstance(push.weight, int | float) and not push.weight >= 0:
        raise UserError(
            "guidance: weight of a push must not be negative; got "
            f"weight={push.weight}. 0 is without."
        )
    if isinstance(push.decay, int | float) and not push.decay >= 0:
        raise UserError(
            "guidance: decay of a push must not be negative; got "
            f"decay={push.decay}. 0 is a constant weight."
        )
    if not _is(push.decay, 0) and level is None:
        raise UserError(
            "guidance: a decay needs level, the noise level of a time; got "
            "level=None. Give level=process.level."
        )
    _check_interval(push.interval, level)


def _check_interval(interval, level) -> None:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise UserError(
            "guidance: interval must be two rising noise levels in [0, 1]; "
            f"got interval={tuple(interval)}. (0, 1) is everywhere."
        )
    if (low, high) != EVERYWHERE and level is None:
        raise UserError(
            "guidance: an interval needs level, the noise level of a time; got "
            f"interval={tuple(interval)}, level=None. Give level=process.level."
        )


def _guided_channels(channels: int | None, predicted: int) -> int:
    if channels is None:
        return predicted
    if not 1 <= channels <= predicted:
        raise UserError(
            f"guidance: channels must be in 1..{predicted}, the channels of the data; "
            f"got channels={channels}. Leave it out to guide all."
        )
    return channels


def _spread(values: jax.Array) -> jax.Array:
    """Standard deviation of each row, [B, 1, ...]."""
    return jnp.std(values, axis=tuple(range(1, values.ndim)), keepdims=True)
