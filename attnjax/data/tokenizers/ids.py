"""Ids as they are: for data whose tokenizer is not at hand.

Text is the ids as numbers with spaces between, so prompts and samples still work.
"""

from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data.tokenizers.base import Base, Building, id_dtype


class IdTokenizer(Base):
    """Ids below `vocab_size`, written as numbers."""

    is_text = False  # bytes of this text say nothing of the data

    def __init__(self, vocab_size: int, separator: int | None = None):
        self.vocab_size = vocab_size
        self.separator = separator

    def encode(self, text: str) -> np.ndarray:
        """[numbers] unsigned.

        Raises:
            UserError: a word that is not a number below `vocab_size`.
        """
        words = text.split()
        for word in words:
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise UserError(
                    "data: text for tokenizer='ids' must be numbers from 0 to "
                    f"{self.vocab_size - 1}; got {word!r}. Write e.g. '12 7 430'."
                )
        return np.array([int(word) for word in words], id_dtype(self.vocab_size))

    def decode(self, ids: Any) -> str:
        """The numbers with spaces between."""
        return " ".join(str(number) for number in np.asarray(ids).tolist())

    def to_json(self) -> dict[str, Any]:
        """Its kind, size and separator."""
        size, end = self.vocab_size, self.separator
        return {"type": "ids", "vocab_size": size, "separator": end}


def identity(argument: str) -> dict[str, Any]:
    """The size is part of the name."""
    return {"vocab_size": _size(argument)}


def build(argument: str, building: Building) -> IdTokenizer:
    """`ids:SIZE`, or `ids` where the data knows how many ids it has.

    Raises:
        UserError: no positive size, or none at all for text.
    """
    size = _size(argument) or building.vocab_size
    if size is None:
        raise UserError(
            "data: text needs a tokenizer that reads text; got tokenizer='ids'. "
            "Use bytes, chars, bpe:SIZE or json:PATH; ids is for tokens:GLOB."
        )
    return IdTokenizer(size, building.separator)


def from_json(stored: dict[str, Any]) -> IdTokenizer:
    """What `to_json` described."""
    return IdTokenizer(stored["vocab_size"], stored["separator"])


def _size(argument: str) -> int | None:
    if not argument:
        return None
    if not argument.isdecimal() or int(argument) < 1:
        raise UserError(
            "data: the size of an ids vocabulary must be a positive number; got "
            f"tokenizer={'ids:' + argument!r}. Write e.g. ids:50257."
        )
    return int(argument)
