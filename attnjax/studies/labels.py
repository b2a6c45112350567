"""Labels of runs that no sweep has labelled: the config values in which they differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attnjax.core import mappings
from attnjax.training import identity

SEED = "train.seed"


def from_configs(
    configs: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Labels that tell runs apart.

    Args:
        configs: resolved, one for each run.
        names: of the runs, different for each; a label where configs do not suffice.

    Returns:
        For each run "seed", and every value that all configs have and not all have
        alike. A value that only some have (an option of one mechanism) is a label only
        where runs could not be told apart without it. Keys are cut to their last part
        where that is clear.
    """
    flat = [mappings.flatten(_identity(config)) for config in configs]
    keys = sorted({key for one in flat for key in one} - {SEED})
    differing = [key for key in keys if len({_text(one, key) for one in flat}) > 1]
    chosen = [key for key in differing if all(key in one for one in flat)]
    for key in differing:
        if key not in chosen and _groups(flat, [*chosen, key]) > _groups(flat, chosen):
            chosen.append(key)
    if not chosen and all("model.layers" in one for one in flat):
        chosen = ["model.layers"]
    short = _short(chosen)
    found = [{short[key]: _label(one.get(key)) for key in chosen} for one in flat]
    for labels, one in zip(found, flat, strict=True):
        if SEED in one:
            labels["seed"] = one[SEED]
    if len({_text({"": labels}, "") for labels in found}) < len(found):
        found = [{"run": name, **one} for name, one in zip(names, found, strict=True)]
    return found


def _identity(config: Mapping[str, Any]) -> dict:
    return mappings.without(dict(config), identity.EXCLUDES)


def _groups(flat: Sequence[dict], keys: Sequence[str]) -> int:
    """How many runs `keys` and the seed tell apart."""
    return len({tuple(_text(one, key) for key in (*keys, SEED)) for one in flat})


def _text(one: dict, key: str) -> str:
    return json.dumps(one[key], sort_keys=True) if key in one else ""


def _short(keys: Sequence[str]) -> dict[str, str]:
    lasts = [key.rpartition(".")[2] for key in keys]
    taken = {"seed", "run"}
    return {
        key: last if lasts.count(last) == 1 and last not in taken else key
        for key, last in zip(keys, lasts, strict=True)
    }


def _label(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return "none" if value is None else value
    if isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        return " ".join(map(str, value))
    return json.dumps(value, sort_keys=True)
