"""Cutting one call into tiles: index arrays, operand tiles, scores of a tile.

Everything here works on heads-first arrays: q [B, H, T, D], k [B, K, S, D],
v [B, K, S, E]. `reference` uses one tile that covers everything.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels.masks import Tile
from attnjax.kernels.operands import UNIVERSAL, Operand, as_rank4
from attnjax.kernels.request import Request
from attnjax.kernels.spec import AttentionSpec

# A tile's place: (first query, number of queries, first key, number of keys); the
# firsts may be traced.
Place = tuple[jax.Array | int, int, jax.Array | int, int]


def heads_first(x: jax.Array) -> jax.Array:
    """[B, T, H, D] to [B, H, T, D], and back."""
    return jnp.swapaxes(x, 1, 2)


def place_queries(operands: Mapping[str, jax.Array], q_len: int) -> dict:
    """Turn `q_offset` into `q_positions`, so that one form of positions is left."""
    operands = dict(operands)
    if "q_offset" in operands:
        offset = jnp.reshape(operands.pop("q_offset"), (-1, 1)).astype(jnp.int32)
        steps = jnp.arange(q_len, dtype=jnp.int32)
        operands["q_positions"] = offset + steps[None, :]
    return operands


def declarations(spec: AttentionSpec) -> dict[str, Operand]:
    """Every operand that a spec may be given, by name."""
    return {operand.name: operand for operand in (*UNIVERSAL, *spec.operands)}


def of_tiles(spec: AttentionSpec, operands: Mapping[str, jax.Array]) -> dict:
    """The operands that tiles of scores read: all but the epilogue's."""
    late = {operand.name for operand in spec.epilogue_operands}
    return {name: x for name, x in operands.items() if name not in late}


def cut(array: jax.Array, axes: str, place: Place) -> jax.Array:
    """The part of an operand that lies in a tile, with its axes made rank 4."""
    if axes == "*":
        return array
    q_first, q_size, k_first, k_size = place
    for letter, first, size in (("t", q_first, q_size), ("s", k_first, k_size)):
        axis = axes.find(letter)
        if axis < 0 or array.shape[axis] in (1, size):
            continue
        array = jax.lax.dynamic_slice_in_dim(array, first, size, axis)
    return as_rank4(array, axes)


def index_tile(batch: int, num_heads: int, place: Place) -> Tile:
    """Index arrays at `place`, positions counting up, without operands."""
    q_first, q_size, k_first, k_size = place
    queries = jnp.arange(q_size, dtype=jnp.int32) + q_first
    keys = jnp.arange(k_size, dtype=jnp.int32) + k_first
    return Tile(
        b=jnp.arange(batch, dtype=jnp.int32)[:, None, None, None],
        h=jnp.arange(num_heads, dtype=jnp.int32)[None, :, None, None],
        q=queries[None, None, :, None],
        k=keys[None, None, None, :],
        operands={},
        contiguous=True,
    )


def make_tile(
    request: Request, operands: Mapping[str, jax.Array], place: Place
) -> Tile:
    """Index arrays and operand tiles at `place`."""
    known = declarations(request.spec)
    cuts = {
        name: cut(array, known[name].axes, place) for name, array in operands.items()
    }
    tile = index_tile(request.batch, request.num_heads, place)
    return dataclasses.replace(
        tile,
        q=cuts.pop("q_positions", tile.q),
        k=cuts.pop("k_positions", tile.k),
        operands=cuts,
        contiguous=not {"q_positions", "k_positions"} & set(operands),
    )


def visible(spec: AttentionSpec, tile: Tile) -> jax.Array | None:
    """The whole mask of a tile: the spec's and the key-validity operand's."""
    mask = spec.mask.visible(tile)
    valid = tile.operands.get("kv_mask")
    if valid is None or mask is None:
        return mask if valid is None else valid
    return mask & valid


def products(q: jax.Array, k: jax.Array, precision=None) -> jax.Array:
    """q.k for [B, H, t, D] and [B, K, s, D]: [B, H, t, s], kv heads not repeated."""
    b, h, t, d = q.shape
    kv_heads, s = k.shape[1], k.shape[2]
    grouped = q.reshape(b, kv_heads, h // kv_heads, t, d)
    out = jnp.einsum("bkgtd,bksd->bkgts", grouped, k, precision=precision)
    return out.reshape(b, h, t, s)


def mix(w: jax.Array, v: jax.Array, precision=None) -> jax.Array:
    """w v for [B, H, t, s] and [B, K, s, E]: [B, H, t, E]."""
    b, h, t, s = w.shape
    kv_heads, e = v.shape[1], v.shape[3]
    grouped = w.reshape(b, kv_heads, h // kv_heads, t, s)
    out = jnp.einsum("bkgts,bkse->bkgte", grouped, v, precision=precision)
    return out.reshape(b, h, t, e)


def collect(w: jax.Array, x: jax.Array, kv_heads: int) -> jax.Array:
    """x^T w for [B, H, t, s] and [B, H, t, E], summed over the heads that share a kv
    head: [B, K, E, s].

    The result has its features first: a product with the large side w transposed
    takes XLA's CPU code twice the time.
    """
    b, h, t, s = w.shape
    grouped_w = w.reshape(b, kv_heads, h // kv_heads, t, s)
    grouped_x = x.reshape(b, kv_heads, h // kv_heads, t, -1)
    return jnp.einsum("bkgte,bkgts->bkes", grouped_x, grouped_w)


def trained_tiles(
    spec: AttentionSpec, tile: Tile, shape: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Tiles of the score steps' operands, spread to `shape`; "table" ones whole.

    Spread, because a derivative per place can be dropped where the mask hides it
    before it is summed: a score function may be infinite there (a logarithm of a
    negative distance), and 0 * inf would spoil the sum.
    """
    return {
        operand.name: tile.operands[operand.name]
        if operand.axes == "*"
        else jnp.broadcast_to(tile.operands[operand.name], shape)
        for operand in spec.score_operands
    }


def score_chain(
    spec: AttentionSpec, tile: Tile
) -> Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]:
    """The spec's score steps as one function of (scores, trained operand tiles)."""

    def chain(s: jax.Array, trained: Mapping[str, jax.Array]) -> jax.Array:
        merged = dataclasses.replace(tile, operands=tile.operands | trained)
        for step in spec.score:
            s = step.apply(s, merged)
        return s

    return chain
