"""Which runs one program can train together: what may differ between their configs."""

from collections.abc import Mapping, Sequence

import numpy as np

from attnjax.core import mappings
from attnjax.core.errors import UserError
from attnjax.training.optimizers import FLOAT32_ONLY, TRACEABLE

SEED = "train.seed"
# Settings that change the optimizer's state or the step where they are absent or zero.
_SHAPING = ("weight_decay", "clip_norm", "ema_decay", "decay_steps")
_INTEGERS = ("warmup_steps", "decay_steps")
_LARGEST = 2**31 - 2  # the seed and the one after it are int32


def common(config: Mapping) -> str:
    """What runs of one group have in common, as a text: equal texts may be grouped.

    Args:
        config: resolved.
    """
    optim = config["optim"]
    free = {f"optim.{name}" for name in _traceable(config)}
    shape = {name: bool(optim[name]) for name in _SHAPING}
    seed = config["train"]["seed"]
    if 0 <= seed <= _LARGEST:
        free.add(SEED)
    # None where a number is expected cannot be traced.
    free -= {f"optim.{name}" for name in TRACEABLE if optim[name] is None}
    return mappings.canonical([mappings.without(config, free), shape])


def _traceable(config: Mapping) -> tuple[str, ...]:
    if config["model"]["param_dtype"] == "float32":
        return TRACEABLE
    return tuple(name for name in TRACEABLE if name not in FLOAT32_ONLY)


def values(configs: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """What differs between the runs of a group.

    Args:
        configs: resolved.

    Returns:
        "seed" and names of `optimizers.TRACEABLE` -> [N]; "seed" is always there.

    Raises:
        UserError: when they differ in what one program cannot vary, by name.
    """
    refuse(configs)
    found = {"seed": np.asarray([c["train"]["seed"] for c in configs], np.int32)}
    for name in TRACEABLE:
        own = [c["optim"][name] for c in configs]
        if any(value != own[0] for value in own):
            dtype = np.int32 if name in _INTEGERS else np.float32
            found[name] = np.asarray(own, dtype)
    return found


def refuse(configs: Sequence[Mapping]) -> None:
    """Raise UserError unless one program can train all of these runs."""
    if len({common(config) for config in configs}) <= 1:
        return
    names = different(configs)
    free = {SEED, *(f"optim.{name}" for name in TRACEABLE)}
    other = [name for name in names if name not in free]
    if other:
        shown = ", ".join(f"config.{name}" for name in other)
        raise UserError(
            "vectorize: runs that are trained together may differ in config.train.seed "
            f"and in numbers of config.optim; these differ in {shown}. Group them by "
            "it, or leave vectorize out."
        )
    shown = ", ".join(f"config.{name}" for name in names)
    raise UserError(
        "vectorize: one program cannot vary between these values; got different "
        f"{shown}. Seeds must be in [0, {_LARGEST}]; weight_decay, clip_norm, "
        "ema_decay and decay_steps must be set (not none, not 0) in all runs of a "
        f"group or in none; {', '.join(FLOAT32_ONLY)} vary with "
        "config.model.param_dtype=float32 alone."
    )


def different(configs: Sequence[Mapping]) -> list[str]:
    """Dotted names of the settings that are not the same in all configs."""
    flat = [mappings.flatten(config) for config in configs]
    names = sorted(set().union(*flat))
    return [n for n in names if any(f.get(n) != flat[0].get(n) for f in flat)]
