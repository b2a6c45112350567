"""From `output=({"type": NAME, ...}, ...)` to the slots of mechanisms' files."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from attnjax.core import discovery, schema
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.kernels import AttentionSpec
from attnjax.mixers.slots.base import Call, Heads, Slot


@dataclasses.dataclass(frozen=True)
class Option:
    """One entry of `output`.

    Attributes:
        name: the attribute (and parameter path) of its slot: "slot_<type>".
        slot: the mechanism's `Slot` class.
        config: its `Config`.
        heads: the sizes before it.
    """

    name: str
    slot: type[Slot]
    config: Any
    heads: Heads


def resolve(entries: tuple[dict[str, Any], ...], heads: Heads) -> list[Option]:
    """Find, fill and check every entry.

    Raises:
        UserError: an entry without "type", an unknown mechanism or option, or a
            mechanism that is no slot option.
    """
    found: list[Option] = []
    for index, entry in enumerate(entries):
        path = f"attention.output[{index}]"
        given = dict(entry)
        kind = given.pop("type", None)
        if kind is None:
            raise UserError(
                f"{path}: needs a type, the name of a mechanism; got {entry}. "
                'Write {"type": "gated_attention", ...}.'
            )
        module = discovery.find(str(kind), owner=path)
        slot = getattr(module, "Slot", None)
        if slot is None:
            raise UserError(
                f"{path}: must name a mechanism with a Slot; got type={kind!r}. Name "
                "it in config.model.layers instead: it is a mixer of its own."
            )
        filled = schema.resolve(module.Config, given, path=path)
        config = schema.build(module.Config, filled, path=path)
        name = f"slot_{Path(str(kind)).stem}"
        taken = sum(option.name.startswith(name) for option in found)
        found.append(
            Option(f"{name}_{taken + 1}" if taken else name, slot, config, heads)
        )
        heads = slot.heads_after(config, heads)
    return found


def heads_after(options: list[Option], heads: Heads) -> Heads:
    """Sizes of the heads after every option."""
    for option in options:
        heads = option.slot.heads_after(option.config, option.heads)
    return heads


def check_weight_maps(own: str, options: list[Option]) -> None:
    """Refuse two weight maps in one layer.

    Args:
        own: `weight_map` of the layer.
        options: its entries of `output`.

    Raises:
        UserError: naming the first two.
    """
    maps = [f"weight_map={own!r}"] if own != "softmax" else []
    for option in options:
        name = option.slot.weight_map_of(option.config)
        if name is not None:
            maps.append(f"{option.name.removeprefix('slot_')} (weight_map={name!r})")
    if len(maps) > 1:
        raise UserError(
            "attention: a layer has one weight map; got "
            f"{maps[0]} and {maps[1]}. Keep one of them."
        )


def refuse_changes(
    slots: list, places: tuple[str, ...], heads: Heads, dims, *, owner: str, why: str
) -> None:
    """Refuse output options that change what a mixer does not let them change.

    Args:
        slots: the built options of a layer.
        places: of "query", "key", "value" and "attend", those that must stay as they
            are; each option is asked with a single token.
        heads: the layer's sizes.
        dims: the model's.
        owner: the mixer, for the message.
        why: the rule, for the message.

    Raises:
        UserError: naming the option and the place.
    """
    x = jnp.zeros((1, 1, dims.embed_dim), dtype_of(dims.dtype))
    call = Call(Context(positions=jnp.zeros((1, 1), jnp.int32)))
    shapes = {
        "query": (heads.num_heads, heads.head_dim),
        "key": (heads.num_kv_heads, heads.head_dim),
        "value": (heads.num_kv_heads, heads.value_dim),
    }
    for slot in slots:
        for place in places:
            if place == "attend":
                spec, operands = AttentionSpec(), {}
                after = slot.attend(x, spec, operands, call)
                same = after[0] is spec and after[1] is operands
            else:
                array = jnp.zeros((1, 1, *shapes[place]), x.dtype)
                same = getattr(slot, place)(x, array, call) is array
            if not same:
                name = type(slot).__module__.rsplit(".", 1)[-1]
                raise UserError(
                    f"{owner}: {why}; got an option of output, type={name!r}, that "
                    f"changes the {place}. Give it another place, or use attention."
                )
