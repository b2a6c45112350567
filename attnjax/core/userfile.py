"""Running Python files that users write: configs, sweeps, mechanisms.

Whatever goes wrong in such a file is one readable line, not our traceback.
"""

import contextlib
import difflib
import hashlib
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from attnjax.core.errors import UserError


def run_file(path: str | Path, *, owner: str, module_name: str) -> types.ModuleType:
    """Execute a Python file as the module `module_name`.

    Args:
        path: the file.
        owner: who asks, the head of messages ("--config").
        module_name: its `__name__`; it is put into `sys.modules`, so that
            dataclasses and pickles of the file work.

    Raises:
        UserError: the file is missing, unreadable, or fails while it runs.
    """
    source = read_source(path, owner=owner)
    module = types.ModuleType(module_name)
    module.__file__ = str(path)
    previous = sys.modules.get(module_name)
    sys.modules[module_name] = module
    try:
        with told_as_user_error(path, owner=owner):
            exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        sys.modules.pop(module_name)
        if previous is not None:
            sys.modules[module_name] = previous
        raise
    return module


def read_source(path: str | Path, *, owner: str) -> bytes:
    """The bytes of a file that the user named; a missing one lists its neighbours."""
    path = Path(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise missing_file(path, owner=owner) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{owner}: cannot read {str(path)!r}: {reason}.") from None


def missing_file(path: Path, *, owner: str) -> UserError:
    """The error for a file that is not there, with the nearest ones that are."""
    folder = path.parent
    if not folder.is_dir():
        return UserError(
            f"{owner}: no file {str(path)!r}, nor a folder {str(folder)!r} "
            f"in {str(Path.cwd())!r}."
        )
    names = sorted(entry.name for entry in folder.glob("*.py"))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = ""
    if close:
        hint = f" Did you mean {' or '.join(str(folder / name) for name in close)}?"
    elif names:
        hint = f" There are: {', '.join(names[:20])}."
    return UserError(f"{owner}: no file {str(path)!r}.{hint}")


@contextlib.contextmanager
def told_as_user_error(path: str | Path, *, owner: str) -> Iterator[None]:
    """A context in which any exception of a user's file becomes one line.

    The line names the innermost place that lies in the file itself.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        if isinstance(error, SyntaxError) and error.filename == str(path):
            text = error.msg
        place = f"{path}:{_line_of(error, str(path))}"
        kind = type(error).__name__
        raise UserError(f"{owner}: {place}: {kind}: {text}") from error


def _line_of(error: BaseException, path: str) -> int:
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return (lines[-1] if lines else 1) or 1


def digest_of(source: bytes) -> str:
    """sha256 hex of a file's bytes."""
    return hashlib.sha256(source).hexdigest()
