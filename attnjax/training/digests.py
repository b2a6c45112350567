"""The digests of a finished directory: written last, checked first.

`digests.json` lists every other file below its directory with size and sha256, and
carries the sha256 of its own content, so a flipped byte anywhere is seen, in the list
too. A directory without a valid one was never finished or has been damaged.
"""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

from attnjax.training import disk

NAME = "digests.json"
FORMAT = 1
_BLOCK = 1 << 20  # bytes
_THREADS = 4  # hashing releases the interpreter


def write(directory: str | os.PathLike) -> dict:
    """Put every file below `directory` on the disk and write its digests.

    Returns the content of `digests.json`.
    """
    directory = Path(directory)
    files = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        rows = dict(zip(files, pool.map(_seal, files.values()), strict=True))
    for folder in {path.parent for path in files.values()} | {directory}:
        disk.sync(folder)
    body = {"format": FORMAT, "files": rows}
    disk.write_atomic(directory / NAME, _text(body))
    return body


def problems(directory: str | os.PathLike) -> list[str]:
    """What is wrong with `directory`: one line a file, nothing when it is intact.

    Files that the digests do not name are no problem: file managers and network file
    systems leave their own.
    """
    directory = Path(directory)
    body, wrong = _read(directory / NAME)
    if wrong:
        return [wrong]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(
            lambda row: _problem(directory, *row), sorted(body["files"].items())
        )
        return [line for line in found if line]


def _files(directory: Path) -> dict[str, Path]:
    """Relative path with forward slashes -> file, in sorted order."""
    found = {
        path.relative_to(directory).as_posix(): path
        for path in directory.rglob("*")
        if path.is_file()
    }
    return {name: found[name] for name in sorted(found) if name != NAME}


def _seal(path: Path) -> dict:
    disk.sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def _problem(directory: Path, name: str, row: dict) -> str | None:
    path = directory / name
    try:
        size = path.stat().st_size
        if size != row["size"]:
            return f"{name}: {size} bytes instead of {row['size']}"
        if _sha256(path) != row["sha256"]:
            return f"{name}: content changed (sha256 differs)"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    return None


def _text(body: dict) -> str:
    """The file's exact text; reading compares it byte by byte."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    own = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, sort_keys=True, indent=1) + "\n"


def _read(path: Path) -> tuple[dict, str | None]:
    """(content, None), or ({}, what is wrong with the file)."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}, f"{NAME}: missing"
    except OSError as error:
        return {}, f"{NAME}: cannot be read ({error.strerror})"
    if not raw:
        return {}, f"{NAME}: empty"
    try:
        content = json.loads(raw)
        own = content.pop("sha256")
        same = _text(content).encode() == raw
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}, f"{NAME}: not the list that was written"
    if not same:
        return {}, f"{NAME}: content changed (its own sha256 {own!r:.12} differs)"
    return content, None
