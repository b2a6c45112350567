"""dopri5: an ODE by steps whose size follows an estimate of their error.

The pair of orders 5 and 4 of Dormand and Prince (J. Comp. Appl. Math. 6, 1980), with
the steps of Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I,
sections II.4 (the first step, the norm) and IV.2 of volume II (the controller).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Row i: what the slopes 0..i say of the place of slope i + 1; the last row is the step.
STAGES = np.asarray(
    [
        [1 / 5, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ]
)
PLACES = STAGES.sum(1)
# The step less that of order 4, of the slopes 0..6.
ERROR = np.asarray(
    [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]
)
ORDER = 5
SAFETY, LEAST, MOST = 0.9, 0.2, 10.0
# Exponents of the error now and of the accepted one before.
NOW, BEFORE = 0.7 / ORDER, 0.4 / ORDER


def dopri5(
    slope: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    *,
    first: float,
    last: float,
    atol: float,
    rtol: float,
    max_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """x(last) of dx/dt = slope(x, t), x(first) = start.

    A step is taken where the root mean square of error / (atol + rtol |x|), over all
    entries of all rows, is at most 1: rows share their steps, and an entry's result
    depends on the others within the tolerance.

    Args:
        slope: (x, t scalar) -> dx/dt, like x.
        start: [...], float.
        max_steps: steps tried at most.

    Returns:
        x(last), like `start`, NaN where max_steps did not suffice; and how often
        `slope` was evaluated, int32: once, and 6 times a step that is tried.
    """
    dtype = start.dtype
    first, last = jnp.asarray(first, dtype), jnp.asarray(last, dtype)

    def norm(values, *sizes):
        size = jnp.stack([jnp.abs(x) for x in sizes]).max(0)
        return jnp.sqrt(jnp.mean((values / (atol + rtol * size)) ** 2))

    def body(carry):
        x, t, size, k, before, rejected, tried = carry
        size = jnp.minimum(size, last - t)
        slopes, ahead = _stages(slope, x, t, size, k)
        error = size * jnp.tensordot(jnp.asarray(ERROR, dtype), slopes, 1)
        ratio = norm(error, x, ahead)
        # A ratio that is not a number is no step.
        taken = ratio <= 1
        factor = _factor(ratio, before, rejected)
        reached = t + size
        reached = jnp.where(last - reached <= _blur(last), last, reached)
        return (
            jnp.where(taken, ahead, x),
            jnp.where(taken, reached, t),
            size * factor,
            jnp.where(taken, slopes[-1], k),
            jnp.where(taken, jnp.maximum(ratio, 1e-4), before),
            ~taken,
            tried + 1,
        )

    def goes_on(carry):
        return (carry[1] < last) & (carry[-1] < max_steps)

    k = slope(start, first)
    size = _first_step(norm(start, start), norm(k, start), last - first)
    zero = jnp.zeros((), jnp.int32)
    one = jnp.ones((), dtype)
    carry = (start, first, size.astype(dtype), k, one, jnp.asarray(False), zero)
    x, t, *_, tried = jax.lax.while_loop(goes_on, body, carry)
    return jnp.where(t < last, jnp.nan, x), 1 + 6 * tried


def _stages(slope, x, t, size, k):
    """The slopes [7, ...] of a step, the first of them k, and where it leads."""
    slopes = jnp.zeros((len(ERROR), *x.shape), x.dtype).at[0].set(k)

    def stage(carry, row):
        slopes, _ = carry
        number, weights, place = row
        ahead = x + size * jnp.tensordot(weights, slopes[:-1], 1)
        found = slope(ahead, t + place * size)
        return (slopes.at[number].set(found), ahead), None

    rows = (jnp.arange(1, len(ERROR)), STAGES.astype(x.dtype), PLACES.astype(x.dtype))
    (slopes, ahead), _ = jax.lax.scan(stage, (slopes, x), rows)
    return slopes, ahead


def _factor(ratio, before, rejected):
    """By what the next step is longer than this one."""
    taken = SAFETY * ratio**-NOW * before**BEFORE
    # No growth behind a step that was not taken.
    taken = jnp.clip(taken, LEAST, jnp.where(rejected, 1.0, MOST))
    again = jnp.clip(SAFETY * ratio ** (-1 / ORDER), LEAST, 1.0)
    factor = jnp.where(ratio <= 1, taken, again)
    return jnp.where(jnp.isfinite(ratio), factor, LEAST).astype(ratio.dtype)


def _first_step(place, slope, whole):
    """A hundredth of the place over the slope, both in tolerances."""
    small = (place < 1e-5) | (slope < 1e-5)
    found = jnp.where(small, 1e-6, 0.01 * place / jnp.where(small, 1, slope))
    return jnp.minimum(found, whole)


def _blur(last):
    """What rounding makes of a sum that is `last`."""
    return 4 * jnp.finfo(last.dtype).eps * jnp.maximum(jnp.abs(last), 1)
