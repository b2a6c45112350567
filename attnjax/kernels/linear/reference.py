"""The recurrence as it reads, token by token: the oracle, and the step of decoding.

Memory of the backward pass O(T D E): every state is kept.
"""

import jax
import jax.numpy as jnp

from attnjax.kernels.linear.inputs import Inputs
from attnjax.kernels.linear.request import LinearRequest

NAME = "reference"
# Never chosen by "auto": it is asked for by name.
RANK: dict[str, int] = {}
_EXACT = jax.lax.Precision.HIGHEST


def supports(request: LinearRequest) -> str | None:
    """None: it computes every spec on every target."""
    del request


def run(request: LinearRequest, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """[B, T, K, G, E] and the last state [B, K, D, E]."""
    del request
    state, tokens = inputs.state, inputs._replace(state=None)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


def step(state: jax.Array, token: Inputs) -> tuple[jax.Array, jax.Array]:
    """One token: the arrays of `token` lack the axis T, its state is not read.

    Returns:
        the next state [B, K, D, E] and the output [B, K, G, E].
    """
    k, v = token.k, token.v
    if token.reset is not None:
        state = jnp.where(token.reset[:, None, None, None], 0, state)
    if token.log_decay is not None:
        state = jnp.exp(token.log_decay)[..., None] * state
    if token.beta is not None:
        held = jnp.einsum("bkd,bkde->bke", k, state, precision=_EXACT)
        v = token.beta[..., None] * (v - held)
    state = state + k[..., None] * v[..., None, :]
    out = jnp.einsum("bkgd,bkde->bkge", token.q, state, precision=_EXACT)
    return state, out
