"""What the processes of one run tell one another, beside the arrays they share.

All go through the same program in the same order, so their n-th call here is one
exchange, carried by the key-value store of jax.distributed (in process 0). A request
to stop reaches some of them, at different times: `stop_requested`, which all call
equally often, begins to say so at the same call in each.
"""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

# There is no public way to the store.
from jax._src import distributed

from attnjax.core.errors import UserError

_ROUND = 5000  # milliseconds of one wait; signals are handled between two
_LOOK = 0.2  # seconds between two looks for a request to stop
_KEPT = 64  # broadcasts whose keys are kept: no process is so far behind

_numbers = itertools.count()
_stop: "_StopAgreement | None" = None


def is_several() -> bool:
    """Whether this process has joined others."""
    return distributed.global_state.client is not None and _count() > 1


def begin(signals) -> None:
    """Agree on stopping from now on; call it once, after joining."""
    global _stop
    _stop = _StopAgreement(signals) if is_several() else None


def stop_requested(signals) -> str | None:
    """Who asked for an end, or None; of several processes the same in all.

    They must all call it at the same points of the program, at least once a second
    or so of what can be waited for.
    """
    return signals.requested if _stop is None else _stop.poll()


def exchange(value: Any) -> list[Any]:
    """Every process's JSON value, in the order of the processes."""
    if not is_several():
        return [value]
    name = f"attnjax/exchange/{next(_numbers)}"
    _set(f"{name}/{_index()}", value)
    return [_get(f"{name}/{index}") for index in range(_count())]


def broadcast(value: Any) -> Any:
    """Process 0's JSON value, in every process."""
    if not is_several():
        return value
    number = next(_numbers)
    name = f"attnjax/broadcast/{number}"
    if _index() != 0:
        return _get(name)
    _set(name, value)
    distributed.global_state.client.key_value_delete(
        f"attnjax/broadcast/{number - _KEPT}"
    )
    return value


@contextlib.contextmanager
def shared_failure() -> Iterator[None]:
    """Of a block that any process may fail in: when one does, all raise.

    The others raise its UserError, or a RuntimeError where it is none.
    """
    try:
        yield
    except Exception as error:
        exchange([isinstance(error, UserError), str(error)])
        raise
    for index, failure in enumerate(exchange(None)):
        if failure is not None:
            is_mistake, text = failure
            kind = UserError if is_mistake else RuntimeError
            raise kind(text if is_mistake else f"process {index} failed: {text}")


def require_same(what: str, value: Any) -> None:
    """Raise UserError in all processes unless they have the same JSON value."""
    values = exchange(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"hosts: {what} must be the same in all processes; got {values[0]!r} "
                f"in process 0 and {other!r} in process {index}. Start all of them "
                "with the same command and code, over the same files."
            )


def gather(*, seconds: float) -> None:
    """Wait for the others, so long at the most; call it once, before leaving."""
    if is_several():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            distributed.global_state.client.wait_at_barrier(
                "attnjax/leave", int(1000 * seconds)
            )


class _StopAgreement:
    """Lets one process's request stop all of them at the same call of `poll`.

    A process that is asked says so in the store. Every process then, with its own
    calls held back, tells how many it has made, and all stop at the call after the
    most. Devices go on meanwhile: nobody is waited for who waits for a collective.
    """

    def __init__(self, signals):
        self._signals = signals
        self._calls = 0
        self._at: int | None = None
        self._who = ""
        self._lock = threading.Lock()
        threading.Thread(
            target=self._listen, name="stop-agreement", daemon=True
        ).start()

    def poll(self) -> str | None:
        """Who asked, from the agreed call on."""
        with self._lock:
            self._calls += 1
            is_time = self._at is not None and self._calls >= self._at
            return self._who if is_time else None

    def _listen(self) -> None:
        # Ends with the process, or when the store is gone and with it the run.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._who = self._wait_for_a_request()
            with self._lock:
                _set(f"attnjax/calls/{_index()}", self._calls)
                calls = [_get(f"attnjax/calls/{index}") for index in range(_count())]
                self._at = max(calls) + 1

    def _wait_for_a_request(self) -> str:
        client = distributed.global_state.client
        while True:
            own = self._signals.requested
            if own is not None:
                said = own if _index() == 0 else f"{own} (process {_index()})"
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    client.key_value_set("attnjax/stop", json.dumps(said))
            try:
                return json.loads(client.key_value_try_get("attnjax/stop"))
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("NOT_FOUND"):
                    raise
            time.sleep(_LOOK)


def _index() -> int:
    return distributed.global_state.process_id


def _count() -> int:
    return distributed.global_state.num_processes


def _set(name: str, value: Any) -> None:
    distributed.global_state.client.key_value_set(name, json.dumps(value))


def _get(name: str) -> Any:
    """Wait for a value. A process that is gone ends all: nobody waits for ever."""
    while True:
        try:
            text = distributed.global_state.client.blocking_key_value_get(name, _ROUND)
            return json.loads(text)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
