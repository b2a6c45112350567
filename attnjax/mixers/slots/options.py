"""From `output=({"type": NAME, ...}, ...)` to the slots of mechanisms' files."""

import dataclasses
from pathlib import Path
from typing import Any

from attnjax.core import discovery, schema
from attnjax.core.errors import UserError
from attnjax.mixers.slots.base import Heads, Slot


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
