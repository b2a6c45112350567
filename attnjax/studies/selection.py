"""Points and runs by their labels, as command lines name them: LABEL=VALUE,..."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from attnjax.core.errors import UserError, nearest
from attnjax.studies.table import text_of

FLAG = "--only"
# A comma that begins another label; values may have commas of their own.
_BETWEEN = re.compile(r",(?=[^,=]*=)")


def pairs(text: str, flag: str) -> list[tuple[str, str]]:
    """(label, value) of LABEL=VALUE,..., in order.

    Raises:
        UserError: a part without a value.
    """
    found = [part.partition("=") for part in _BETWEEN.split(text)]
    for name, equals, _ in found:
        if not equals:
            raise UserError(
                f"{flag}: must be LABEL=VALUE,...; got {text!r} ({name!r} has no "
                "value)."
            )
    return [(name.strip(), value.strip()) for name, _, value in found]


def selected(text: str, labels: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which of some points `--only` names: those that have each label, with one of the
    values that are given for it.

    Raises:
        UserError: a label or a value that no point has, or nothing that has them all.
    """
    wanted: dict[str, set[str]] = {}
    for name, value in pairs(text, FLAG):
        _check(name, value, labels)
        wanted.setdefault(name, set()).add(value)
    found = [
        all(n in one and text_of(one[n]) in values for n, values in wanted.items())
        for one in labels
    ]
    if not any(found):
        raise UserError(
            f"{FLAG}: must leave points; got {text!r}. No point has all of these "
            "together."
        )
    return found


def _check(name: str, value: str, labels: Sequence[Mapping[str, Any]]) -> None:
    known = sorted({label for one in labels for label in one})
    if name not in known:
        raise UserError(
            f"{FLAG}: must name labels of the points; got {name!r}. "
            f"{nearest(name, known)}"
        )
    values = sorted({text_of(one[name]) for one in labels if name in one})
    if value not in values:
        raise UserError(
            f"{FLAG}: must name values that points have; got {name}={value}. "
            f"{nearest(value, values)}"
        )
