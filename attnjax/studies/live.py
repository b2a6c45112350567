"""What a driver shows: a live table on a terminal, a line an event elsewhere."""

import json
import os
import sys
import time
from pathlib import Path

from attnjax.studies.sweep_file import Planned, Study

REFRESH = 0.5


class Display:
    """Context manager; the methods are the events of a driver.

    Args:
        study: what is run.
    """

    def __init__(self, study: Study):
        self._study = study
        self._total = len(study.asked)
        self._done = self._failed = 0
        self._live = None
        self._drawn = 0.0
        self._events: list[str] = []

    def __enter__(self) -> "Display":
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, done: int) -> None:
        """How many points were done before."""
        self._done = done
        self.note(f"{self._total} points, {done} of them done: {self._study.workdir}")

    def started(self, point: Planned, attempt: int) -> None:
        """A worker began."""
        again = f" (attempt {attempt})" if attempt > 1 else ""
        self.note(f"start   {point.hash}  {point.name}{again}")

    def finished(self, point: Planned, seconds: float, done: int) -> None:
        """A point is done."""
        self._done = done
        loss = final_loss(self._study.run_directory(point))
        shown = "" if loss is None else f"  loss {loss:.4f}"
        self.note(
            f"done    {point.hash}  {point.name}{shown}  {seconds:.0f} s  "
            f"[{done}/{self._total}]"
        )

    def crashed(self, point: Planned, error: str, times: int) -> None:
        """A worker crashed and the point will be tried again."""
        self.note(f"crash   {point.hash}  {point.name}: {error}; again ({times})")

    def failed(self, point: Planned, error: str) -> None:
        """A point is given up."""
        self._failed += 1
        self.note(f"failed  {point.hash}  {point.name}: {error}")

    def note(self, line: str) -> None:
        """A line for the record."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def update(self, running: dict, waiting: int, elsewhere: int) -> None:
        """Redraw, on a terminal, at most every `REFRESH` seconds."""
        if self._live is None or time.monotonic() - self._drawn < REFRESH:
            return
        from rich.table import Table

        self._drawn = time.monotonic()
        table = Table(
            title=f"{self._done}/{self._total} done, {len(running)} running, "
            f"{waiting} waiting, {elsewhere} elsewhere, {self._failed} failed",
            title_justify="left",
            box=None,
        )
        for name in ("point", "step", "loss", "seconds"):
            table.add_column(name, justify="left" if name == "point" else "right")
        for job in running.values():
            row = last_row(self._study.run_directory(job.point))
            loss = row.get("loss")
            table.add_row(
                job.point.name,
                f"{row.get('step', 0)}/{job.point.config['train']['steps']}",
                f"{loss:.4f}" if isinstance(loss, float) else "",
                f"{time.monotonic() - job.began:.0f}",
            )
        self._live.update(table)


def last_row(run: Path) -> dict:
    """The newest whole line of a run's metrics; {} when there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}


def final_loss(run: Path) -> float | None:
    """The last held-out loss in a run's summary, if there is one."""
    try:
        return float(json.loads((run / "summary.json").read_bytes())["final"]["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
