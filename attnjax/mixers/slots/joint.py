"""Attention over the tokens of two streams that have maps of their own.

[o_a; o_b] = softmax([q_a; q_b] [k_a; k_b]^T / sqrt(D)) [v_a; v_b], where stream a makes
its queries, keys, values and outputs with other maps than stream b.

Source: Esser et al. (Stable Diffusion 3), arXiv 2403.03206, section 4 and figure 2b.
"""

import jax
import jax.numpy as jnp

from attnjax.core.context import Context, MixerOut
from attnjax.core.errors import UserError
from attnjax.mixers import attention
from attnjax.mixers.requests import check_request
from attnjax.mixers.slots import options, probes, reach
from attnjax.mixers.slots.base import Call, Slot

OWNER = "joint attention"


def check(choice) -> None:
    """Raise UserError for a mechanism or setting that two streams cannot have.

    Args:
        choice: a `models.mixer_choice.Choice`.
    """
    where = f"config.model.mixers.{choice.instance}"
    own = getattr(choice.module, "Mixer", None)
    if own not in (None, attention.Mixer):
        raise UserError(
            f"{where}: {OWNER} has two sets of maps of the softmax attention of "
            f"`attention`; got {choice.spec.name}, a mixer of its own. Use attention "
            "with its options, or an option of its output such as gated_attention."
        )
    config = choice.config if own else choice.module.preset(choice.config)
    for name, plain in (("cross", False), ("window", None)):
        if getattr(config, name) != plain:
            raise UserError(
                f"{where}.{name}: {OWNER} sees all tokens of both streams; got "
                f"{name}={getattr(config, name)}. Leave it out."
            )
    if config.positions == "alibi":
        raise UserError(
            f"{where}.positions: text and image are at no distance from each other; "
            "got positions=alibi. Use rope or none."
        )


def prepare(mixer: attention.Mixer, *, is_first: bool, has_output: bool) -> None:
    """Take away the parameters that a stream's layer has no use for, in place.

    Args:
        mixer: just built.
        is_first: whether its stream is the first one: what belongs to the common rows
            of weights, the sink logits, is that of the second.
        has_output: whether anything reads what its tokens get.

    Raises:
        UserError: for an option of the output that changes the scores or the weight
            map, which both streams share, or that reads or changes more than the
            stream's own heads.
    """
    asked = dict(heads=mixer.shape, dims=mixer.dims, owner=OWNER)
    why = "scores and weight map belong to both streams"
    options.refuse_changes(mixer.slots(), ("attend",), why=why, **asked)
    for slot in mixer.slots():
        if slot.enters or type(slot).reads is not Slot.reads:
            name = type(slot).__module__.rsplit(".", 1)[-1]
            raise UserError(
                f"{OWNER}: no option of the output changes what a layer reads, or "
                f"reads its weights; got type={name!r}. Leave it out."
            )
    if is_first:
        mixer.sink = None
    if has_output:
        return
    mixer.out = None
    kept = []
    for name in mixer.slot_names:
        try:
            slots = [getattr(mixer, name)]
            options.refuse_changes(slots, ("query", "key", "value"), why=why, **asked)
        except UserError:
            kept.append(name)
        else:
            delattr(mixer, name)
    mixer.slot_names = tuple(kept)


def attend(
    mixers: tuple[attention.Mixer, attention.Mixer],
    parts: tuple[jax.Array, jax.Array],
    ctx: Context,
) -> tuple[list[jax.Array | None], MixerOut]:
    """What each stream's tokens get of all tokens.

    Args:
        mixers: of the first and the second stream, as `prepare` leaves them. Scores,
            weight map and rotary positions are those of the second.
        parts: [B, M, C] and [B, N, C].
        ctx: of the joint row [B, M + N], the first stream's tokens in front. Hooks read
            and change joint rows; those of output options are not served.

    Returns:
        [B, M, C], or None where the first stream has no output, and [B, N, C]; what
        output options report is the mean of the streams that report it.
    """
    second = mixers[1]
    cut = parts[0].shape[1]
    probes.check_hooks(ctx, attention.HOOKS, owner=OWNER, is_step=False)
    check_request(attention.SPEC, ctx, mask=True, hooks=attention.HOOKS)
    whole, plain = Call(ctx), ctx.replace(hooks=(), interventions={})
    calls = (Call(plain), Call(plain))
    x = whole.probe("input", jnp.concatenate(parts, axis=1))
    inputs = (x[:, :cut], x[:, cut:])
    made = [
        (mixer.make_query(part, call), *mixer.make_key_value(part, call))
        for mixer, part, call in zip(mixers, inputs, calls, strict=True)
    ]
    query, key, value = (
        jnp.concatenate(pair, axis=1) for pair in zip(*made, strict=True)
    )
    query = whole.probe("query", query, head_axis=2)
    key = whole.probe("key", key, head_axis=2)
    value = whole.probe("value", value, head_axis=2)
    query, key = (second.rotate(a, ctx.positions) for a in (query, key))
    mask, operands = reach.full_pass(ctx, second.reach)
    heads = second.attend(x, (query, key, value), mask, operands, whole)
    cuts = (heads[:, :cut], heads[:, cut:])
    cuts = [
        _slotted(mixer, part, own, call)
        for mixer, part, own, call in zip(mixers, inputs, cuts, calls, strict=True)
    ]
    heads = whole.probe("heads", jnp.concatenate(cuts, axis=1), head_axis=2)
    cuts = (heads[:, :cut], heads[:, cut:])
    ys = [
        _projected(mixer, part, own, call)
        for mixer, part, own, call in zip(mixers, inputs, cuts, calls, strict=True)
    ]
    ys = _probed(ys, cut, whole)
    return ys, MixerOut(
        losses=_means(call.losses for call in calls),
        metrics=_means(call.metrics for call in calls),
        records=whole.records,
    )


def _slotted(mixer, x: jax.Array, heads: jax.Array, call: Call) -> jax.Array:
    if mixer.out is not None:
        for slot in mixer.slots():
            heads = slot.heads(x, heads, call)
    return heads


def _projected(mixer, x: jax.Array, heads: jax.Array, call: Call) -> jax.Array | None:
    if mixer.out is None:
        return None
    y = mixer.out(heads.reshape(*heads.shape[:2], -1))
    for slot in mixer.slots():
        y = slot.output(x, y, call)
    return y


def _probed(ys: list, cut: int, whole: Call) -> list:
    """The outputs after the hooks that name them; of one stream where the other has
    none."""
    if ys[0] is None:
        return [None, whole.probe("output", ys[1])]
    joined = whole.probe("output", jnp.concatenate(ys, axis=1))
    return [joined[:, :cut], joined[:, cut:]]


def _means(reports) -> dict[str, jax.Array]:
    found: dict[str, list] = {}
    for report in reports:
        for name, value in report.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
