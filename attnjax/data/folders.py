"""Where prepared data is kept, and how one process at a time prepares it."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from attnjax.core.errors import UserError

_POLL = 0.1  # seconds between two looks at a lock that another process holds
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def cache_root(cache_dir: str | None) -> Path:
    """The option, else $ATTNJAX_CACHE, else ~/.cache/attnjax."""
    chosen = cache_dir or os.environ.get("ATTNJAX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "attnjax"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what to do when a disk is full or must not be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            reason, cure = "the disk is full", "Free space"
        elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
            reason, cure = "it may not be written", "Make it writable"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            reason, cure = "a file is in its place", "Move that file away"
        else:
            raise
        raise UserError(
            f"data: cannot write the cache; got {path}: {reason}. {cure}, or set "
            "data.cache_dir (or ATTNJAX_CACHE) to another folder."
        ) from error


@contextlib.contextmanager
def one_builder(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; wait while another process has it.

    The operating system frees the lock when its holder ends, however it ends.
    """
    with open(path.with_name(path.name + ".lock"), "a") as handle:
        said = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    note = f"data: waiting for another process that builds {path}"
                    print(note, file=sys.stderr, flush=True)
                said = True
                time.sleep(_POLL)
        yield  # closing the file frees the lock


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes `path`'s place when the block succeeds.

    What stood at `path` is moved aside first and removed last, so `path` never
    holds a mixture; maps of the old files stay valid for those who hold them. Call
    it under `one_builder`: what a killed builder left behind is removed here.
    """
    for left in path.parent.glob(glob.escape(path.name) + ".???-*"):
        shutil.rmtree(left, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=path.name + ".new-", dir=path.parent))
    try:
        yield fresh
        _flush(fresh)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=path.name + ".old-", dir=path.parent))
            os.replace(path, old / "was")
            os.replace(fresh, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Have the disk hold the files before the folder gets its final name."""
    for name in [*os.listdir(folder), "."]:
        handle = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
