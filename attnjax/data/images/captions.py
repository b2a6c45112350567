"""What is on an image, in words: made from the name of its class.

A source of images may say it itself, by a function `caption(name)` in its file.
"""

from collections.abc import Sequence
from typing import Any

from attnjax.data import source

_FEW = ("zero", "one", "two", "three", "four")
_DIGITS = (*_FEW, "five", "six", "seven", "eight", "nine")


def of_classes(config: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The caption of each class of a source.

    Args:
        config: of the source, `config.data`.
        names: of the classes.
    """
    module = source.source_module(config.name, source.IMAGES)
    caption = getattr(module, "caption", plain)
    return tuple(caption(name) for name in names)


def plain(name: str) -> str:
    """The name itself, its underscores as spaces."""
    return name.replace("_", " ")


def character(name: str) -> str:
    """One character, in words where it has some.

    Example:
        >>> [character(name) for name in "78aA+"]
        ['a seven', 'an eight', 'the letter a', 'the capital letter A', 'the sign +']
    """
    if name in "0123456789":
        word = _DIGITS[int(name)]
        return f"{'an' if word == 'eight' else 'a'} {word}"
    if not name.isalpha():
        return f"the sign {name}"
    return f"the {'capital ' if name.isupper() else ''}letter {name}"
