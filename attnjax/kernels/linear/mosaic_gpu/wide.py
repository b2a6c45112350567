"""Wide heads in parts that a kernel takes.

Columns of a state have nothing to do with one another: values are cut and outputs put
side by side. Its rows only meet in the delta rule: without it queries and keys are cut
too, and outputs are added up.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.kernels.linear.inputs import Inputs

Run = Callable[[Inputs], tuple[jax.Array, jax.Array]]


def in_parts(
    run: Run, inputs: Inputs, *, most: int, normalise: bool
) -> tuple[jax.Array, jax.Array]:
    """[B, T, K, G, E] and the last state [B, K, D, E] of `run` on parts.

    Args:
        run: the recurrence for D and E up to `most` (one more column with a
            normaliser).
        inputs: with D up to `most` if they have beta.
        normalise: whether the last column of v is 1, which all parts need.
    """
    outs, states = [], []
    for first in range(0, inputs.v.shape[3] - normalise, most):
        part = _columns(inputs, first, most, normalise=normalise)
        out, state = _by_rows(run, part, most)
        outs.append(out)
        states.append(state)
    return _side_by_side(outs, normalise), _side_by_side(states, normalise)


def _columns(inputs: Inputs, first: int, most: int, *, normalise: bool) -> Inputs:
    """The inputs with some columns of the values, and the last with `normalise`."""
    if inputs.v.shape[3] - normalise <= most:
        return inputs

    def cut(x):
        end = x.shape[-1] - normalise
        part = x[..., first : min(first + most, end)]
        return jnp.concatenate([part, x[..., end:]], axis=-1) if normalise else part

    return inputs._replace(v=cut(inputs.v), state=cut(inputs.state))


def _by_rows(run: Run, inputs: Inputs, most: int):
    dim = inputs.k.shape[3]
    if dim <= most:
        return run(inputs)
    total, states = 0, []
    for first in range(0, dim, most):
        rows = slice(first, first + most)
        decay = inputs.log_decay
        if decay is not None and decay.shape[3] > 1:
            decay = decay[..., rows]
        part = inputs._replace(
            q=inputs.q[..., rows],
            k=inputs.k[..., rows],
            log_decay=decay,
            state=inputs.state[:, :, rows],
        )
        out, state = run(part)
        total = total + out.astype(inputs.state.dtype)
        states.append(state)
    return total, jnp.concatenate(states, axis=2)


def _side_by_side(parts: list[jax.Array], normalise: bool) -> jax.Array:
    if len(parts) == 1:
        return parts[0]
    if normalise:
        parts = [x[..., :-1] for x in parts[:-1]] + parts[-1:]
    return jnp.concatenate(parts, axis=-1)
