"""A disk that fills up in the middle of a sweep: what is done stays, the rest waits."""

import json
import subprocess

import pytest
import sweep_matrix
import tiny_run

from attnjax.studies import ledger

pytestmark = pytest.mark.reliability


@pytest.fixture(params=[False, True], ids=["alone", "together"])
def lab(tmp_path, request):
    """A sweep whose work directory "small" is a file system of eight megabytes."""
    made = sweep_matrix.Lab(tmp_path, points=6, jobs=1, together=request.param)
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system: {done.stderr.decode().strip()}")
    yield made
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def fill(path):
    """Write until nothing fits."""
    size = 1 << 20
    with open(path, "wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def test_finished_points_stay_and_the_others_wait_for_room(lab):
    work = lab.folder / "small"
    driver = lab.start("small", crashes=False)
    tiny_run.wait_for(lambda: lab.done("small"), process=driver)
    fill(work / "ballast")
    assert driver.wait(timeout=tiny_run.PATIENCE) == 2, lab.log("small")
    finished = lab.done("small")
    assert 1 <= len(finished) < 6
    log = lab.log("small")
    assert "Traceback" not in log
    assert log.count("error: ") == 6 - len(finished)
    assert log.count("no space left") >= 6 - len(finished)
    for path in [*work.glob("state/*.json"), *work.glob("configs/*.json")]:
        json.loads(path.read_text())
    before = {
        path: path.read_bytes()
        for point in finished
        for path in (work / "points" / point).rglob("*.json*")
    }
    (work / "ballast").unlink()
    again = lab.start("small", crashes=False)
    assert again.wait(timeout=tiny_run.PATIENCE) == 0, lab.log("small")
    assert len(lab.done("small")) == 6
    assert all(path.read_bytes() == content for path, content in before.items())
    for point in lab.done("small"):
        assert ledger.read(work, point).state == "done"
        assert tiny_run.newest_checkpoint(work / "points" / point) == sweep_matrix.STEPS
