"""Guidance of denoising networks: classifier-free, and by a perturbed pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.core.errors import UserError


def guided(
    denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    scale: float,
    labels: jax.Array,
    null_label: int,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    level: Callable[[jax.Array], jax.Array] | None = None,
    rescale: float = 0.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Classifier-free guidance: f_u + scale (f_c - f_u) with both halves in one pass.

    Predicted channels are guided; what the output has beyond the channels of x (a
    learned variance) is the conditional half's. A scale of 1 runs the conditional pass
    alone, at half the cost.
    Source: Ho and Salimans, arXiv 2207.12598; interval: Kynkaanniemi et al., arXiv
    2404.07724; rescale: Lin et al., arXiv 2305.08891, section 3.4.

    Args:
        denoise: (x [B, ..., channels], times [B], labels [B]) -> output.
        scale: >= 0; 0 is the prediction without a label, 1 that with it.
        labels: int [B], of the rows that the returned function is given.
        null_label: the label of no label.
        channels: how many of the predicted channels, from the first, are guided; the
            others are the conditional half's. None: all. The authors of DiT guide 3
            of 4.
        interval: noise levels, from 0 (clean) to 1 (noise), in which guidance acts;
            elsewhere the prediction is the conditional one, at half the cost where
            no row is inside.
        level: times [B] -> noise levels [B], `process.level`; needed for an interval.
        rescale: share in [0, 1] of a prediction that is brought back to the standard
            deviation, over a row's guided channels, of the conditional one.

    Returns:
        (x, times) -> output, which samplers take.

    Raises:
        UserError: for values out of range.
    """
    _check(scale, interval, level, rescale)
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, times: denoise(x, times, labels)
    both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def push(x, times, inside):
        count = _guided_channels(channels, x.shape[-1])
        output = denoise(jnp.concatenate([x, x]), jnp.concatenate([times, times]), both)
        with_label, without = jnp.split(output, 2)
        rest = with_label[..., count:]
        with_label, without = with_label[..., :count], without[..., :count]
        result = without + scale * (with_label - without)
        if rescale:
            ratio = _spread(with_label) / _spread(result)
            result = result * (rescale * ratio + (1 - rescale))
        if inside is not None:
            rows = inside.reshape((-1,) + (1,) * (x.ndim - 1))
            result = jnp.where(rows, result, with_label)
        return jnp.concatenate([result.astype(output.dtype), rest], axis=-1)

    def run(x: jax.Array, times: jax.Array) -> jax.Array:
        if tuple(interval) == (0.0, 1.0):
            return push(x, times, None)
        now = level(times)
        inside = (interval[0] <= now) & (now <= interval[1])
        return jax.lax.cond(
            jnp.any(inside),
            push,
            lambda x, times, inside: denoise(x, times, labels),
            *(x, times, inside),
        )

    return run


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
    low, high = interval
    if not 0 <= low < high <= 1:
        raise UserError(
            "guidance: interval must be two rising noise levels in [0, 1]; "
            f"got interval={tuple(interval)}. (0, 1) is everywhere."
        )
    if (low, high) != (0, 1) and level is None:
        raise UserError(
            "guidance: an interval needs level, the noise level of a time; got "
            f"interval={tuple(interval)}, level=None. Give level=process.level."
        )
    if not 0 <= rescale <= 1:
        raise UserError(
            f"guidance: rescale must be in [0, 1]; got rescale={rescale}. 0 is off."
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
