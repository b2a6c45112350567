"""An optional window of steps recorded by the JAX profiler."""

from pathlib import Path

import jax


class ProfileWindow:
    """Records steps [start, start + count) into RUN/profile.

    Args:
        run: the run directory.
        start: first recorded step; None records nothing.
        count: number of steps.
    """

    def __init__(self, run: str | Path, start: int | None, count: int):
        self._path = str(Path(run) / "profile")
        self._start, self._count = start, count
        self._is_on = False

    def before(self, step: int) -> None:
        """Call before the dispatch that starts at `step`."""
        if self._start is not None and not self._is_on and step >= self._start:
            jax.profiler.start_trace(self._path)
            self._is_on = True

    def after(self, step: int, results) -> None:
        """Call after the dispatch that ends before `step`; ends a full window."""
        if self._is_on and step >= self._start + self._count:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._is_on, self._start = False, None

    def close(self) -> None:
        """End a window that the run did not fill."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
