import errno
import json
import os

import pytest

from attnjax.core.errors import UserError
from attnjax.training import disk


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENOTDIR, "a file stands where a directory must be"),
    ],
)
def test_disk_troubles_become_one_line_with_a_cure(number, text):
    with pytest.raises(UserError, match=text) as caught, disk.disk_errors("metrics"):
        raise OSError(number, os.strerror(number), "/somewhere/file")
    assert str(caught.value).startswith("metrics: ")
    assert "/somewhere/file" in str(caught.value)


def test_a_full_disk_is_recognised_inside_a_storage_librarys_error():
    with pytest.raises(UserError, match="no space left"), disk.disk_errors("x"):
        raise ValueError("INTERNAL: Error writing ...: No space left on device [OS]")


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), disk.disk_errors("x"):
        raise KeyError("a")
    with pytest.raises(OSError, match="Interrupted"), disk.disk_errors("x"):
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))
    with pytest.raises(UserError, match="^as it was$"), disk.disk_errors("x"):
        raise UserError("as it was")


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    disk.write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_write_atomic_takes_text_and_bytes_and_leaves_no_other_file(tmp_path):
    disk.write_atomic(tmp_path / "t", "ä")
    disk.write_atomic(tmp_path / "b", b"\x00")
    assert (tmp_path / "t").read_bytes() == "ä".encode()
    assert {p.name for p in tmp_path.iterdir()} == {"t", "b"}


def test_json_files_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        disk.write_json(tmp_path / "a", {"a": float("nan")})


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00"])
def test_an_unreadable_json_file_is_named_with_its_cure(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^workdir: cannot read .*config.json.*Mend"):
        disk.read_json(path, owner="workdir", cure="Mend it.")
