"""A progress bar on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Shows a run to a person; use it in a `with` statement.

    Args:
        total: steps of the run.
        start: the step it starts from.
        quiet: show nothing: another process of this run does.
    """

    def __init__(self, total: int, *, start: int = 0, quiet: bool = False):
        self.is_quiet = quiet
        self.is_terminal = sys.stdout.isatty() and not quiet
        self.total = total
        self.start = start
        self._last_line = 0.0
        self._bar = None
        if self.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(file=sys.stdout),
            )
            self._task = self._bar.add_task(
                "training", total=total, completed=start, numbers=""
            )

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self.is_quiet:
            print(text, flush=True)

    def at(self, step: int, numbers: str = "", *, phase: str = "training") -> None:
        """Where the run is: moves the bar."""
        if self._bar is not None:
            fields = {"numbers": numbers} if numbers else {}
            self._bar.update(self._task, completed=step, description=phase, **fields)

    def metrics(self, step: int, values: dict) -> None:
        """The newest metrics: on the bar, or a line at most every two seconds."""
        text = "  ".join(
            f"{name} {values[name]:.4g}"
            for name in ("loss", "grad_norm", "learning_rate")
            if name in values
        )
        for name, speed in values.get("time", {}).items():
            if name.endswith("s_per_second"):
                text += f"  {speed:,.0f} {name.removesuffix('_per_second')}/s"
        self.at(step, text)
        if self._bar is None and not self.is_quiet:
            now = time.monotonic()
            if now - self._last_line >= 2.0 or step >= self.total:
                self._last_line = now
                print(f"step {step}/{self.total}  {text}", flush=True)
