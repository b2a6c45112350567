"""From the words of a schedule to mechanisms, their configs and their modules."""

import dataclasses
from typing import Any

from attnjax.core import discovery, schema
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims, MixerSpec
from attnjax.mixers.requests import check_extra_tokens


@dataclasses.dataclass(frozen=True)
class Choice:
    """One instance of `config.model.mixers`: a mechanism and its settings.

    Attributes:
        instance: the word in the schedule.
        module: the mechanism's Python module.
        config: its own frozen Config.
    """

    instance: str
    module: Any
    config: Any

    @property
    def spec(self) -> MixerSpec:
        """The catalog entry, less what the settings take away."""
        return self.module.SPEC.of(self.config)

    def make(self, dims: MixerDims, *, rngs):
        """Build the nnx module; a file of slot options makes its Attention."""
        if hasattr(self.module, "Mixer"):
            return self.module.Mixer(self.config, dims, rngs=rngs)
        attention = discovery.find("attention")
        return attention.Mixer(self.module.preset(self.config), dims, rngs=rngs)


def resolve_mixers(names: tuple[str, ...], mixers: dict[str, Any]) -> dict[str, dict]:
    """Fill `config.model.mixers` for every word of the schedule.

    Args:
        names: the schedule.
        mixers: {instance: {"type": catalog name or path, option: value, ...}}.

    Returns:
        {instance: {"type": ..., every option}}, JSON values only.

    Raises:
        UserError: for an unknown mechanism or option, or an instance that no layer
            uses (it would do nothing).
    """
    unused = sorted(set(mixers) - set(names))
    if unused:
        raise UserError(
            f"config.model.mixers: {', '.join(unused)} is in no layer; the schedule "
            f"uses {', '.join(sorted(set(names)))}. Name it in config.model.layers "
            "or remove it."
        )
    resolved = {}
    for name in dict.fromkeys(names):
        given = dict(mixers.get(name, {}))
        path = f"config.model.mixers.{name}"
        owner = f"{path}.type" if "type" in given else "config.model.layers"
        kind = str(given.pop("type", name))
        module = discovery.find(kind, owner=owner)
        options = schema.resolve(module.Config, given, path=path)
        resolved[name] = {"type": kind, **options}
    return resolved


def choices(mixers: dict[str, dict]) -> dict[str, Choice]:
    """{instance: Choice} of a resolved `config.model.mixers`."""
    made = {}
    for name, given in mixers.items():
        options = dict(given)
        module = discovery.find(options.pop("type"))
        path = f"config.model.mixers.{name}"
        config = schema.build(module.Config, options, path=path)
        made[name] = Choice(name, module, config)
    return made


def check_causal(made: dict[str, Choice]) -> None:
    """Refuse mechanisms and settings that a causal model has no use for.

    Raises:
        UserError: naming the instance, and the options that take causality away.
    """
    _check_direction(made, "causal", "a language model is causal")


def check_on_grid(made: dict[str, Choice], rank: int, *, extra_tokens: int) -> None:
    """Refuse mechanisms and settings that a model on a grid of tokens has no use for.

    Args:
        rank: axes of the grid.
        extra_tokens: tokens before it.

    Raises:
        UserError: for one that is only causal, takes grids of another rank, or must be
            given the grid's tokens alone.
    """
    _check_direction(made, "bidirectional", "an image model is bidirectional")
    for name, choice in made.items():
        ranks = choice.spec.capabilities.grid
        if ranks and rank not in ranks:
            raise UserError(
                f"config.model.mixers.{name}: {choice.spec.name} takes grids of rank "
                f"{ranks}; got rank {rank}. Choose another mixer for its layers."
            )
        check_extra_tokens(choice.spec, extra_tokens)


def _check_direction(made: dict[str, Choice], wanted: str, rule: str) -> None:
    """Refuse what lacks the capability `wanted`, or loses it by its settings."""
    for name, choice in made.items():
        if getattr(choice.spec.capabilities, wanted):
            continue
        lacks = choice.module.SPEC.lacks
        why = (lacks(choice.config) if lacks else {}).get(wanted)
        raise UserError(
            f"config.model.mixers.{name}: {rule}, and {choice.module.SPEC.name} is not"
            + (f" with {why}" if why else ". Choose another mixer for its layers.")
        )
