"""The decode states of `Attention`: keys and values of every token so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnjax.core.errors import UserError


class Cache(NamedTuple):
    """Keys and values by place in the row, written in place; L places.

    Attributes:
        key: [B, L, K, D], with norm and positions applied.
        value: [B, L, K, E].
        positions: int32 [B, L], the token's position in its document.
        segments: int32 [B, L], its document; 0 for padding and places not written.
        segment: int32 [B], the current document, 0 before the first token.
        length: int32 [], places written.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    segments: jax.Array
    segment: jax.Array
    length: jax.Array


class Memory(NamedTuple):
    """The decode state of cross-attention: the memory's keys and values.

    Attributes:
        key: [B, S, K, D].
        value: [B, S, K, E].
    """

    key: jax.Array
    value: jax.Array


def empty(batch: int, max_len: int, heads, dtype) -> Cache:
    """The state before the first token."""
    shape = (batch, max_len, heads.num_kv_heads)
    return Cache(
        key=jnp.zeros((*shape, heads.head_dim), dtype),
        value=jnp.zeros((*shape, heads.value_dim), dtype),
        positions=jnp.zeros((batch, max_len), jnp.int32),
        segments=jnp.zeros((batch, max_len), jnp.int32),
        segment=jnp.zeros((batch,), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def document_ids(
    segment_ids: jax.Array | None, segment: jax.Array, length: int
) -> jax.Array:
    """int32 [B, T] ids of new tokens; without ids they continue the document."""
    if segment_ids is not None:
        return segment_ids.astype(jnp.int32)
    return jnp.maximum(segment, 1)[:, None] * jnp.ones((1, length), jnp.int32)


def last_document(ids: jax.Array, segment: jax.Array) -> jax.Array:
    """int32 [B], the last id of each row that is not padding, or `segment`."""
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(ids != 0, places, -1), axis=1)
    found = jnp.take_along_axis(ids, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return jnp.where(last < 0, segment, found)


def append(
    cache: Cache,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    positions: jax.Array,
) -> Cache:
    """Write T tokens after those that are there.

    Raises:
        UserError: when T alone exceeds the cache. The room left at run time is the
            caller's business: `init_state` was told the longest sequence.
    """
    room = cache.key.shape[1]
    if key.shape[1] > room:
        raise UserError(
            f"attention: a step holds at most max_len tokens; got {key.shape[1]} "
            f"tokens, max_len={room}. Call init_state with more room."
        )
    at = cache.length
    zero = jnp.zeros_like(at)

    def write(whole, part):
        place = (zero, at) + (zero,) * (whole.ndim - 2)
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), place)

    return Cache(
        key=write(cache.key, key),
        value=write(cache.value, value),
        positions=write(cache.positions, jnp.broadcast_to(positions, ids.shape)),
        segments=write(cache.segments, ids),
        segment=last_document(ids, cache.segment),
        length=at + jnp.int32(key.shape[1]),
    )
