"""Writing files so that neither a kill nor a full disk leaves half of one."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnjax.core import cli
from attnjax.core.errors import UserError


@contextlib.contextmanager
def disk_errors(owner: str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a UserError with a cure.

    Args:
        owner: what was being written, for the front of the message.

    Other errors pass unchanged. Errors that storage libraries wrap (Orbax,
    TensorStore) are recognised by their causes and texts.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = cli.as_user_error(error)
        if told is None and isinstance(error, OSError):
            told = _misplaced(error)
        if told is None:
            raise
        raise UserError(f"{owner}: {told}") from error


def _misplaced(error: OSError) -> UserError | None:
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(
            f"{error.filename!r}: a file stands where a directory must be. Move it "
            "away, or choose another --workdir."
        )
    return None


def ready_out(path: str | os.PathLike, *, kinds: tuple[str, ...] = ()) -> Path:
    """The file of --out, before the work for it begins; its folder is made.

    Args:
        kinds: the endings that it may have (none: any).

    Raises:
        UserError: for another ending, a folder, or a place that cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--out: must be a file; got the folder {str(path)!r}.")
    if kinds and path.suffix.lower() not in kinds:
        raise UserError(
            f"--out: must end in {' or '.join(kinds)}; got {str(path)!r}. Name it "
            f"{str(path.with_suffix(kinds[0]))!r}."
        )
    with disk_errors("--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace the file at `path`; a reader sees the old content or the new one.

    The content is on the disk before the name points to it, and the name is on the
    disk when this returns.
    """
    path = Path(path)
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: str | os.PathLike) -> None:
    """Put a file's content, or a directory's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a directory; their renames are
        # ordered by the server.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    """`value` as JSON text for a file that people read."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomic(path, to_json(value))


def read_json(path: str | os.PathLike, *, owner: str, cure: str) -> Any:
    """The JSON value in a file.

    Raises:
        UserError: when the file cannot be read or is not JSON; ends with `cure`.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{owner}: cannot read {str(path)!r}: {error}. {cure}"
        ) from None
