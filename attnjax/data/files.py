"""Finding the files of a source."""

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnjax.core.errors import UserError


def matching(owner: str, pattern: str, data_dir: str | None) -> list[Path]:
    """The files that a pattern names, sorted.

    Args:
        owner: the source, for messages.
        pattern: a path with *, ?, [..] and ** (any folders), "~" for home.
        data_dir: what a relative pattern starts from; None for the current folder.

    Raises:
        UserError: nothing matches.
    """
    whole = os.path.join(data_dir or "", os.path.expanduser(pattern))
    whole = os.path.expanduser(whole)
    found = sorted(Path(p) for p in glob.glob(whole, recursive=True))
    files = [path for path in found if path.is_file()]
    if files:
        return files
    kind = "only folders match" if found else "no file matches"
    raise UserError(
        f"{owner}: the pattern must name files; got {whole!r}, {kind}. Check it "
        "(quote it in a shell; ** stands for any folders) and data.data_dir."
    )


def base_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds every file."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths]))


def stats(paths: Sequence[Path]) -> list[list[Any]]:
    """[path, bytes, time of change] of each file: changes when a file does."""
    facts = [(str(path.absolute()), path.stat()) for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]


def held_out_files(paths: Sequence[Path], eval_fraction: float) -> set[Path]:
    """A share of the files, by size, chosen by a hash of their names.

    Files are taken in the order of the hash while they fit into `eval_fraction` of
    all bytes; the smallest file if none does. Names count from the common folder,
    so the choice is the same wherever the files lie.
    """
    base = base_folder(paths)
    order = sorted(
        paths,
        key=lambda path: hashlib.sha256(
            path.absolute().relative_to(base).as_posix().encode()
        ).digest(),
    )
    sizes = {path: path.stat().st_size for path in paths}
    room = eval_fraction * sum(sizes.values())
    chosen: set[Path] = set()
    for path in order:
        if 0 < sizes[path] <= room:
            chosen.add(path)
            room -= sizes[path]
    filled = [path for path in order if sizes[path]] or order
    return chosen or {min(filled, key=lambda path: sizes[path])}
