"""A decode state of constant size: the first tokens of a document and the last ones.

Tokens are numbered within their document. Token n of the first s lies at place n;
a later one at s + (n - s) mod R, where it takes the place of token n - R.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnjax.mixers.slots.cache import last_document


class Rolling(NamedTuple):
    """s + R places.

    Attributes:
        key: [B, s + R, K, D].
        value: [B, s + R, K, E].
        index: int32 [B, s + R], the number of the token that lies there, -1 for none.
        segment: int32 [B], the current document, 0 before the first token.
        count: int32 [B], tokens of the current document so far.
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array
    segment: jax.Array
    count: jax.Array


class Entries(NamedTuple):
    """Keys that queries may attend to, S of them in any order.

    Attributes:
        key: [B, S, K, D].
        value: [B, S, K, E].
        index: int32 [B, S], the token's number in its document.
        segments: int32 [B, S], its document; 0 hides it.
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array
    segments: jax.Array


def empty(batch: int, places: int, heads, dtype) -> Rolling:
    """The state before the first token, of `places` = s + R."""
    shape = (batch, places, heads.num_kv_heads)
    return Rolling(
        key=jnp.zeros((*shape, heads.head_dim), dtype),
        value=jnp.zeros((*shape, heads.value_dim), dtype),
        index=jnp.full((batch, places), -1, jnp.int32),
        segment=jnp.zeros((batch,), jnp.int32),
        count=jnp.zeros((batch,), jnp.int32),
    )


def number(ids: jax.Array, state: Rolling) -> jax.Array:
    """int32 [B, T], the number of each new token in its document; -1 for padding.

    Args:
        ids: int32 [B, T], documents of the new tokens.
        state: before them; its document goes on if they have the same id.
    """
    real = ids != 0
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    latest = jax.lax.cummax(jnp.where(real, places, -1), axis=1)
    filled = jnp.take_along_axis(ids, jnp.maximum(latest, 0), axis=1)
    filled = jnp.where(latest < 0, state.segment[:, None], filled)
    before = jnp.concatenate([state.segment[:, None], filled[:, :-1]], axis=1)
    passed = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    # Real tokens of this step before the document began; none while the old one runs.
    began = jnp.where(real & (ids != before), passed, -1)
    began = jax.lax.cummax(began, axis=1)
    index = jnp.where(began < 0, state.count[:, None] + passed, passed - began)
    return jnp.where(real, index, -1)


def entries(state: Rolling) -> Entries:
    """What the state holds."""
    segments = jnp.where(state.index >= 0, state.segment[:, None], 0)
    return Entries(state.key, state.value, state.index, segments)


def join(state: Rolling, new: Entries) -> Entries:
    """What the state holds, then the new tokens."""
    both = zip(entries(state), new, strict=True)
    return Entries(*(jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in both))


def write(state: Rolling, new: Entries, *, sinks: int) -> Rolling:
    """Put the new tokens of the last document in their places.

    Another document than the state's empties it first. Of more tokens than fit, the
    first `sinks` of the document and the last R are kept.
    """
    places = state.index.shape[1]
    last = last_document(new.segments, state.segment)
    here = (new.segments != 0) & (new.segments == last[:, None])
    stays = last == state.segment
    count = jnp.max(jnp.where(here, new.index + 1, 0), axis=1)
    count = jnp.where(here.any(axis=1), count, jnp.where(stays, state.count, 0))
    window = places - sinks
    kept = here & ((new.index < sinks) | (new.index >= count[:, None] - window))
    ring = sinks + (new.index - sinks) % window
    place = jnp.where(new.index < sinks, new.index, ring)
    # A place beyond the end is dropped by the scatter.
    place = jnp.where(kept, place, places)
    row = jnp.arange(place.shape[0])[:, None]

    def put(whole, part):
        return whole.at[row, place].set(part.astype(whole.dtype), mode="drop")

    return Rolling(
        key=put(state.key, new.key),
        value=put(state.value, new.value),
        index=put(jnp.where(stays[:, None], state.index, -1), new.index),
        segment=last,
        count=count,
    )
