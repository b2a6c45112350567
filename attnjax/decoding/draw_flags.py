"""The flags by which front doors say how images are drawn."""

import dataclasses
from typing import Any

from attnjax.core.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class DrawFlags:
    """The flags, which front doors inherit.

    Attributes:
        guidance: images: scale of classifier-free guidance (none: 1, without).
        rescale: images: share of a guided prediction, 0 to 1, that is brought back to
            the spread of the unguided one (none: 0).
        perturb_scale: images: scale w of guidance by a pass with perturbed attention,
            added to what guidance gives (none: 0, without).
        perturb: images: what its attention is moved to: identity, uniform, largest,
            mean_query, slerp, nlerp, log_linear or temperature; with text in the row
            also image_identity or image_gathered (none: identity).
        perturb_strength: images: how far, above 0 to 1, or the temperature (none: 1).
        perturb_heads: images: which heads: all, or layers with heads, as 2:0,1;3:all
            (none: all).
        perturb_interval: images: noise levels, 0 is clean and 1 noise, in which it acts
            (none: 0 1).
        perturb_decay: images: what w loses from noise to data (none: 0).
        sampler: images: its name (none: ddim for Gaussian processes, heun for flows).
        sampler_options: images: its options, as diffusion=linear,last_step=tweedie
            (none: its own).
        num_steps: images: steps of the sampler, of dopri5 at most (none: 50).
        seed: of the noise (none: 0).
    """

    guidance: float | None = None
    rescale: float | None = None
    perturb_scale: float | None = None
    perturb: str | None = None
    perturb_strength: float | None = None
    perturb_heads: str | None = None
    perturb_interval: tuple[float, float] | None = None
    perturb_decay: float | None = None
    sampler: str | None = None
    sampler_options: str | None = None
    num_steps: int | None = None
    seed: int | None = None


# Flag -> the field of `training.settings.DrawConfig`, whose default one has that is not
# given.
FIELDS = {
    field.name: {"num_steps": "steps"}.get(field.name, field.name)
    for field in dataclasses.fields(DrawFlags)
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
