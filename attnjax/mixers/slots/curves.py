"""Rows of weights moved along curves, or sharpened: maps that need the weights.

A row holds shares: not negative, and their sum, with the share `rest` that a sink
takes, is 1. Where the curve leads to the identity, u is 0 at A and 1 at I.

Source: "Fine-Grained Perturbation Guidance via Attention Head Selection", arXiv
2506.10978, and its code.
"""

import jax
import jax.numpy as jnp

# What the identity has beside its diagonal where its logarithm is taken.
OFF_DIAGONAL = 1e-6
# The smallest temperature: all but ties have one weight left.
COLDEST = 1e-5


def slerp(
    weights: jax.Array, share: jax.Array, *, seen: jax.Array, rest: jax.Array
) -> jax.Array:
    """The Fisher-Rao geodesic at equal speed: (a I + b sqrt(A))^2 with
    a = sin(u th)/sin(th), b = sin((1 - u) th)/sin(th), cos(th) = sqrt(A_ii).

    Args:
        weights: A [B, H, T, T].
        share: u in [0, 1], broadcasts to `weights`.
        seen: bool, broadcasts to `weights`: which keys a query sees.
        rest: [B, H, T, 1], what a sink has of the row.

    Returns:
        As `weights`; a row and the sink's part sum to 1.
    """
    del seen, rest
    own = jnp.diagonal(weights, axis1=-2, axis2=-1)[..., None]
    angle = jnp.arctan2(_root(jnp.maximum(1 - own, 0)), _root(own))

    def part(of):
        # sin(of angle)/sin(angle), which is `of` at angle 0.
        return of * jnp.sinc(of * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)

    eye = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    return (part(share) * eye + part(1 - share) * _root(weights)) ** 2


def nlerp(
    weights: jax.Array, share: jax.Array, *, seen: jax.Array, rest: jax.Array
) -> jax.Array:
    """The same great circle at another speed: (u I + (1 - u) sqrt(A))^2, its rows
    brought back to the sum 1. Arguments and result: see `slerp`."""
    del seen
    eye = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    found = (share * eye + (1 - share) * _root(weights)) ** 2
    total = jnp.sum(found, axis=-1, keepdims=True) + (1 - share) ** 2 * rest
    return found / jnp.where(total > 0, total, 1)


def log_linear(
    weights: jax.Array, share: jax.Array, *, seen: jax.Array, rest: jax.Array
) -> jax.Array:
    """I_e^u A^(1-u), its rows brought back to the sum 1; I_e is the identity with 1e-6
    beside its diagonal. Arguments and result: see `slerp`."""
    eye = jnp.eye(weights.shape[-1], dtype=bool)
    far = jnp.log(jnp.asarray(OFF_DIAGONAL, weights.dtype))
    logs = share * jnp.where(eye, 0, far) + (1 - share) * _log(weights)
    return _normalised(logs, seen, share * far + (1 - share) * _log(rest), rest)


def tempered(
    weights: jax.Array, temperature: jax.Array, *, seen: jax.Array, rest: jax.Array
) -> jax.Array:
    """softmax(log(A)/tau): tau = 1 is A, less is sharper, more is flatter.

    Args:
        temperature: tau, broadcasts to `weights`; below 1e-5 it counts as 1e-5.
        weights, seen, rest: see `slerp`, with keys of any number.
    """
    factor = inverse(temperature)
    return _normalised(factor * _log(weights), seen, factor * _log(rest), rest)


def inverse(temperature: jax.Array) -> jax.Array:
    """1/tau, by which scores are multiplied; at most 1e5."""
    return 1 / jnp.maximum(temperature, COLDEST)


def largest(weights: jax.Array) -> jax.Array:
    """1 at the largest weight of a row, the first of equal ones; 0 in empty rows."""
    chosen = jnp.argmax(weights, axis=-1)
    found = jax.nn.one_hot(chosen, weights.shape[-1], dtype=weights.dtype)
    return jnp.where(jnp.any(weights != 0, axis=-1, keepdims=True), found, 0)


def _normalised(logs, seen, rest_log, rest) -> jax.Array:
    """exp(logs) of what is seen, over its sum and that of the sink."""
    rest_log = jnp.where(rest > 0, rest_log, -jnp.inf)
    logs = jnp.where(seen, logs, -jnp.inf)
    peak = jnp.maximum(jnp.max(logs, axis=-1, keepdims=True), rest_log)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    found = jnp.exp(logs - peak)
    total = jnp.sum(found, axis=-1, keepdims=True) + jnp.exp(rest_log - peak)
    return found / jnp.where(total > 0, total, 1)


def _log(weights: jax.Array) -> jax.Array:
    """log, of the smallest number where it would be infinite."""
    return jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))


def _root(weights: jax.Array) -> jax.Array:
    """The square root, with the gradient 0 at 0."""
    positive = weights > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, weights, 1)), 0)
