"""Points that one program trains, killed and told to stop in a real process."""

import os
import signal

import psutil
import pytest
import sweep_matrix
import tiny_run

from attnjax.studies import ledger

pytestmark = pytest.mark.reliability


def worker_of(driver, lab, name, *, beyond=0):
    """The process that trains beyond what is saved, and how far it is; waits."""
    found = {}

    def is_there():
        for run in (lab.folder / name / "points").glob("*"):
            state, step = (
                ledger.read(lab.folder / name, run.name),
                tiny_run.last_step(run),
            )
            saved = tiny_run.newest_checkpoint(run)
            if state.state == "running" and 0 < saved < step > beyond:
                found[run.name] = (state.pid, step)
        return len(found) == 3

    assert tiny_run.wait_for(is_there, process=driver), lab.log(name)
    pids, steps = zip(*found.values(), strict=True)
    assert len(set(pids)) == 1 and psutil.Process(pids[0]).ppid() == driver.pid
    return pids[0], max(steps)


def test_a_group_killed_and_then_stopped_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path,
):
    lab = sweep_matrix.Lab(
        tmp_path, points=3, jobs=1, together=True, mixers=("attention",)
    )
    alone = lab.start("alone", crashes=False)
    assert alone.wait(timeout=tiny_run.PATIENCE) == 0, lab.log("alone")
    driver = lab.start("disturbed", crashes=False)
    killed, step = worker_of(driver, lab, "disturbed")
    os.kill(killed, signal.SIGKILL)
    told, _ = worker_of(driver, lab, "disturbed", beyond=step + 1)
    os.kill(told, signal.SIGTERM)
    assert driver.wait(timeout=tiny_run.PATIENCE) == 0, lab.log("disturbed")
    work = lab.folder / "disturbed"
    log = lab.log("disturbed")
    assert log.count("killed by SIGKILL") == 1 and "Traceback" not in log
    states = [ledger.read(work, one) for one in lab.done("disturbed")]
    assert [(one.state, one.attempt) for one in states] == [("done", 3)] * 3
    # Twice they went on from a save, not from the beginning.
    said = "".join(path.read_text() for path in work.glob("logs/*.log"))
    assert said.count("resuming 3 runs from step") == 2
    assert said.count("SIGTERM received") == 1
    assert sweep_matrix._differences(lab) == []
    assert lab.report("alone") == lab.report("disturbed")
