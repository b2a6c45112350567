"""A disk that is full or read-only: one readable line, exit 2, and no harm done."""

import shutil
import subprocess
import types

import numpy as np
import pytest
import tiny_run

from attnjax.core.errors import UserError
from attnjax.training.checkpoints import Checkpointer

pytestmark = pytest.mark.reliability


@pytest.fixture
def bench(tmp_path):
    return tiny_run.Bench(tmp_path, options={"train.tensorboard": "false"})


@pytest.fixture
def mount(bench):
    """A function that puts a small file system under the run "small"."""
    place = bench.folder / "small"

    def mounted(*options):
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", ",".join(["size=8m", *options])]
        done = subprocess.run([*words, "tmpfs", str(place)], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a file system: {done.stderr.decode().strip()}")
        return place

    yield mounted
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_when_freed(bench, mount):
    ballast = mount() / "ballast"
    ballast.write_bytes(bytes(7_000_000))
    code, told = bench.finish("small"), bench.log("small")
    assert code == 2, told
    assert told.count("error: ") == 1
    assert "error: checkpoints: no space left on the disk: step " in told
    assert "Traceback" not in told
    ballast.unlink()
    assert bench.finish("small") == 0, bench.log("small")
    assert tiny_run.newest_checkpoint(bench.folder / "small") == tiny_run.STEPS


def test_a_disk_that_fills_up_during_a_save_is_one_line(mount, capfd, monkeypatch):
    place = mount()
    usage = types.SimpleNamespace(free=10**9)  # as a quota looks: free, until it is not
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    state = {str(i): np.random.rand(100, 100) for i in range(200)}
    with Checkpointer(place / "checkpoints") as saver:
        saver.save(1, {"small": np.zeros(3)}, {})
        saver.save(2, state, {})
        with pytest.raises(UserError, match="no space left on the disk"):
            saver.wait()
        assert saver.latest().step == 1
        assert saver.cleared == ("2.saving",)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


def test_a_disk_that_is_full_from_the_start_is_one_line(bench, mount):
    place = mount()
    with pytest.raises(OSError, match="No space"), open(place / "x", "wb") as file:
        file.write(bytes(9_000_000))
    code, told = bench.finish("small"), bench.log("small").strip()
    assert code == 2, told
    assert told.startswith("error: workdir: ") and "no space left on the disk" in told
    assert len(told.splitlines()) == 1


def test_a_read_only_disk_is_one_line(bench, mount):
    mount("ro")
    code, told = bench.finish("small"), bench.log("small").strip()
    assert code == 2, told
    assert told.startswith("error: workdir: ") and "read-only" in told
    assert len(told.splitlines()) == 1
