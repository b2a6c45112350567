import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from attnjax.core.errors import UserError
from attnjax.training.run_lock import RunLock

HOLDER = """
import sys, time
from attnjax.training.run_lock import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def hold(folder):
    program = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert program.stdout.readline().strip() == b"held"
    return program


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    holder = hold(tmp_path)
    try:
        with pytest.raises(UserError, match="in use by another process") as caught:
            RunLock(tmp_path)
        assert f"process {holder.pid} on" in str(caught.value)
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_left_by_a_killed_process_is_no_obstacle(tmp_path):
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunLock(tmp_path).release()


def test_a_released_lock_lets_the_next_one_in(tmp_path):
    RunLock(tmp_path).release()
    lock = RunLock(tmp_path)
    lock.release()
    lock.release()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"cannot lock files \(No locks available\)"):
        RunLock(tmp_path)


def test_a_damaged_lock_file_does_not_hide_the_refusal(tmp_path):
    lock = RunLock(tmp_path)
    lock.path.write_bytes(b"\xff not json")
    with pytest.raises(UserError, match="in use by another process"):
        RunLock(tmp_path)
    lock.release()
