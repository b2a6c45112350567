"""The flags by which front doors say how images are drawn."""

from typing import Any

from attnjax.core.errors import UserError, unknown

# Flag -> the field of `training.settings.DrawConfig`, whose default one has that is not
# given.
FIELDS = {
    "guidance": "guidance",
    "rescale": "rescale",
    "perturb_scale": "perturb_scale",
    "perturb": "perturb",
    "perturb_strength": "perturb_strength",
    "perturb_heads": "perturb_heads",
    "perturb_interval": "perturb_interval",
    "sampler": "sampler",
    "num_steps": "steps",
    "seed": "seed",
}


def given(flags: Any) -> dict[str, Any]:
    """The settings of `LoadedDenoiser.draw` that a command line gives."""
    found = {FIELDS[name]: getattr(flags, name) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def check_names(settings: dict[str, Any]) -> None:
    """Raise UserError for a setting that a draw does not have."""
    for name in settings:
        if name not in FIELDS.values():
            raise unknown("draw", "setting", name, FIELDS.values())


def refuse(flags: Any, names, reason) -> None:
    """Raise UserError where one of these flags is given.

    Args:
        names: of the flags.
        reason: what the message says of (flag, value).
    """
    for name in names:
        value = getattr(flags, name)
        if value is not None:
            raise UserError(reason(name, value))
