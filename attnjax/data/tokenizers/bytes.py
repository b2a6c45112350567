"""The 256 byte values of UTF-8: no vocabulary to build, nothing unknown."""

from typing import Any

import numpy as np

from attnjax.data.tokenizers.base import Base, Building
from attnjax.data.tokenizers.registry import no_argument


class ByteTokenizer(Base):
    """Ids are byte values. No separator: every id is already a byte of text."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """[bytes] uint8. A terminal's undecodable bytes (lone surrogates) pass."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def decode(self, ids: Any) -> str:
        """Text of the bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(np.asarray(ids, np.uint8)).decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, Any]:
        """Its kind alone."""
        return {"type": "bytes"}


def identity(argument: str) -> dict[str, Any]:
    """Nothing but its kind matters."""
    no_argument("bytes", argument)
    return {}


def build(argument: str, building: Building) -> ByteTokenizer:
    """The one byte tokenizer there is; the corpus does not matter."""
    del building
    no_argument("bytes", argument)
    return ByteTokenizer()


def from_json(stored: dict[str, Any]) -> ByteTokenizer:
    """The one byte tokenizer there is."""
    del stored
    return ByteTokenizer()
