import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from attnjax.core.errors import UserError
from attnjax.studies import ledger
from attnjax.studies.ledger import State

POINT = "0123456789abcdef"
HOLD = """
import sys
from attnjax.studies import ledger
with ledger.hold(sys.argv[1], sys.argv[2]):
    state = ledger.begun(ledger.read(sys.argv[1], sys.argv[2]))
    ledger.write(sys.argv[1], state)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def work(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path


@pytest.fixture
def holder(work):
    """A process that runs the point, as far as the ledger can see."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(work), POINT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_point_without_a_file_is_pending(work):
    assert ledger.current(work, POINT) == State(POINT)
    assert State(POINT).state == "pending"


def test_a_state_reads_as_it_was_written(work):
    state = State(POINT, "failed", 3, "host", 7, "a", "b", 1, "no luck")
    ledger.write(work, state)
    assert ledger.read(work, POINT) == state
    written = json.loads((work / "state" / f"{POINT}.json").read_text())
    assert written["state"] == "failed" and written["attempt"] == 3


def test_an_attempt_begins_with_a_clean_slate(work):
    state = ledger.begun(State(POINT, "failed", 3, exit_code=1, error="no luck"))
    assert (state.state, state.attempt, state.pid) == ("running", 4, os.getpid())
    assert state.started is not None
    assert (state.ended, state.exit_code, state.error) == (None, None, None)


def test_running_is_pending_once_its_process_is_gone(work, holder):
    assert ledger.is_held(work, POINT)
    assert ledger.current(work, POINT).state == "running"
    assert ledger.current(work, POINT).pid == holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not ledger.is_held(work, POINT)
    found = ledger.current(work, POINT)
    assert (found.state, found.attempt) == ("pending", 1)
    assert ledger.read(work, POINT).state == "running"


def test_a_held_point_is_refused_to_others(work, holder):
    with pytest.raises(ledger.Busy), ledger.hold(work, POINT, patience=0.1):
        pass
    holder.stdin.close()
    holder.wait()
    with ledger.hold(work, POINT):
        assert ledger.is_held(work, POINT)


def test_asking_does_not_keep_a_worker_from_its_point(work):
    ended = threading.Event()

    def ask():
        while not ended.is_set():
            ledger.is_held(work, POINT)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            with ledger.hold(work, POINT):
                pass
    finally:
        ended.set()
        asking.join()


@pytest.mark.parametrize("text", ["{", "[]", '{"state": "lost"}'])
def test_a_damaged_state_is_named(work, text):
    (work / "state" / f"{POINT}.json").write_text(text)
    with pytest.raises(UserError, match=r"state: .*json.*[Dd]elete it; the run itself"):
        ledger.read(work, POINT)


def test_last_words_are_the_last_line_with_letters(tmp_path):
    log = tmp_path / "log"
    assert ledger.last_words(log) is None
    log.write_text("x" * 9000 + "\nfirst\n  the end: 3  \n\n \n")
    assert ledger.last_words(log) == "the end: 3"


def test_done_means_every_step_and_a_summary(tmp_path):
    assert not ledger.is_done(tmp_path)
    (tmp_path / "config.json").write_text('{"train": {"steps": 5}}')
    (tmp_path / "manifest.json").write_text('{"finished_step": 5}')
    assert not ledger.is_done(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    assert ledger.is_done(tmp_path)
    (tmp_path / "manifest.json").write_text('{"finished_step": 4}')
    assert not ledger.is_done(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert not ledger.is_done(tmp_path)


def test_looking_at_a_ledger_needs_no_jax():
    """Drivers and cluster scripts look often, on machines where starting it is slow."""
    code = "import sys, attnjax.studies.ledger; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
