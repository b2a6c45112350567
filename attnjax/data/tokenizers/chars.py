"""One id a character, as in nanoGPT's shakespeare-char: the train split's alphabet."""

from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data.tokenizers.base import Base, Building, id_dtype, training_text
from attnjax.data.tokenizers.registry import no_argument


class CharTokenizer(Base):
    """Ids are places in a sorted alphabet. No separator."""

    def __init__(self, alphabet: str):
        """`alphabet`: distinct characters; kept sorted by code point."""
        self._points = np.unique(_points(alphabet))
        self.vocab_size = len(self._points)

    def encode(self, text: str) -> np.ndarray:
        """[characters] unsigned.

        Raises:
            UserError: a character that is not in the alphabet.
        """
        points = _points(text)
        places = np.searchsorted(self._points, points)
        inside = np.minimum(places, self.vocab_size - 1)
        foreign = points[self._points[inside] != points]
        if len(foreign):
            shown = ", ".join(f"{chr(p)!r} (U+{p:04X})" for p in np.unique(foreign)[:5])
            raise UserError(
                "data: every character must occur in the train split with "
                f"tokenizer='chars'; got {shown}. Leave them out, or train with "
                "tokenizer=bytes."
            )
        return places.astype(id_dtype(self.vocab_size))

    def decode(self, ids: Any) -> str:
        """The characters of the ids."""
        points = self._points[np.asarray(ids, np.int64)]
        return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        """Its kind and its alphabet."""
        return {"type": "chars", "alphabet": self.decode(range(self.vocab_size))}


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def identity(argument: str) -> dict[str, Any]:
    """The text alone decides."""
    no_argument("chars", argument)
    return {}


def build(argument: str, building: Building) -> CharTokenizer:
    """The alphabet of the train split.

    Raises:
        UserError: the train split has no text.
    """
    no_argument("chars", argument)
    seen: set[str] = set()
    for text in training_text("chars", building):
        seen.update(text)
    return CharTokenizer("".join(seen))


def from_json(stored: dict[str, Any]) -> CharTokenizer:
    """What `to_json` described."""
    return CharTokenizer(stored["alphabet"])
