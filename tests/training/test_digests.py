import json
import random

import pytest

from attnjax.training import digests


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    rng = random.Random(0)
    (tmp_path / "state" / "d" / "data").write_bytes(rng.randbytes(2003))
    (tmp_path / "state" / "odd name ü'\"\n.x").write_bytes(b"odd")
    (tmp_path / "state" / "nothing").write_bytes(b"")
    (tmp_path / "meta.json").write_text('{"step": 3}\n')
    digests.write(tmp_path)
    return tmp_path


def every_file(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_untouched_directory_has_no_problems(sealed):
    assert digests.problems(sealed) == []


def test_every_file_is_listed_with_size_and_digest(sealed):
    files = json.loads((sealed / digests.NAME).read_text())["files"]
    names = {path.relative_to(sealed).as_posix() for path in every_file(sealed)}
    assert set(files) == names - {digests.NAME}
    assert files["state/d/data"]["size"] == 2003
    assert all(len(row["sha256"]) == 64 for row in files.values())


def test_every_flipped_bit_of_every_sampled_byte_is_seen(sealed):
    for path in every_file(sealed):
        whole = path.read_bytes()
        places = {0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1}
        for place in sorted(p for p in places if 0 <= p < len(whole)):
            for bit in range(8):
                changed = bytearray(whole)
                changed[place] ^= 1 << bit
                path.write_bytes(changed)
                found = digests.problems(sealed)
                assert found, (path.name, place, bit)
                assert path.name in found[0]
        path.write_bytes(whole)
    assert digests.problems(sealed) == []


def test_every_single_byte_of_the_list_itself_matters(sealed):
    path = sealed / digests.NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x20
        path.write_bytes(changed)
        assert digests.problems(sealed), (place, chr(whole[place]))


def test_every_truncation_growth_and_deletion_is_seen(sealed):
    for path in every_file(sealed):
        whole = path.read_bytes()
        for length in {0, 1, len(whole) // 2, len(whole) - 1} & set(range(len(whole))):
            path.write_bytes(whole[:length])
            assert digests.problems(sealed), (path.name, length)
        path.write_bytes(whole + b"\n")
        assert digests.problems(sealed), path.name
        path.unlink()
        assert digests.problems(sealed), path.name
        path.write_bytes(whole)
    assert digests.problems(sealed) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / "meta.json").unlink(), "meta.json: missing"),
        (lambda f: (f / "meta.json").write_text("{}"), "meta.json: 2 bytes instead of"),
        (
            lambda f: (f / "meta.json").write_text('{"step": 4}\n'),
            "meta.json: content changed",
        ),
        (lambda f: (f / digests.NAME).unlink(), "digests.json: missing"),
        (lambda f: (f / digests.NAME).write_bytes(b""), "digests.json: empty"),
        (lambda f: (f / digests.NAME).write_bytes(b"[]"), "not the list"),
        (lambda f: (f / digests.NAME).write_bytes(b"{}"), "not the list"),
        (lambda f: (f / digests.NAME).write_bytes(b"\xff"), "not the list"),
        (lambda f: (f / digests.NAME).write_bytes(b"[" * 100_000), "not the list"),
    ],
)
def test_the_problem_names_the_file_and_what_is_wrong(sealed, change, text):
    change(sealed)
    assert text in "; ".join(digests.problems(sealed))


def test_a_directory_in_place_of_a_file_is_a_problem(sealed):
    (sealed / "meta.json").unlink()
    (sealed / "meta.json").mkdir()
    assert "meta.json" in digests.problems(sealed)[0]


def test_files_of_file_managers_are_no_problem(sealed):
    (sealed / ".DS_Store").write_bytes(b"x")
    assert digests.problems(sealed) == []
