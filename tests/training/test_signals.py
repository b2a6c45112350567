import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from attnjax.core.errors import EXIT_SAVED
from attnjax.training.signals import StopRequested, StopSignal


def send(name):
    signal.raise_signal(getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_the_first_signal_is_remembered_and_announced(name, capfd):
    with StopSignal() as stop:
        assert stop.requested is None
        send(name)
        assert stop.requested == name
    shown = capfd.readouterr().err
    assert shown.strip().startswith(f"{name} received: saving the state")
    assert shown.count("received") == 1


def test_a_second_sigint_stops_at_once_and_a_second_sigterm_does_not(capfd):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        send("SIGTERM")
        send("SIGTERM")
        assert stop.requested == "SIGTERM"
        send("SIGINT")
    assert capfd.readouterr().err.count("received") == 1


def test_the_former_handlers_come_back():
    def mine(*_):
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(ZeroDivisionError), StopSignal():
            assert signal.getsignal(signal.SIGUSR1) is not mine
            _ = 1 / 0
        assert signal.getsignal(signal.SIGUSR1) is mine
        with StopSignal(cluster=False):
            assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_raises_inside_a_phase_that_looks_at_no_flag(capfd):
    with StopSignal() as stop:
        with pytest.raises(StopRequested, match="SIGTERM"), stop.interrupting():
            send("SIGTERM")
            raise AssertionError("not reached")
        send("SIGTERM")  # outside, and the second: only a flag
        with pytest.raises(StopRequested), stop.interrupting():
            raise AssertionError("not reached: the request came before")


def test_a_request_that_was_turned_into_another_error_is_still_a_request(capfd):
    with (
        StopSignal() as stop,
        pytest.raises(StopRequested, match="SIGTERM"),
        stop.interrupting(),
    ):
        try:
            send("SIGTERM")
        except StopRequested as error:
            raise ImportError("as an extension module says it") from error


def test_a_request_that_was_swallowed_is_raised_at_the_end(capfd):
    with (
        StopSignal() as stop,
        pytest.raises(StopRequested, match="SIGTERM"),
        stop.interrupting(),
        contextlib.suppress(StopRequested),
    ):
        send("SIGTERM")


class _Finaliser:
    """Gets the signal where exceptions go no further."""

    def __del__(self):
        send("SIGTERM")


def test_a_request_inside_a_finaliser_is_raised_a_moment_later(capfd):
    started = time.monotonic()
    with StopSignal() as stop:
        with pytest.raises(StopRequested), stop.interrupting():
            thing = _Finaliser()
            del thing
            assert stop.requested == "SIGTERM"
            while time.monotonic() < started + 20:
                time.sleep(0.01)
            pytest.fail("the phase was not left")
        hook = sys.unraisablehook
    assert sys.unraisablehook is not hook
    shown = capfd.readouterr().err
    assert "Traceback" not in shown and shown.count("received") == 1


def test_other_exceptions_of_finalisers_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Broken:
        def __del__(self):
            raise ValueError("no")

    with StopSignal():
        Broken()
    assert isinstance(told[0].exc_value, ValueError)


def test_errors_without_a_request_and_second_sigints_come_out_as_they_are(capfd):
    with StopSignal() as stop:
        with pytest.raises(ImportError), stop.interrupting():
            raise ImportError
        with pytest.raises(KeyboardInterrupt), stop.interrupting():
            with contextlib.suppress(StopRequested):
                send("SIGTERM")
            send("SIGINT")


def test_other_threads_are_refused():
    caught = []

    def enter():
        try:
            StopSignal().__enter__()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread only" in caught[0]


def run(body, *, signal_after):
    """Run a program, send SIGTERM when it says `ready`; (exit code, stderr, s)."""
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert program.stdout.readline().strip() == "ready"
    time.sleep(signal_after)
    begin = time.perf_counter()
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=300)
    return program.returncode, err, time.perf_counter() - begin


def test_a_compilation_is_left_at_once_with_the_right_exit_code():
    code, err, taken = run(
        """
        import jax, jax.numpy as jnp
        from attnjax.core.errors import EXIT_SAVED
        from attnjax.training.signals import StopSignal, StopRequested, leave

        def long(x):
            for i in range(3000):
                x = jnp.sin(x @ x) * i + jnp.cos(x).sum(0)
            return x

        lowered = jax.jit(long).lower(jnp.zeros((64, 64)))
        with StopSignal() as stop:
            print("ready", flush=True)
            try:
                with stop.interrupting():
                    lowered.compile()
            except StopRequested:
                leave(EXIT_SAVED)
        """,
        signal_after=0.5,
    )
    assert (code, "SIGTERM received" in err) == (EXIT_SAVED, True), err
    assert taken < 2.0  # 0.1 s where nothing else runs; the compilation takes 20
