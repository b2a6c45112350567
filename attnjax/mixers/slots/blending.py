"""Weights A moved to others A' by a number of each head.

    identity    (1 - u) A + u I: every token at itself
    uniform     (1 - u) A + u P, P the mean over the keys that a query sees
    largest     (1 - u) A + u P, P one-hot at the largest weight of a row
    mean_query  (1 - u) A + u P, P the weights of the mean of the queries of the tokens
                that a query sees: of all, where nothing is masked
    image_identity  (1 - u) A + u P, P of a place in the grid the weights over itself
                and the tokens in front of the grid alone; of those tokens it is A
    image_gathered  (1 - u) A + u P, P of a place in the grid A with all that it gives
                to the grid at itself; of the tokens in front it is A
    slerp, nlerp, log_linear  curves from A (u = 0) to the identity (u = 1) in `curves`
    temperature  softmax(log(A)/tau); its number is tau, and 1 is A

The first two, mean_query and image_identity need no A, since A' V = (1 - u) A V +
u P V, nor does a temperature, which divides scores (`fused_blends`). The tokens in
front of the grid, as the text of a joint row, are `Context.extra_tokens`.

Source: u = 1, identity: Ahn et al. (perturbed-attention guidance), arXiv 2403.17377;
mean query: Hong, arXiv 2408.00760; the others, and sets of heads: arXiv 2506.10978
(its II-identity is image_identity, II-identity-renormalise image_gathered).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError
from attnjax.mixers.slots import curves

PREFIX = "blend_"
IDENTITY, UNIFORM = "blend_identity", "blend_uniform"
LARGEST, MEAN_QUERY = "blend_largest", "blend_mean_query"
IMAGE_IDENTITY, IMAGE_GATHERED = "blend_image_identity", "blend_image_gathered"
TEMPERATURE = "blend_temperature"
CURVES = {
    "blend_slerp": curves.slerp,
    "blend_nlerp": curves.nlerp,
    "blend_log_linear": curves.log_linear,
    TEMPERATURE: curves.tempered,
}
OF_IMAGE = (IMAGE_IDENTITY, IMAGE_GATHERED)
ACTIONS = (IDENTITY, UNIFORM, LARGEST, MEAN_QUERY, *OF_IMAGE, *CURVES)
TARGETS = tuple(action.removeprefix(PREFIX) for action in ACTIONS)
# The diagonal is that of tokens and their own keys.
OF_OWN_KEYS = (
    IDENTITY,
    MEAN_QUERY,
    *OF_IMAGE,
    "blend_slerp",
    "blend_nlerp",
    "blend_log_linear",
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a mechanism tells of its rows of weights [B, H, T, S].

    Attributes:
        seen: bool, broadcasts to the weights: which keys a query sees.
        rest: [B, H, T, 1], the share that a sink takes of a row; None where rows are
            not shares of 1 (`curves`).
        smoothed: the weights [B, H, T, S] of queries that are means of all queries, by
            the weights of the means [B, H, T, T].
        among: the weights of the same queries where they see, of what they see, only
            the keys that a bool says, which broadcasts to the weights.
    """

    seen: jax.Array
    rest: jax.Array | None
    smoothed: Callable[[jax.Array], jax.Array]
    among: Callable[[jax.Array], jax.Array]


def neutral(action: str) -> float:
    """The number that changes nothing."""
    return 1.0 if action == TEMPERATURE else 0.0


def shares(hook: Hook, ctx: Context, num_heads: int) -> jax.Array:
    """The number of every head, float [H]; the neutral one of heads that the hook does
    not name.

    The hook's array is one number, one a head [N], or one a layer and head
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
    others = jnp.full((num_heads,), neutral(hook.action), given.dtype)
    return others.at[jnp.asarray(named)].set(own)


def of_weights(
    hook: Hook, ctx: Context, weights: jax.Array, *, rows: Rows | None
) -> jax.Array:
    """A' [B, H, T, S] of weights A, written out.

    Args:
        rows: what is known of them; None where the mechanism does not tell.

    Raises:
        UserError: for what needs own keys with other keys than the queries' own, and
            what needs more of the rows than the mechanism tells.
    """
    share = shares(hook, ctx, weights.shape[1]).astype(weights.dtype)[:, None, None]
    if hook.action in OF_OWN_KEYS:
        check_own_keys(hook, weights.shape[2], weights.shape[3])
    _check_rows(hook, rows)
    if hook.action in CURVES:
        curve = CURVES[hook.action]
        return curve(weights, share, seen=rows.seen, rest=rows.rest)
    if hook.action == IDENTITY:
        target = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    elif hook.action == LARGEST:
        target = curves.largest(weights)
    elif hook.action == IMAGE_IDENTITY:
        place = jnp.arange(weights.shape[-1])
        target = rows.among(AloneInImage(ctx.extra_tokens).at(place[:, None], place))
    elif hook.action == IMAGE_GATHERED:
        target = gathered(weights, ctx.extra_tokens)
    else:
        target = mean_over_seen(rows.seen, weights)
        target = target if hook.action == UNIFORM else rows.smoothed(target)
    return (1 - share) * weights + share * target


@dataclasses.dataclass(frozen=True)
class AloneInImage:
    """Which keys are left where every place of the grid sees itself alone of them all.

    Attributes:
        extra_tokens: tokens in front of the grid; they see all, and all see them.
    """

    extra_tokens: int

    def __call__(self, b, h, q, k):
        """bool, as `kernels.MaskFn` asks for it."""
        del b, h
        return self.at(q, k)

    def at(self, q, k):
        """bool of indices of queries and keys that broadcast against one another."""
        return (q == k) | (q < self.extra_tokens) | (k < self.extra_tokens)


def gathered(weights: jax.Array, extra_tokens: int) -> jax.Array:
    """Weights [B, H, T, T] with all that a place of the grid gives to the grid at
    itself; what it gives to the extra tokens in front, and their own rows, stay."""
    text, image = jnp.split(weights[:, :, extra_tokens:], [extra_tokens], axis=-1)
    own = jnp.sum(image, axis=-1, keepdims=True) * jnp.eye(
        image.shape[-1], dtype=weights.dtype
    )
    moved = jnp.concatenate([text, own], axis=-1)
    return jnp.concatenate([weights[:, :, :extra_tokens], moved], axis=2)


def mean_over_seen(seen: jax.Array, weights: jax.Array) -> jax.Array:
    """Weights, like `weights`, that are the same for all keys that a query sees."""
    seen = jnp.broadcast_to(seen, weights.shape).astype(weights.dtype)
    count = jnp.sum(seen, axis=-1, keepdims=True)
    return seen / jnp.where(count > 0, count, 1)


def of_heads(
    hook: Hook, ctx: Context, heads: jax.Array, target: jax.Array
) -> jax.Array:
    """(1 - u) A V + u P V [B, T, H, E] of heads A V.

    Args:
        heads: [B, T, H, E].
        target: P V, broadcasts to `heads`.
    """
    share = shares(hook, ctx, heads.shape[2])[:, None]
    wide = jnp.promote_types(heads.dtype, jnp.float32)
    share, target = share.astype(wide), target.astype(wide)
    return ((1 - share) * heads.astype(wide) + share * target).astype(heads.dtype)


def check_own_keys(hook: Hook, queries: int, keys: int) -> None:
    """Refuse a diagonal where keys are not those of the queries' own tokens."""
    if queries != keys:
        raise UserError(
            f"hook {hook.name!r}: {hook.action} needs self-attention, a key for each "
            f"query; got {queries} queries and {keys} keys. Use another layer, or "
            "action='blend_uniform'."
        )


def _check_rows(hook: Hook, rows: Rows | None) -> None:
    """Refuse what needs to know more of the rows."""
    if hook.action in (IDENTITY, LARGEST, IMAGE_GATHERED):
        return
    if rows is None:
        raise UserError(
            f"hook {hook.name!r}: {hook.action} needs a mechanism that tells which "
            "keys a query sees; this one does not. Use action='blend_identity'."
        )
    if hook.action in CURVES and rows.rest is None:
        raise UserError(
            f"hook {hook.name!r}: {hook.action} needs rows that softmax makes, shares "
            "of 1; those of this layer come from another weight map or are taken "
            "again. Use action='blend_identity'."
        )
