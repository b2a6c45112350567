"""Refusing what a mixer does not do: one sentence for every mixer.

A mixer calls `check_request(SPEC, ctx)` first in `__call__` and, with `step=True`,
in `step`; it then handles everything that it did not refuse.
"""

from collections.abc import Iterable

from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerSpec


def check_request(
    spec: MixerSpec,
    ctx: Context,
    *,
    step: bool = False,
    mask: bool = False,
    hooks: Iterable[str] = (),
) -> None:
    """Raise UserError when `ctx` asks for what `spec` does not declare.

    Args:
        spec: whose capabilities count.
        ctx: the request.
        step: whether this is a decoding step.
        mask: whether the mixer honours `ctx.mask`.
        hooks: the `Hook.what` that it honours.
    """
    can = spec.capabilities
    if step and not can.decode:
        raise _refusal(spec, "has no decode form", "step", "called")
    if step and not ctx.causal:
        raise _refusal(spec, "decodes causally", "causal", False)
    if ctx.causal and not can.causal:
        raise _refusal(spec, "is not causal", "causal", True)
    if not ctx.causal and not can.bidirectional:
        raise _refusal(spec, "is only causal", "causal", False)
    check_memory(spec, ctx.memory)
    if ctx.segment_ids is not None and not can.segments:
        raise _refusal(
            spec, "knows no documents or padding", "segment_ids", ctx.segment_ids.shape
        )
    if ctx.prefix_len is not None and not can.prefix:
        raise _refusal(spec, "knows no prefix", "prefix_len", ctx.prefix_len.shape)
    if ctx.sequence_form is not None and not can.sequence:
        _check_sequence(spec, ctx)
    if ctx.mask is not None and not mask:
        raise _refusal(spec, "takes no further mask", "mask", ctx.mask)
    _check_grid(spec, ctx.grid, ctx.extra_tokens)
    hooks = tuple(hooks)
    for hook in ctx.hooks:
        if hook.what not in hooks:
            known = f"It has: {', '.join(hooks)}." if hooks else "It has none."
            raise UserError(f"{spec.name}: has no hook {hook.what!r}. {known}")


def _check_sequence(spec: MixerSpec, ctx: Context) -> None:
    """Raise UserError where devices share tokens as `spec` does not take them."""
    if not spec.capabilities.sequence_in_order:
        devices = "more" if ctx.rows is None else ctx.rows.mesh.shape["sequence"]
        raise _refusal(
            spec, "needs whole rows on each device", "config.mesh.sequence", devices
        )
    if ctx.sequence_form == "ring":
        name = "config.mesh.sequence_form"
        raise _refusal(spec, "takes tokens in order, as all_to_all", name, "ring")


def check_memory(spec: MixerSpec, memory) -> None:
    """Raise UserError when there is a memory and `spec` does no cross-attention."""
    if memory is not None and not spec.capabilities.cross:
        raise _refusal(spec, "has no cross-attention", "memory", memory.shape)


def _check_grid(spec: MixerSpec, grid, extra_tokens: int) -> None:
    """A mixer without grid ranks reads T as a sequence, whatever grid it flattens."""
    ranks = spec.capabilities.grid
    if grid is None and spec.capabilities.needs_grid:
        raise _refusal(spec, f"needs a grid of rank {ranks}", "grid", None)
    if grid is not None and ranks and len(grid) not in ranks:
        raise _refusal(spec, f"takes grids of rank {ranks}", "grid", grid)
    if grid is not None and ranks and extra_tokens:
        check_extra_tokens(spec, extra_tokens)


def check_extra_tokens(spec: MixerSpec, extra_tokens: int) -> None:
    """Raise UserError when tokens stand before a grid that must come alone."""
    can = spec.capabilities
    if extra_tokens and can.grid and not can.extra_tokens:
        raise UserError(
            f"{spec.name}: takes exactly the tokens of a grid; got extra_tokens="
            f"{extra_tokens} (class token and registers) before it. Set "
            "config.model.pool=mean and config.model.registers=0."
        )


def _refusal(spec: MixerSpec, rule: str, name: str, value) -> UserError:
    return UserError(
        f"{spec.name}: {rule}; got {name}={value}. "
        "Choose another mixer for this layer, or change the request."
    )
