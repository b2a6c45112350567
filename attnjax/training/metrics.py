"""metrics.jsonl: one JSON object a line, whole after any kill, exact after any resume.

    {"step": 20, "split": "train", "loss": 2.31, ..., "time": {"step_ms": 4.1}}

`step` counts finished training steps; `split` is "train" or "eval". Whatever was
measured with a clock stands under `time`; every other key is the same in two runs of
one config. JSON has no NaN and no infinity: they are the strings "NaN", "Infinity"
and "-Infinity", which `read` turns back into floats.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.training import disk

SPLITS = ("train", "eval")
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends to a metrics file; a line is in the file, whole, when `write` returns.

    Args:
        path: RUN/metrics.jsonl; made when missing.
        primary: whether this process writes; of several processes of one run only one
            does, and the others leave the file alone.

    A process that is killed loses no line it has written; `sync` also guards against a
    machine that goes down. Before a checkpoint of step S is saved, every line up to S
    must have been written: then `cut_back(S)` after any kill leaves each step once.

    Raises:
        UserError: on a full, read-only or forbidden disk, from any method.
    """

    def __init__(self, path: str | os.PathLike, *, primary: bool = True):
        self.path = Path(path)
        self._writes = primary
        self._handle: int | None = None

    def write(self, record: dict) -> None:
        """Append `record`: has "step" (int) and "split"; values are JSON or numbers.

        Raises:
            ValueError: when step or split is missing or of another kind.
        """
        _check(record)
        if self._writes:
            self._append(_line(record))

    def sync(self) -> None:
        """Put what was written on the disk."""
        if self._writes:
            with disk.disk_errors("metrics"):
                os.fsync(self._open())

    def cut_back(self, step: int) -> int:
        """Remove lines of later steps and a torn end, atomically; how many went.

        Raises:
            UserError: when a line before the last ones is not JSON.
        """
        if not self._writes or not self.path.exists():
            return 0
        lines, torn = _lines(self.path)
        kept = [raw for raw, record in lines if record["step"] <= step]
        gone = len(lines) - len(kept) + torn
        if gone:
            self.close()
            with disk.disk_errors("metrics"):
                disk.write_atomic(self.path, b"".join(kept))
        return gone

    def records(self) -> list[dict]:
        """Every whole line, decoded."""
        return read(self.path)

    def has(self, step: int, split: str) -> bool:
        """Whether a line of this step and split is there."""
        return any(r["step"] == step and r["split"] == split for r in self.records())

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> int:
        if self._handle is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._handle = os.open(self.path, flags, 0o666)
        return self._handle

    def _append(self, raw: bytes) -> None:
        """One write call: a kill comes before it or after it."""
        with disk.disk_errors("metrics"):
            written = os.write(self._open(), raw)
            while written < len(raw):
                # The disk filled in the middle: the next write says so as an error.
                written += os.write(self._open(), raw[written:])


def read(path: str | os.PathLike) -> list[dict]:
    """The records of a metrics file, in order, with NaN and infinities as floats.

    A torn last line is left out. A missing file has no records.

    Raises:
        UserError: when a line before the last ones is not JSON.
    """
    if not Path(path).exists():
        return []
    return [decode(record) for _, record in _lines(Path(path))[0]]


def comparable(records: list[dict]) -> list[dict]:
    """Records without measured time: what two runs of one config have in common."""
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def encode(value: Any) -> Any:
    """`value` as JSON: arrays and numpy numbers become Python's, NaN a string."""
    if isinstance(value, dict):
        return {str(key): encode(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [encode(each) for each in value]
    if hasattr(value, "tolist"):
        return encode(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode(value: Any) -> Any:
    """What `encode` made, with NaN and infinities as floats again."""
    if isinstance(value, dict):
        return {key: decode(each) for key, each in value.items()}
    if isinstance(value, list):
        return [decode(each) for each in value]
    return _NAMES.get(value, value) if isinstance(value, str) else value


def _line(record: dict) -> bytes:
    return (json.dumps(encode(record), allow_nan=False) + "\n").encode()


def _check(record: dict) -> None:
    step, split = record.get("step"), record.get("split")
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"metrics: step must be an int; got step={step!r}.")
    if split not in SPLITS:
        raise ValueError(f"metrics: split must be one of {SPLITS}; got {split!r}.")


def _lines(path: Path) -> tuple[list[tuple[bytes, dict]], int]:
    """((raw, record) of each whole line, how many torn ones end the file)."""
    with disk.disk_errors("metrics"):
        raws = path.read_bytes().splitlines(keepends=True)
    parsed = [(raw, _parse(raw)) for raw in raws]
    whole = len(parsed)
    while whole and parsed[whole - 1][1] is None:
        whole -= 1
    for number, (_, record) in enumerate(parsed[:whole], start=1):
        if record is None:
            raise UserError(
                f"metrics: line {number} of {str(path)!r} is not a record, and whole "
                "lines follow it. Remove that line, or restore the file from a copy."
            )
    return parsed[:whole], len(parsed) - whole


def _parse(raw: bytes) -> dict | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
        _check(record)
    except (ValueError, AttributeError):
        return None
    return record


def best(records: list[dict], name: str = "loss") -> tuple[int, float] | None:
    """(step, value) of the lowest finite `name` among eval records, or None."""
    found = [
        (record[name], record["step"])
        for record in _of_split(records, "eval")
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]
    if not found:
        return None
    value, step = min(found)
    return step, value


def _of_split(records: list[dict], split: str) -> Iterator[dict]:
    return (record for record in records if record["split"] == split)
