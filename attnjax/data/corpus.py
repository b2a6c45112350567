"""What the loader, the statistics and the run directory see of a data set."""

import collections
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Token ids of one split, document after document.

    Attributes:
        tokens: [N] unsigned integers, usually a memory map; anything with a
            length and a dtype that is indexed by slices and by integer arrays.
        document_offsets: [D + 1] int64, rising strictly from 0 to N: document d
            is tokens[document_offsets[d]:document_offsets[d + 1]].
        separator: id of the token that ends a document, None if there is none.
        num_bytes: UTF-8 bytes of the split's text, None where it is not known.
        name: "train" or "eval", for messages.
    """

    tokens: Any = dataclasses.field(repr=False)
    document_offsets: np.ndarray = dataclasses.field(repr=False)
    separator: int | None = None
    num_bytes: int | None = None
    name: str = "train"
    _memory: "Memory" = dataclasses.field(
        default_factory=lambda: Memory(), repr=False, init=False
    )

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.document_offsets) - 1

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, kept for the few keys asked for last. It must be pure."""
        return self._memory.get(key, make)


class Memory:
    """The few newest results of pure functions; safe under threads."""

    def __init__(self, size: int = 16):
        self._size = size
        self._items: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `key`, made at the first request."""
        with self._lock:
            if key not in self._items:
                self._items[key] = make()
            self._items.move_to_end(key)
            while len(self._items) > self._size:
                self._items.popitem(last=False)
            return self._items[key]


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A data set, tokenised.

    Attributes:
        train: the split to train on.
        eval: the held-out split.
        tokenizer: what made the ids (see `attnjax.data.tokenizers`).
        fingerprint: hex digest of the ids, the documents and the tokenizer; equal
            exactly when training sees the same data, on any machine.
        provenance: JSON-able facts for the manifest: source, versions, counts.
    """

    train: Split
    eval: Split
    tokenizer: Any
    fingerprint: str
    provenance: dict[str, Any]
