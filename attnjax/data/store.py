"""Folders of prepared files that are built once, checked, and mapped.

A store is named by a hash of what it was made from. `index.json`, written last,
holds facts about it and, for every other file, the size and a checksum of each
block; its own checksum is its second line. What does not match is said, and built
again.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from attnjax.data.folders import cache_root, disk_errors, new_folder, one_builder

INDEX = "index.json"
BLOCK = 1 << 22  # bytes under one checksum
ALL_CHECKED = 1 << 29  # up to this many bytes every block is checked at opening
SAMPLED = 32  # blocks checked of a larger file, evenly spaced

Read = TypeVar("Read")


class Damaged(Exception):
    """A store that is not as it was written."""


def stored(
    label: str,
    identity: dict[str, Any],
    *,
    cache_dir: str | None,
    build: Callable[[Path], dict[str, Any]],
    read: Callable[[Path, dict[str, Any]], Read],
) -> Read:
    """Read a store, built first if there is none or a damaged one.

    Args:
        label: start of the folder's name.
        identity: JSON-able facts; other facts, another store.
        cache_dir: see `folders.cache_root`.
        build: writes files into the folder given and returns the store's facts.
        read: makes the result from folder and facts; may raise `Damaged`.

    Raises:
        UserError: from `build`, or because the folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    root = cache_root(cache_dir)
    path = root / f"{label}-{digest.hexdigest()[:20]}"
    try:
        return open_store(path, read)
    except FileNotFoundError:
        pass
    except Damaged as damage:
        note = f"data: the cache {path} is damaged ({damage}); building it again"
        print(note, file=sys.stderr, flush=True)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with one_builder(path):
            try:  # another process may have built it while this one waited
                return open_store(path, read)
            except (FileNotFoundError, Damaged):
                with new_folder(path) as folder:
                    write_index(folder, build(folder))
    return open_store(path, read)


def map_file(path: Path, dtype: str) -> np.ndarray:
    """A read-only map as a plain array, whose indexing is faster than memmap's."""
    return np.asarray(np.memmap(path, dtype, "r"))


def write_index(folder: Path, facts: dict[str, Any]) -> None:
    """Finish a folder: its facts, and the checksums of the files that are in it."""
    files = {path.name: _checksums(path) for path in sorted(folder.iterdir())}
    index = json.dumps({"facts": facts, "files": files})
    text = f"{index}\n{zlib.crc32(index.encode()):08x}\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def _checksums(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        sums = [zlib.crc32(block) for block in iter(lambda: handle.read(BLOCK), b"")]
    return {"bytes": path.stat().st_size, "crc32": sums}


def open_store(
    path: Path, read: Callable[[Path, dict[str, Any]], Read], *, verify: bool = True
) -> Read:
    """Check a folder that `write_index` finished, and read it.

    Args:
        path: the folder.
        read: see `stored`.
        verify: look at the other files too, not at the index alone.

    Raises:
        FileNotFoundError: there is no folder.
        Damaged: it is not as it was written.
    """
    if not path.is_dir():
        raise FileNotFoundError(path)
    try:
        index, _, checksum = (path / INDEX).read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{INDEX}: {error.strerror}") from error
    if checksum != f"{zlib.crc32(index):08x}\n".encode():
        raise Damaged(f"{INDEX} differs from its checksum")
    whole = json.loads(index)
    for name, sums in whole["files"].items() if verify else ():
        _verify(path / name, sums)
    return read(path, whole["facts"])


def _verify(path: Path, sums: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error
    if size != sums["bytes"]:
        raise Damaged(f"{path.name} has {size} bytes, not {sums['bytes']}")
    count = len(sums["crc32"])
    blocks = np.arange(count)
    if size > ALL_CHECKED:
        blocks = np.unique(np.linspace(0, count - 1, SAMPLED).astype(int))
    with open(path, "rb") as handle:
        for block in blocks.tolist():
            handle.seek(block * BLOCK)
            if zlib.crc32(handle.read(BLOCK)) != sums["crc32"][block]:
                raise Damaged(f"{path.name} differs from its checksum")
