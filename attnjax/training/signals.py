"""Being asked to stop: SIGTERM from a scheduler, SIGINT from a keyboard.

The first signal only sets a flag, which the loop looks at between dispatches and
between evaluation batches; it then saves and leaves with `core.errors.EXIT_SAVED`.
Compilation can take minutes and looks at no flag, so around it the loop asks for an
exception instead.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

_SIGNALS = ("SIGTERM", "SIGINT")
# What clusters send ahead of a time limit; without a handler they kill.
_CLUSTER_SIGNALS = ("SIGUSR1", "SIGUSR2")


class StopRequested(BaseException):
    """Raised inside `StopSignal.interrupting`; not an error, so not an Exception."""


class StopSignal:
    """Context manager that catches requests to stop, in the main thread.

    Args:
        what_happens: ends the line printed at the first signal.
        cluster: also catch SIGUSR1 and SIGUSR2.

    The first SIGTERM or SIGINT sets `requested`; a second SIGINT raises
    KeyboardInterrupt at once; a second SIGTERM changes nothing. The handlers that
    were there before come back at exit.

    Attributes:
        several: this process is one of several that stop together, so it may no longer
            leave by itself: `interrupting` then interrupts nothing.

    Raises:
        RuntimeError: when entered outside the main thread, which Python's signal
            handlers belong to.
    """

    def __init__(
        self,
        *,
        what_happens: str = "saving the state, then stopping (again: stop at once)",
        cluster: bool = True,
    ):
        self._names = _SIGNALS + (_CLUSTER_SIGNALS if cluster else ())
        self._what = what_happens
        self._before: dict[int, object] = {}
        self._interrupting = False
        self._swallowed = False
        self._hook_before = None
        self._requested: str | None = None
        self.several = False

    @property
    def requested(self) -> str | None:
        """The name of the first signal received, such as "SIGTERM", or None."""
        return self._requested

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("StopSignal: signals arrive in the main thread only.")
        for name in self._names:
            number = getattr(signal, name)
            self._before[number] = signal.signal(number, self._handle)
        self._hook_before = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            # None: the handler was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        sys.unraisablehook = self._hook_before

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a request to stop raise StopRequested, now or at any point inside.

        For phases that look at no flag and have nothing to lose, such as compiling.
        Nothing but StopRequested (or a KeyboardInterrupt) comes out after a request,
        whatever the code inside made of the exception: extension modules turn one
        that is raised while they are imported into an ImportError, and finalisers
        swallow it.

        An interrupted compilation goes on in a thread of XLA's which cannot be
        stopped: leave the process with `leave`, since unwinding the interpreter under
        that thread crashes.
        """
        if self.several:
            yield
            return
        self._interrupting = True
        try:
            self._raise_if_requested()
            yield
            # The block may have joined others.
            if not self.several:
                self._raise_if_requested()
        except (StopRequested, KeyboardInterrupt):
            raise
        except BaseException as error:
            if self._requested is None:
                raise
            raise StopRequested(self._requested) from error
        finally:
            self._interrupting = False

    def _raise_if_requested(self) -> None:
        if self._requested is not None:
            raise StopRequested(self._requested)

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self._requested is None:
            self._requested = name
            # Not print: a handler may run inside another write to the same stream.
            os.write(2, f"\n{name} received: {self._what}.\n".encode())
            if self._interrupting:
                self._interrupting = False
                raise StopRequested(name)
        elif self._swallowed:
            self._swallowed = False
            if self._interrupting:
                self._interrupting = False
                raise StopRequested(self._requested)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _unraisable(self, told) -> None:
        """Python's hook for exceptions in finalisers and callbacks of the garbage
        collector, which go no further: ours has to be raised again."""
        if not isinstance(told.exc_value, StopRequested):
            self._hook_before(told)
            return
        self._swallowed = self._interrupting = True
        again = threading.Timer(0.05, _thread.interrupt_main, (signal.SIGTERM,))
        again.daemon = True
        again.start()


def leave(code: int) -> NoReturn:
    """End the process now, with output flushed and nothing unwound."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
