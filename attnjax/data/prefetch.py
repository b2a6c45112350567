"""Batches are built and sent to the devices while the last ones are computed on.

A background thread walks through the dispatches, stacks the batches of each one's
steps to [K, B, T], puts them on the devices, and waits when `depth` are ready. The
only state is the step: closing and starting at step s gives what running through
would have given.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

Batch = dict[str, Any]
_POLL = 0.05  # seconds between two looks at whether to stop, while the queue is full
_JOIN = 10.0  # seconds to wait for a build in progress when closing


class Dispatch(NamedTuple):
    """What one call of the compiled step consumes.

    Attributes:
        step: the first step.
        count: K, the number of steps.
        batch: arrays with a leading axis of K, on the devices.
    """

    step: int
    count: int
    batch: Batch


def dispatches(
    start: int, stop: int, *, steps_per_dispatch: int = 1
) -> Iterator[tuple[int, int]]:
    """(first step, count) of the dispatches from `start` up to `stop`, excluded.

    They end at multiples of `steps_per_dispatch`, wherever they start, so a resumed
    run dispatches as the uninterrupted one did; the first and last may be short.
    """
    while start < stop:
        end = min(stop, (start // steps_per_dispatch + 1) * steps_per_dispatch)
        yield start, end - start
        start = end


def to_devices(batch: Batch, sharding: jax.sharding.Sharding | None) -> Batch:
    """Put this host's part of a batch on the devices.

    Args:
        batch: numpy arrays [K, B, T]; with several hosts, the rows of this one.
        sharding: of all arrays, rank 3; None for the default device.
    """
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


class Prefetch:
    """An iterator of `Dispatch`, filled by a thread of its own.

    Errors of the thread are raised where the iterator is read. Close it, or use it
    in a `with` statement; it also closes when collected and when Python ends.
    """

    def __init__(
        self,
        build: Callable[[int], Batch],
        steps: Iterable[tuple[int, int]],
        *,
        put: Callable[[Batch], Batch] | None = None,
        sharding: jax.sharding.Sharding | None = None,
        depth: int = 2,
    ):
        """Start the thread.

        Args:
            build: step -> dict of numpy arrays; called in the thread.
            steps: (first step, count) of each dispatch (see `dispatches`).
            put: stacked batch -> what the step consumes; None for `to_devices`.
            sharding: for `to_devices`; not with `put`.
            depth: dispatches ready at a time, at least 1.
        """
        if put is not None and sharding is not None:
            raise ValueError("Prefetch: put and sharding exclude each other. Give one.")
        if depth < 1:
            raise ValueError(f"Prefetch: depth must be at least 1; got depth={depth}.")
        send = put or (lambda batch: to_devices(batch, sharding))
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        stop = threading.Event()
        # The thread holds no reference to this object, so that it can be collected.
        thread = threading.Thread(
            target=_work,
            args=(build, steps, send, self._ready, stop),
            name="attnjax-prefetch",
            daemon=True,
        )
        self._end: BaseException | None = None
        self._close = weakref.finalize(self, _shut, self._ready, stop, thread)
        thread.start()

    def __iter__(self) -> Iterator[Dispatch]:
        return self

    def __next__(self) -> Dispatch:
        if self._end is None and not self._close.alive:
            self._end = StopIteration()
        if self._end is not None:
            raise self._end
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._end = item
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and drop what is ready. Safe to call twice."""
        self._close()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _work(build, steps, send, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        for first, count in steps:
            parts = [build(step) for step in range(first, first + count)]
            stacked = {n: np.stack([part[n] for part in parts]) for n in parts[0]}
            if not _offer(Dispatch(first, count, send(stacked)), ready, stop):
                return
        end: BaseException = StopIteration()
    except BaseException as error:
        end = error
    _offer(end, ready, stop)


def _offer(item: Any, ready: queue.Queue, stop: threading.Event) -> bool:
    """Wait for room; False if the reader has closed."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=_POLL)
            return True
        except queue.Full:
            continue
    return False


def _shut(ready: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(_JOIN)
