"""Files of token ids: nanoGPT's raw uint16, and llm.c's with a header.

A llm.c file starts with 256 little-endian int32: magic, version, number of ids, and
zeros; magic and version tell the type of the ids.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.errors import UserError

HEADER_BYTES = 1024
HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # GPT-2, Llama 3
_RAW = "<u2"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        ids: [n] unsigned, mapped.
        has_header: llm.c's format; its documents start with the separator, those
            of raw files end with it.
    """

    ids: np.ndarray
    has_header: bool


def open_shard(path: Path) -> Shard:
    """Map a file of ids.

    Raises:
        UserError: unreadable, empty, of another version, or cut short.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header = np.frombuffer(handle.read(12), "<i4", count=3 if size >= 12 else 0)
    except OSError as error:
        raise UserError(
            f"tokens: files must be readable; got {path}: {error.strerror}. "
            "Check its permissions, or leave it out of the pattern."
        ) from error
    has_header = len(header) == 3 and int(header[0]) in {m for m, _ in HEADERS}
    if not has_header:
        if size == 0 or size % 2:
            raise UserError(
                "tokens: a file without llm.c header must be whole uint16 ids; got "
                f"{path} of {size} bytes. Write it again."
            )
        return Shard(np.asarray(np.memmap(path, _RAW, "r")), False)
    magic, version, count = header.tolist()
    dtype = HEADERS.get((magic, version))
    if dtype is None:
        raise UserError(
            "tokens: a llm.c file must be of magic 20240520 version 1 or magic "
            f"20240801 version 7; got {path}: magic {magic} version {version}. "
            "Write it again with llm.c's current scripts."
        )
    expected = HEADER_BYTES + count * np.dtype(dtype).itemsize
    if count < 1 or size != expected:
        raise UserError(
            f"tokens: a llm.c file must hold the ids its header counts; got {path} of "
            f"{size} bytes for {count} ids ({expected} bytes). Fetch it again."
        )
    ids = np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(count,))
    return Shard(np.asarray(ids), True)


class Chain:
    """Arrays laid end to end without copying: a length, a dtype, and indexing."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays])
        self.dtype = np.result_type(*arrays)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """By a slice, or by an integer array of any shape."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        flat = np.ravel(index)
        result = np.empty(flat.shape, self.dtype)
        where = np.searchsorted(self._ends, flat, side="right")
        # Sorted by array, so that each array is read once.
        order = np.argsort(where, kind="stable")
        cuts = np.searchsorted(where[order], np.arange(len(self._arrays) + 1))
        for number in np.unique(where).tolist():
            here = order[cuts[number] : cuts[number + 1]]
            array = self._arrays[number]
            result[here] = array[flat[here] - (self._ends[number] - len(array))]
        return result.reshape(np.shape(index))


def chain(arrays: Sequence[np.ndarray]) -> Any:
    """One array as it is, several as a `Chain`."""
    return arrays[0] if len(arrays) == 1 else Chain(arrays)
