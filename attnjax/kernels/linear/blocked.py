"""The recurrence in chunks of L tokens, in pure JAX: three phases, its own backward.

1. Each chunk alone, all in parallel: what it adds to the outputs (`own`), how its
   outputs read the state S before it (`read`), what it makes of S (`keep`, `add`).
2. A scan over chunks: S' = keep S + add.
3. Outputs, in parallel: own + read S.

With u_t = beta_t (v_t - k_t^T diag(alpha_t) S_{t-1}) the delta rule is the plain
recurrence with values u, and inside a chunk u solves (I + A) U = beta (V - K S) for
a strictly lower A: the only thing that the delta rule adds.
Source: Yang et al., arXiv 2406.06484, eq. 7-11; arXiv 2412.06464, section 3.3.

Backward: from the inputs alone; phases 1 and 2 are computed again, then a scan goes
back over the chunks. Memory O(T (L + D + E)) and one state a chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnjax.kernels.linear.inputs import Inputs
from attnjax.kernels.linear.request import LinearRequest
from attnjax.kernels.linear.triangles import (
    decayed_products,
    mix,
    rows,
    unit_inverse,
)

NAME = "blocked"
RANK = {"cpu": 10, "gpu": 10, "tpu": 10}


class Chunks(NamedTuple):
    """What phase 1 finds, [B, K, N, ...] of N chunks.

    Attributes:
        own: [B, K, N, L, G, E].
        read: [B, K, N, L, G, D].
        keep: [B, K, N, D, D], or its diagonal [B, K, N, 1 or D, 1]; None is I.
        add: [B, K, N, D, E].
    """

    own: jax.Array
    read: jax.Array
    keep: jax.Array | None
    add: jax.Array


def supports(request: LinearRequest) -> str | None:
    """None: it computes every spec on every target."""
    del request


def run(request: LinearRequest, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """[B, T, K, G, E] and the last state [B, K, D, E]."""
    length = request.length
    size = min(request.spec.chunk_size, 1 << (length - 1).bit_length())
    state, reset = inputs.state, inputs.reset
    parts = inputs._replace(state=None, reset=None)
    parts = jax.tree.map(partial(_split, size=size), parts)
    if reset is not None:
        reset = _split(reset[:, :, None], size)
    out, state = _chunked(parts, reset, state)
    out = jnp.moveaxis(out, 1, 3)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], state


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, T, K, ...] -> [B, K, N, L, ...]; zeros at the end leave the state alone."""
    pad = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 3, 1)


@jax.custom_vjp
def _chunked(parts: Inputs, reset, state) -> tuple[jax.Array, jax.Array]:
    chunks = _each_chunk(parts, reset)
    last, states = _carry(chunks, state)
    return chunks.own + mix(chunks.read, states), last


def _forward(parts, reset, state):
    return _chunked(parts, reset, state), (parts, reset, state)


def _backward(kept, cotangents):
    parts, reset, state = kept
    d_out, d_last = cotangents
    chunks, pull = jax.vjp(lambda parts: _each_chunk(parts, reset), parts)
    _, states = _carry(chunks, state)
    d_read = rows(d_out, states)
    d_states = jnp.einsum("...lgd,...lge->...de", chunks.read, d_out)
    d_state, d_add = _carry_back(chunks.keep, d_states, d_last)
    d_keep = _gradient_of_keep(chunks.keep, d_add, states)
    (d_parts,) = pull(Chunks(d_out, d_read, d_keep, d_add))
    return d_parts, None, d_state


_chunked.defvjp(_forward, _backward)


def _gradient_of_keep(keep, d_add, states) -> jax.Array | None:
    """The gradient of `keep`, in its shape."""
    if keep is None:
        return None
    if keep.shape[-1] > 1:
        return d_add @ states.mT
    full = jnp.sum(d_add * states, axis=-1, keepdims=True)
    shared = [axis for axis in range(full.ndim) if keep.shape[axis] < full.shape[axis]]
    return jnp.sum(full, axis=shared, keepdims=True)


def _each_chunk(parts: Inputs, reset) -> Chunks:
    """Phase 1."""
    q, k, v, log_decay, beta = parts[:5]
    g = None if log_decay is None else jnp.cumsum(log_decay, axis=-2)
    spans = _spans(reset)
    weights = decayed_products(q, k, g)
    if spans is not None:
        weights = jnp.where(spans.same[..., :, None, :], weights, 0)
    from_start = _fade(g, spans and spans.first, k.dtype)
    to_end = _fade(
        None if g is None else g[..., -1:, :] - g, spans and spans.last, k.dtype
    )
    keep = None if from_start is None else from_start[..., -1, :, None]
    read = q if from_start is None else q * from_start[..., None, :]
    late = k if to_end is None else k * to_end
    if beta is not None:
        early = k if from_start is None else k * from_start
        v, erase = _solve(k, v, early, g, beta, spans)
        read = read - mix(weights, erase)
        keep = _diagonal(keep, k) - late.mT @ erase
    return Chunks(mix(weights, v), read, keep, late.mT @ v)


def _solve(k, v, early, g, beta, spans) -> tuple[jax.Array, jax.Array]:
    """U = (I + A)^-1 beta (V - K S) as the part without S, and the factor of S."""
    a = decayed_products(k[..., :, None, :], k, g)[..., 0, :]
    if spans is not None:
        a = jnp.where(spans.same, a, 0)
    inverse = unit_inverse(jnp.tril(beta[..., None] * a, -1))
    inverse = inverse * beta[..., None, :]
    return inverse @ v, inverse @ early


def _diagonal(keep, k: jax.Array) -> jax.Array:
    eye = jnp.eye(k.shape[-1], dtype=k.dtype)
    return eye if keep is None else eye * keep


class _Spans(NamedTuple):
    """Documents in a chunk: masks [B, 1, N, L] and [B, 1, N, L, L].

    Attributes:
        same: whether two tokens are of one document.
        first: whether a token is of the document that the state before is of.
        last: whether a token is of the document that the state after is of.
    """

    same: jax.Array
    first: jax.Array
    last: jax.Array


def _spans(reset) -> _Spans | None:
    if reset is None:
        return None
    number = jnp.cumsum(reset.astype(jnp.int32), axis=-1)
    same = number[..., :, None] == number[..., None, :]
    return _Spans(same, number == 0, number == number[..., -1:])


def _fade(exponent, seen, dtype) -> jax.Array | None:
    """exp(exponent) where seen, [..., L, 1 or D]; None for ones."""
    if seen is not None:
        seen = seen[..., None]
        if exponent is None:
            return seen.astype(dtype)
    if exponent is None:
        return None
    faded = jnp.exp(exponent)
    return faded if seen is None else jnp.where(seen, faded, 0)


def _apply(keep, state: jax.Array) -> jax.Array:
    if keep is None:
        return state
    return keep * state if keep.shape[-1] == 1 else keep @ state


def _carry(chunks: Chunks, state) -> tuple[jax.Array, jax.Array]:
    """Phase 2: the last state, and the states before the chunks [B, K, N, D, E]."""

    def chunk(state, part):
        keep, add = part
        return _apply(keep, state) + add, state

    parts = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (chunks.keep, chunks.add))
    last, states = jax.lax.scan(chunk, state, parts)
    return last, jnp.moveaxis(states, 0, 2)


def _carry_back(keep, d_states, d_last) -> tuple[jax.Array, jax.Array]:
    """Gradients of the first state and of what each chunk adds."""

    def chunk(d_after, part):
        keep, d_read = part
        if keep is not None and keep.shape[-1] > 1:
            keep = keep.mT
        return _apply(keep, d_after) + d_read, d_after

    parts = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (keep, d_states))
    first, d_add = jax.lax.scan(chunk, d_last, parts, reverse=True)
    return first, jnp.moveaxis(d_add, 0, 2)
