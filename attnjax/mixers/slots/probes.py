"""Probes and interventions at one place of a mixer (`core.context.Hook`)."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError, unknown
from attnjax.mixers.slots import blending

INTERVENTIONS = {
    "scale": lambda array, operand: array * operand,
    "add": lambda array, operand: array + operand,
    "replace": lambda array, operand: jnp.broadcast_to(operand, array.shape),
}
ACTIONS = ("record", *INTERVENTIONS, *blending.ACTIONS)


def check_hooks(
    ctx: Context, known: Iterable[str], *, owner: str, is_step: bool
) -> None:
    """Refuse hooks that nothing would honour.

    Args:
        ctx: its `hooks` and `interventions` are checked.
        known: every `Hook.what` that this layer has.
        owner: the mixer, for messages.
        is_step: in a decoding step, which returns no records.

    Raises:
        UserError: unknown `what` or `action`, a record or a blend in a decoding step,
            a blend of other arrays than weights, or an intervention without its
            operand.
    """
    known = tuple(known)
    for hook in ctx.hooks:
        if hook.what not in known:
            raise unknown(owner, "hook", hook.what, known)
        if hook.action not in ACTIONS:
            raise unknown(owner, "hook action", hook.action, ACTIONS)
        if hook.action == "record" and is_step:
            raise UserError(
                f"{owner}: records come from the full pass; got hook "
                f"{hook.name!r} (action='record') in a decoding step. Run the model "
                "on the whole sequence."
            )
        if hook.action in blending.ACTIONS:
            _check_blend(hook, owner, is_step)
        if hook.action != "record" and hook.name not in ctx.interventions:
            raise UserError(
                f"{owner}: the intervention {hook.name!r} needs its array; got "
                f"interventions={sorted(ctx.interventions)}. Put it in "
                f"Context.interventions[{hook.name!r}]."
            )


def _check_blend(hook: Hook, owner: str, is_step: bool) -> None:
    if hook.what != "weights":
        raise UserError(
            f"{owner}: {hook.action} changes 'weights'; got hook {hook.name!r} "
            f"(what={hook.what!r}). Use what='weights'."
        )
    if is_step:
        raise UserError(
            f"{owner}: {hook.action} acts on the full pass; got hook {hook.name!r} in "
            "a decoding step. Run the model on the whole sequence."
        )


def intervene(
    ctx: Context,
    what: str,
    array: jax.Array,
    *,
    head_axis: int | None,
    rows: blending.Rows | None = None,
) -> jax.Array:
    """`array` after every intervention on `what`, in the order of the hooks.

    Operands broadcast against `array`, or, with `hook.heads`, against those heads;
    those of blends are shares (`blending.shares`).

    Args:
        rows: of weights: what the mechanism tells of them.
    """
    for hook in ctx.hooks:
        if hook.what != what or hook.action == "record":
            continue
        if hook.action in blending.ACTIONS:
            if head_axis != 1 or array.ndim != 4:
                raise UserError(
                    f"hook {hook.name!r}: {hook.action} needs weights of heads over "
                    f"keys, [B, H, T, S]; these have shape={array.shape}."
                )
            array = blending.of_weights(hook, ctx, array, rows=rows)
            continue
        change = INTERVENTIONS[hook.action]
        operand = jnp.asarray(ctx.interventions[hook.name], array.dtype)
        if hook.heads is None:
            array = _fitting(hook, change, array, operand)
            continue
        place = _heads_place(hook, array, head_axis)
        array = array.at[place].set(_fitting(hook, change, array[place], operand))
    return array


def records(
    ctx: Context, what: str, array: jax.Array, *, head_axis: int | None
) -> dict[str, jax.Array]:
    """{hook name: array or the hook's heads of it} of the hooks that record `what`."""
    found = {}
    for hook in ctx.hooks:
        if hook.what == what and hook.action == "record":
            whole = hook.heads is None
            found[hook.name] = (
                array if whole else array[_heads_place(hook, array, head_axis)]
            )
    return found


def _fitting(hook: Hook, change, array: jax.Array, operand: jax.Array) -> jax.Array:
    try:
        fits = jnp.broadcast_shapes(array.shape, operand.shape) == array.shape
    except ValueError:
        fits = False
    if not fits:
        raise UserError(
            f"hook {hook.name!r}: its array must broadcast to {hook.what} "
            f"{array.shape}; got shape={operand.shape}."
        )
    return change(array, operand)


def _heads_place(hook: Hook, array: jax.Array, head_axis: int | None) -> tuple:
    if head_axis is None:
        raise UserError(
            f"hook {hook.name!r}: {hook.what!r} has no heads; got heads={hook.heads}. "
            "Use heads=None."
        )
    count = array.shape[head_axis]
    if any(not 0 <= head < count for head in hook.heads):
        raise UserError(
            f"hook {hook.name!r}: heads of {hook.what!r} are 0 to {count - 1}; got "
            f"heads={hook.heads}."
        )
    return (slice(None),) * head_axis + (jnp.asarray(hook.heads),)
