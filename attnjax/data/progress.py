"""Progress of long preparation: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_QUIET = 1.0  # seconds that pass without a plain line
_LINE_EVERY = 10.0  # seconds between plain lines

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(label: str, *, total: int | None = None) -> Iterator[Advance]:
    """Show how far a task is while the `with` block runs.

    Yields a function to call with the units done since the last call. `total` None
    shows a count without an end.
    """
    show = _bar if sys.stderr.isatty() else _lines
    with show(label, total) as advance:
        yield advance


@contextlib.contextmanager
def _lines(label: str, total: int | None) -> Iterator[Advance]:
    """Nothing for what takes no time; else a line now and then, and at the end."""
    started = time.monotonic()
    end = f" of {total}" if total else ""
    done, last = 0, started

    def say(text: str) -> None:
        print(f"{label}{text}", file=sys.stderr, flush=True)

    def advance(units: int) -> None:
        nonlocal done, last
        done += units
        if time.monotonic() - last >= _LINE_EVERY:
            last = time.monotonic()
            say(f": {done}{end}")

    # A timer, because a task may take long before it first advances.
    opening = threading.Timer(_QUIET, say, (" ...",))
    opening.daemon = True
    opening.start()
    try:
        yield advance
    finally:
        opening.cancel()
    seconds = time.monotonic() - started
    if seconds >= _QUIET:
        say(f": done, {seconds:.1f} s")


@contextlib.contextmanager
def _bar(label: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda units: bar.advance(task, units)
