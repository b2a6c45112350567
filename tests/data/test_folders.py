import errno
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from attnjax.core.errors import UserError
from attnjax.data.folders import cache_root, disk_errors, new_folder, one_builder


def test_the_option_then_the_environment_then_home_decide(monkeypatch):
    monkeypatch.setenv("ATTNJAX_CACHE", "/from/environment")
    assert cache_root("~/mine") == Path.home() / "mine"
    assert cache_root(None) == Path("/from/environment")
    monkeypatch.delenv("ATTNJAX_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "attnjax"


def test_a_finished_folder_takes_the_place_of_an_old_one(tmp_path):
    place = tmp_path / "place"
    for text in ("old", "new"):
        with new_folder(place) as fresh:
            (fresh / "file").write_text(text)
            if text == "new":
                assert (place / "file").read_text() == "old"
    assert (place / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["place"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").write_text("old")
    with pytest.raises(KeyError), new_folder(place) as fresh:
        (fresh / "file").write_text("new")
        raise KeyError
    assert (place / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["place"]


def test_what_a_killed_builder_left_is_removed(tmp_path):
    place = tmp_path / "place"
    for name in ("place.new-abc", "place.old-abc", "place-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("left")
    (tmp_path / "place.lock").write_text("")
    with new_folder(place):
        pass
    assert sorted(os.listdir(tmp_path)) == ["place", "place-2", "place.lock"]


def hold(path, started, release):
    with one_builder(Path(path)):
        started.set()
        release.wait(300)


def test_a_second_builder_waits_and_says_so(tmp_path, capsys):
    context = multiprocessing.get_context("spawn")
    started, release = context.Event(), context.Event()
    place = tmp_path / "place"
    other = context.Process(target=hold, args=(str(place), started, release))
    other.start()
    assert started.wait(300)
    release_at = time.monotonic() + 0.4
    threading.Timer(0.4, release.set).start()
    with one_builder(place):
        assert time.monotonic() >= release_at
    other.join(300)
    assert "waiting for another process" in capsys.readouterr().err


def test_the_lock_of_a_killed_builder_is_free(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, release = context.Event(), context.Event()
    place = tmp_path / "place"
    other = context.Process(target=hold, args=(str(place), started, release))
    other.start()
    assert started.wait(300)
    other.kill()
    other.join(300)
    with one_builder(place):  # or it would wait for ever
        assert not other.is_alive()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full. Free space, or set data.cache_dir"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "it may not be written. Make it writable, or set"),
        (errno.EROFS, "it may not be written"),
        (errno.ENOTDIR, "a file is in its place. Move that file away"),
        (errno.EEXIST, "a file is in its place"),
    ],
)
def test_a_disk_that_cannot_be_written_says_why(number, message):
    with pytest.raises(UserError, match=f"cannot write the cache; got .*: {message}"):  # noqa: SIM117
        with disk_errors(Path("/the/cache")):
            raise OSError(number, os.strerror(number))


def test_other_errors_of_the_disk_stay_what_they_are():
    with pytest.raises(OSError, match="Input/output"), disk_errors(Path("/x")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
