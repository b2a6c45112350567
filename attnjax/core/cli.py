"""How every front door ends: exit codes, and errors as one readable line."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from attnjax.core.errors import EXIT_FAULT, EXIT_OK, UserError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Faults of the surroundings that a user can mend, and how.
_MENDABLE = {
    errno.ENOSPC: "no space left on the disk. Free some, or choose another --workdir",
    errno.EDQUOT: "the disk quota is used up. Free some, or choose another --workdir",
    errno.EROFS: "the file system is read-only. Choose another --workdir",
    errno.EACCES: "permission denied. Choose another place, or change its permissions",
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# The same, as storage libraries put them into the texts of their own errors.
_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
}


def run_main(
    main: Callable[[list[str]], int | None], argv: list[str] | None = None
) -> NoReturn:
    """Run a front door and end the process with its exit code.

    Args:
        main: takes the command line without the program's name; returns the exit
            code, None meaning 0.
        argv: the command line; None takes this process's.

    A UserError is one `error: ...` line on stderr and its own exit code, mostly 2; an
    interrupt is 130; any other exception is a fault of ours: its traceback, and exit 1.
    """
    words = sys.argv[1:] if argv is None else argv
    code = EXIT_OK
    try:
        code = main(words) or EXIT_OK
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone: there is nobody to tell.
        pass
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        code = report(error)
    _flush_output()
    sys.exit(code)


def _flush_output() -> None:
    """Write out stdout; where its reader has gone, throw the rest away.

    Left to the interpreter's exit, a closed pipe would be a message and exit 120.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: Exception) -> int:
    """Print `error` on stderr, as a line or as a fault of ours; give the exit code."""
    told = as_user_error(error)
    if told is not None:
        print(f"error: {told}", file=sys.stderr)
        return told.exit_code
    traceback.print_exception(error)
    print(
        f"fault: {type(error).__name__} inside attnjax; this is not your mistake. "
        f"Please report the lines above and the command.",
        file=sys.stderr,
    )
    return EXIT_FAULT


def as_user_error(error: BaseException) -> UserError | None:
    """The mistake behind `error` if a user can mend it, else None."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, PermissionError):
        return UserError(f"{_place(error)}{_MENDABLE[errno.EACCES]}.")
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in _DISK:
            return UserError(f"{_place(link)}{_MENDABLE[link.errno]}.")
        for text, number in _TEXTS.items():
            if text in str(link):
                return UserError(f"disk: {_MENDABLE[number]}.")
    return None


def _place(error: OSError) -> str:
    return f"{error.filename!r}: " if error.filename else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it came from and, of a group, its members."""
    seen = {id(error)}
    waiting = [error]
    while waiting:
        link = waiting.pop(0)
        yield link
        more = [link.__cause__, link.__context__]
        more += link.exceptions if isinstance(link, BaseExceptionGroup) else []
        for other in more:
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                waiting.append(other)
