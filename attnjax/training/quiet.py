"""Keeping a storage library's noise off the terminal; its errors still reach us.

When a save fails, Orbax logs the traceback that it also raises, and TensorStore's
threads report one "Event loop is closed" for each array that was still being written:
hundreds of lines around the one that matters.
"""

import logging
import os
import sys


def hush_storage() -> None:
    """Filter Orbax's log lines and TensorStore's late reports, once per process."""
    logger = logging.getLogger("absl")
    if not any(isinstance(each, _NotOrbax) for each in logger.filters):
        logger.addFilter(_NotOrbax())
    if not isinstance(sys.unraisablehook, _NotClosedLoop):
        sys.unraisablehook = _NotClosedLoop(sys.unraisablehook)


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


class _NotClosedLoop:
    """Calls the former hook for everything but a callback to a closed event loop."""

    def __init__(self, former):
        self.former = former

    def __call__(self, unraisable) -> None:
        error = unraisable.exc_value
        is_late = isinstance(error, RuntimeError) and str(error) == (
            "Event loop is closed"
        )
        if not is_late:
            self.former(unraisable)
