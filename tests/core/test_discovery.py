"""Mechanisms are found by file name, in the package and outside it."""

import dataclasses
import hashlib
import sys

import pytest

from attnjax.core import discovery
from attnjax.core.discovery import Catalog
from attnjax.core.errors import UserError

MECHANISM = '''
"""A mechanism outside the package."""
import dataclasses

from attnjax.core.spec import Capabilities, Decode, MixerSpec

SPEC = MixerSpec(
    name="my_mixer", title="Mine", family="softmax", paper="", source="",
    forms=("parallel",), capabilities=Capabilities(), decode=Decode(),
    parameter_count=lambda config, dims: 0,
    state_size=lambda config, dims, max_len: 0,
    flops=lambda config, dims, seq_len: 0.0,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options."""

    width: int = 3


class Mixer:
    pass
'''


@pytest.fixture
def outside(tmp_path):
    """Writes a mechanism's file, with replacements, and gives its path."""

    def make(name="my_mixer.py", **replace):
        text = MECHANISM
        for old, new in replace.items():
            assert CHANGES[old] in text
            text = text.replace(CHANGES[old], new)
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return make


CHANGES = {
    "stem": 'name="my_mixer"',
    "spec": "SPEC = ",
    "frozen": "@dataclasses.dataclass(frozen=True)",
    "decorator": "@dataclasses.dataclass(frozen=True)\n",
    "mixer": "class Mixer:\n    pass",
    "import": "import dataclasses\n\n",
}


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package with two entries, a private file and a file without a marker."""
    folder = tmp_path / "fake_room"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text("import sys\nSPEC = 1\n")
    (folder / "second.py").write_text("SPEC: int = 2\nraise ValueError('imported')\n")
    (folder / "_private.py").write_text("SPEC = 3\n")
    (folder / "helper.py").write_text("# SPEC = 4\nSPECIAL = 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Catalog("fake_room", what="thing", marker="SPEC")
    for name in [name for name in sys.modules if name.startswith("fake_room")]:
        del sys.modules[name]


def test_names_are_files_with_the_marker_and_nothing_is_imported(room):
    assert room.names() == ["first", "second"]
    assert "fake_room.second" not in sys.modules


def test_find_imports_the_entry(room):
    assert room.find("first").SPEC == 1


def test_an_unknown_name_lists_the_nearest(room):
    with pytest.raises(
        UserError, match="config: unknown thing 'frist'. Did you mean f"
    ):
        room.find("frist")


def test_a_catalog_without_outside_files_refuses_a_path(room):
    with pytest.raises(UserError, match="unknown thing"):
        room.find("./first.py")


def test_an_outside_file_is_loaded_once_while_its_bytes_stay(outside):
    path = outside()
    module = discovery.find(path)
    assert module.Config() == module.Config(width=3)
    assert dataclasses.is_dataclass(module.Config)
    assert discovery.find(path) is module
    with open(path, "a") as file:
        file.write("\nEXTRA = 1\n")
    assert discovery.find(path).EXTRA == 1


def test_the_digest_of_an_outside_file_is_that_of_its_bytes(outside):
    path = outside()
    with open(path, "rb") as file:
        assert discovery.file_digest(path) == hashlib.sha256(file.read()).hexdigest()


def test_a_missing_outside_file_is_refused(tmp_path, outside):
    outside()
    with pytest.raises(UserError, match=r"no file .*Did you mean .*my_mixer\.py\?"):
        discovery.find(str(tmp_path / "my_mixr.py"), owner="config.model.layers")


def test_an_outside_file_that_fails_is_one_line_with_its_place(outside):
    path = outside(**{"import": "import nothing_there\n"})
    with pytest.raises(UserError, match=r"my_mixer\.py:3: ModuleNotFoundError") as told:
        discovery.find(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("replace", "match"),
    [
        ({"stem": 'name="other"'}, "SPEC.name must equal the file's name; got 'other'"),
        ({"spec": "THING = "}, "must define SPEC; got none"),
        ({"spec": "SPEC = 3\nX = "}, r"SPEC must be a core\.spec\.MixerSpec; got <cl"),
        ({"frozen": "@dataclasses.dataclass"}, "frozen dataclass; got a mutable one"),
        ({"decorator": ""}, "Config must be a frozen dataclass; got <class"),
        ({"mixer": ""}, "either the class Mixer or the function preset; got neither"),
        ({"mixer": "Mixer = preset = print"}, "got Mixer and preset"),
        ({"mixer": "Mixer = 3"}, "either the class Mixer or the function preset"),
    ],
)
def test_a_malformed_mechanism_is_refused(outside, replace, match):
    with pytest.raises(UserError, match=match):
        discovery.find(outside(**replace))


def test_every_mechanism_of_the_package_is_well_formed():
    for name in discovery.names():
        discovery.check(discovery.find(name))


def test_paths_and_names_are_told_apart():
    assert discovery.is_outside("a/b.py")
    assert discovery.is_outside("b.py")
    assert not discovery.is_outside("attention")
