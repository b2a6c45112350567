"""One process per run directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from attnjax.core.errors import UserError
from attnjax.training import disk, provenance

NAME = ".lock"


class RunLock:
    """Holds RUN/.lock for the life of the process.

    The kernel holds the lock, so one left by a killed process is no obstacle. The file
    also says who holds it, for the message to a second process.

    Args:
        directory: the run directory; must exist.

    Raises:
        UserError: when another process holds it, naming that process.
    """

    def __init__(self, directory: str | os.PathLike):
        self.path = Path(directory) / NAME
        with disk.disk_errors("workdir"):
            self._handle: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            self.release()
            raise _refusal(self.path, error, holder) from None
        with disk.disk_errors("workdir"):
            self._sign()

    def release(self) -> None:
        """Let another process in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _sign(self) -> None:
        who = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": provenance.now(),
        }
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, (json.dumps(who) + "\n").encode(), 0)

    def _holder(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            who = json.loads(os.pread(self._handle, 4096, 0))
            if isinstance(who, dict):
                return who
        return {}


def _refusal(path: Path, error: OSError, holder: dict) -> UserError:
    if error.errno not in (errno.EAGAIN, errno.EACCES):
        return UserError(
            f"workdir: the file system of {str(path)!r} cannot lock files "
            f"({error.strerror}), and two processes could write an unlocked run. "
            "Choose another --workdir."
        )
    who = (
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since "
        f"{holder.get('since', '?')}"
    )
    return UserError(
        f"workdir: {str(path.parent)!r} is in use by another process ({who}). Wait for "
        "it, stop it, or choose another --workdir."
    )
