"""Attention over tokens shared out along a mesh axis, by exchanging heads for tokens.

Each device gives away all heads but some of its own tokens and gets some heads of all
tokens, computes them, and the exchange is undone (DeepSpeed Ulysses, arXiv 2309.14509).
Nothing is merged, so it takes every spec; heads must be enough to share.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import dispatch, epilogue, tiles
from attnjax.kernels.low_rank import widen, widened
from attnjax.kernels.operands import letters_of
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.target import Target, default_target

Arrays = Mapping[str, jax.Array]


def all_to_all(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    operands: Arrays | None = None,
    *,
    axis_name: str = "sequence",
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.attention` over tokens cut along a mesh axis; call it in `shard_map`.

    Arguments and result are those of `ring`, and every spec is taken. H must be a
    multiple of the devices n; K one too, or a divisor of n (keys are then sent to
    n / K devices).

    Raises:
        ValueError: when heads cannot be shared out.
    """
    target, dtype = target or default_target(), q.dtype
    size = jax.lax.axis_size(axis_name)
    given = {name: jnp.asarray(x) for name, x in (operands or {}).items()}
    if widened(spec):
        q, k, spec, given = widen(q, k, spec, given, target)
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(
            "all_to_all: H must be a multiple of the devices along the axis, and K one "
            f"too or a divisor of them; got H={heads}, K={kv_heads}, "
            f"{axis_name}={size}. Use ring."
        )
    if kv_heads % size:
        k, v = (jnp.repeat(x, size // kv_heads, axis=2) for x in (k, v))
    q, k, v = (_exchange(x, axis_name, (2, 1)) for x in (q, k, v))
    known = tiles.declarations(spec)
    inner = {
        name: _share(x, letters_of(known[name]), axis_name, heads)
        for name, x in tiles.of_tiles(spec, given).items()
    }
    core = dataclasses.replace(spec, epilogue=())
    options = {"implementation": implementation, "target": target}
    got = dispatch.attention(q, k, v, core, inner, **options)
    out, lse = got if spec.return_lse else (got, None)
    out = _exchange(out, axis_name, (1, 2))
    if spec.epilogue:
        wide = jnp.promote_types(out.dtype, jnp.float32)
        out = epilogue.run_steps(spec.epilogue, out.astype(wide), given)
    out = out.astype(dtype)
    return (out, _exchange(lse, axis_name, (1, 2))) if spec.return_lse else out


def _exchange(x: jax.Array, axis_name: str, axes: tuple[int, int]) -> jax.Array:
    """Give parts of the first axis away for more of the second."""
    return jax.lax.all_to_all(x, axis_name, *axes, tiled=True)


def _share(x: jax.Array, letters: str, axis_name: str, heads: int) -> jax.Array:
    """An operand of this device's tokens and all heads, as one of its heads and all
    tokens."""
    own = letters.find("h")
    by_head = own >= 0 and x.ndim == len(letters) and x.shape[own] > 1
    tokens = max(letters.find("t"), -1)
    if tokens < 0:
        tokens = letters.find("s")
    by_token = tokens >= 0 and x.ndim == len(letters) and x.shape[tokens] > 1
    if by_head and by_token:
        return _exchange(x, axis_name, (own, tokens))
    if by_token:
        return jax.lax.all_gather(x, axis_name, axis=tokens, tiled=True)
    if by_head:
        part = heads // jax.lax.axis_size(axis_name)
        first = jax.lax.axis_index(axis_name) * part
        return jax.lax.dynamic_slice_in_dim(x, first, part, own)
    return x
