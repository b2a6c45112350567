"""Weights moved towards a fixed map P: A' = (1 - u) A + u P, with u of each head.

P is the identity, or the mean over the keys that a query sees. Since
A' V = (1 - u) A V + u P V, the heads of a layer need no A for it.

Source: u = 1, identity: Ahn et al. (perturbed-attention guidance), arXiv 2403.17377;
other u, the mean, and sets of heads: arXiv 2506.10978.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError

IDENTITY, UNIFORM = "blend_identity", "blend_uniform"
ACTIONS = (IDENTITY, UNIFORM)


def shares(hook: Hook, ctx: Context, num_heads: int) -> jax.Array:
    """u of every head, float [H]; 0 of heads that the hook does not name.

    The hook's array is one share, one a head [N], or one a layer and head
    [layers, N] of which this layer takes its row; N is H, or the number of
    `hook.heads`.

    Raises:
        UserError: for another shape, or heads that are not there.
    """
    given = jnp.asarray(ctx.interventions[hook.name])
    named = tuple(range(num_heads)) if hook.heads is None else tuple(hook.heads)
    if any(not 0 <= head < num_heads for head in named):
        raise UserError(
            f"hook {hook.name!r}: heads of 'weights' are 0 to {num_heads - 1}; got "
            f"heads={hook.heads}."
        )
    if given.ndim > 2 or (given.ndim and given.shape[-1] != len(named)):
        raise UserError(
            f"hook {hook.name!r}: its array must be a share, one for each of the "
            f"{len(named)} heads, or [layers, {len(named)}]; got shape={given.shape}."
        )
    own = given[ctx.layer_index] if given.ndim == 2 else given
    if hook.heads is None:
        return jnp.broadcast_to(own, (num_heads,))
    return jnp.zeros((num_heads,), given.dtype).at[jnp.asarray(named)].set(own)


def of_weights(
    hook: Hook, ctx: Context, weights: jax.Array, *, seen: jax.Array | None
) -> jax.Array:
    """A' [B, H, T, S] of weights A, written out.

    Args:
        seen: bool, broadcasts to `weights`: which keys a query sees; None where the
            mechanism does not tell.

    Raises:
        UserError: for the identity with other keys than the queries' own, and for the
            mean without `seen`.
    """
    share = shares(hook, ctx, weights.shape[1]).astype(weights.dtype)[:, None, None]
    if hook.action == IDENTITY:
        check_own_keys(hook, weights.shape[2], weights.shape[3])
        target = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    elif seen is None:
        raise UserError(
            f"hook {hook.name!r}: blend_uniform needs a mechanism that tells which "
            "keys a query sees; this one does not. Use action='blend_identity'."
        )
    else:
        seen = jnp.broadcast_to(seen, weights.shape).astype(weights.dtype)
        count = jnp.sum(seen, axis=-1, keepdims=True)
        target = seen / jnp.where(count > 0, count, 1)
    return (1 - share) * weights + share * target


def of_heads(
    hook: Hook,
    ctx: Context,
    heads: jax.Array,
    value: jax.Array,
    mean: Callable[[], jax.Array],
) -> jax.Array:
    """A' V [B, T, H, E] of heads A V, without A.

    Args:
        heads: [B, T, H, E].
        value: [B, S, K, E].
        mean: gives the mean of the values that each query sees, and broadcasts to
            `heads`; called for blend_uniform alone.
    """
    share = shares(hook, ctx, heads.shape[2])[:, None]
    if hook.action == IDENTITY:
        check_own_keys(hook, heads.shape[1], value.shape[1])
        target = jnp.repeat(value, heads.shape[2] // value.shape[2], axis=2)
    else:
        target = mean()
    wide = jnp.promote_types(heads.dtype, jnp.float32)
    share, target = share.astype(wide), target.astype(wide)
    return ((1 - share) * heads.astype(wide) + share * target).astype(heads.dtype)


def check_own_keys(hook: Hook, queries: int, keys: int) -> None:
    """Refuse the identity where keys are not those of the queries' own tokens."""
    if queries != keys:
        raise UserError(
            f"hook {hook.name!r}: blend_identity needs self-attention, a key for each "
            f"query; got {queries} queries and {keys} keys. Use another layer, or "
            "action='blend_uniform'."
        )
