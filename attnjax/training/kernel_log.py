"""Which kernels a run's training step holds, and why not the others."""

from collections.abc import Sequence
from typing import Any

from attnjax import kernels


def records(choices: Sequence[kernels.Choice]) -> list[dict[str, Any]]:
    """One JSON record for each kind of call: {"call", "used", "shapes", "others"}.

    Args:
        choices: what a `kernels.watching` saw while the step was traced.
    """
    found = []
    for choice in choices:
        family = kernels.linear.dispatch
        if choice.family == "attention":
            family = kernels.dispatch
        reasons = family.reasons(choice.request)
        if choice.used == kernels.choices.EXPLICIT:
            reasons = [f"every kernel: {choice.reason}"]
        row = {
            "call": choice.family,
            "used": choice.used,
            "shapes": choice.shapes,
            "others": [x for x in reasons if not x.startswith(f"{choice.used}:")],
        }
        if row not in found:
            found.append(row)
    return found


def lines(choices: Sequence[kernels.Choice]) -> list[str]:
    """The same for people, without reasons; calls that look alike are one line."""
    told = (f"{c.family.replace('_', ' ')} by {c}" for c in choices)
    return list(dict.fromkeys(told))
