"""Progress of long preparation: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LINE_EVERY = 10.0  # seconds between plain lines


@contextlib.contextmanager
def progress(
    label: str, *, total: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Show how far a task is while the `with` block runs.

    Yields a function to call with the units done since the last call. `total` None
    shows a count without an end.
    """
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
        return
    started = last = time.monotonic()
    done = 0
    print(f"{label} ...", file=sys.stderr, flush=True)

    def advance(units: int) -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            share = f" of {total}" if total else ""
            print(f"{label}: {done}{share}", file=sys.stderr, flush=True)

    yield advance
    seconds = time.monotonic() - started
    print(f"{label}: done, {seconds:.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
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
