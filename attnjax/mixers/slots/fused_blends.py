"""Heads moved by `blending` without their weights: exact, behind any kernel.

(1 - u) A V + u P V has V itself for P V (identity), the mean of the values that are
seen (uniform), the attention of mean queries, or attention behind another mask
(image_identity); a temperature divides scores.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from attnjax import kernels
from attnjax.core.context import Context, Hook
from attnjax.mixers.slots import blending, curves

FACTOR = "temperature_factor"
LINEAR = (
    blending.IDENTITY,
    blending.UNIFORM,
    blending.MEAN_QUERY,
    blending.IMAGE_IDENTITY,
)


def fits(hooks: Sequence[Hook], spec: kernels.AttentionSpec) -> bool:
    """Whether these hooks on scores and weights need none of them laid open."""
    if hooks and hooks[0].action == blending.TEMPERATURE and _is_plain(spec):
        hooks = hooks[1:]
    return not spec.epilogue and all(hook.action in LINEAR for hook in hooks)


def attention(
    hooks: Sequence[Hook],
    run: Callable,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    spec: kernels.AttentionSpec,
    operands: dict[str, jax.Array],
    ctx: Context,
):
    """What `run(q, k, v, spec, operands)` gives, its heads moved by hooks that fit.

    Log-sums, where `spec` asks for them, are those of the weights, not of a target.
    """
    query, key, value = qkv
    own_spec, own = spec, operands
    if hooks and hooks[0].action == blending.TEMPERATURE:
        own_spec, own = _tempered(hooks[0], query.shape[2], spec, operands, ctx)
        hooks = hooks[1:]
    out = run(*qkv, own_spec, own)
    if not hooks:
        return out
    heads, *log_sums = out if spec.return_lse else (out,)
    for hook in hooks:
        if hook.action in blending.OF_OWN_KEYS:
            blending.check_own_keys(hook, query.shape[1], key.shape[1])
        if hook.action == blending.IDENTITY:
            target = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
        elif hook.action == blending.UNIFORM:
            target = _mean(run, query, key, value, spec, operands)
        elif hook.action == blending.IMAGE_IDENTITY:
            alone = kernels.MaskFn(blending.AloneInImage(ctx.extra_tokens))
            left = dataclasses.replace(spec, mask=spec.mask & alone, return_lse=False)
            target = run(*qkv, left, operands)
        else:
            target = _of_mean_queries(run, qkv, spec, operands, ctx)
        heads = blending.of_heads(hook, ctx, heads, target)
    return (heads, *log_sums) if spec.return_lse else heads


def _is_plain(spec: kernels.AttentionSpec) -> bool:
    """Whether weights are softmax of scores and no more."""
    return spec.weight_map == kernels.Softmax() and spec.reweight is None


def _tempered(hook, num_heads, spec, operands, ctx):
    """The spec whose scores, when all is done to them, are divided by tau."""
    step = kernels.ScoreFn(_times, (FACTOR,), ("head",))
    factor = curves.inverse(blending.shares(hook, ctx, num_heads))
    factor = factor.astype(jnp.float32)
    score = (*spec.score, step)
    return dataclasses.replace(spec, score=score), operands | {FACTOR: factor}


def _times(s, b, h, q, k, factor):
    del b, h, q, k
    return s * factor


def _mean(run, query, key, x, spec, operands) -> jax.Array:
    """The mean of rows x [B, S, N, E] that each query sees, [B, T or 1, H, E]."""
    if spec.mask == kernels.Full() and "kv_mask" not in operands:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        flat = jnp.mean(x, axis=1, keepdims=True, dtype=wide)
        return jnp.repeat(flat, query.shape[2] // x.shape[2], axis=2)
    # Scores of 0 weigh all keys that the mask shows alike.
    plain = kernels.AttentionSpec(mask=spec.mask)
    gone = {o.name for o in spec.operands} - {o.name for o in plain.operands}
    kept = {name: a for name, a in operands.items() if name not in gone}
    return run(jnp.zeros_like(query), key, x, plain, kept)


def _of_mean_queries(run, qkv, spec, operands, ctx) -> jax.Array:
    """P V [B, T or 1, H, E], the queries of P means of those that a query sees."""
    query, key, value = qkv
    mean = _mean(run, query, jnp.zeros_like(query), query, spec, operands)
    mean = mean.astype(query.dtype)
    of_rows = {o.name for o in spec.weight_map.operands}
    is_one = not spec.score and spec.reweight is None and set(operands) <= of_rows
    if not is_one or ctx.sequence_form is not None:
        mean = jnp.broadcast_to(mean, query.shape)
    spec = dataclasses.replace(spec, return_lse=False)
    return run(mean, key, value, spec, operands)
