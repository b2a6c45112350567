"""Finding things by file name: a file in a room is a catalog entry, no list is kept.

`Catalog` serves every room that is open to extension: mechanisms, data sources,
models. A file counts when its name does not begin with "_" and it assigns the
room's marker at top level. Names are listed without importing anything.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import re
import types
from pathlib import Path

from attnjax.core.errors import UserError, unknown
from attnjax.core.schema import field_types
from attnjax.core.spec import MixerSpec
from attnjax.core.userfile import digest_of, read_source, run_file


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The entries of one package, found by file name.

    Attributes:
        package: its dotted name, as in "attnjax.mixers".
        what: what an entry is called in messages, as in "mixer".
        marker: the top-level name that an entry's file assigns or defines.
        outside: whether "path/file.py" is accepted as a name.
    """

    package: str
    what: str
    marker: str
    outside: bool = False

    def names(self) -> list[str]:
        """Every name, sorted, without importing the files."""
        pattern = re.compile(
            rf"^(?:{self.marker}\b\s*[:=]|(?:def|class) {self.marker}\b)", re.MULTILINE
        )
        return sorted(
            path.stem
            for folder in self._folders()
            for path in folder.glob("*.py")
            if not path.name.startswith("_")
            and pattern.search(path.read_text(encoding="utf-8"))
        )

    def find(self, name: str, *, owner: str = "config") -> types.ModuleType:
        """The module of the entry `name`, imported now if it was not yet.

        Args:
            name: a name of the package or, where allowed, "path/file.py".
            owner: the head of the message, as in "config.model.layers".

        Raises:
            UserError: no such entry (with the nearest), or an outside file that is
                missing or fails.
        """
        if is_outside(name) and self.outside:
            return _load_outside(name, marker=self.marker, owner=owner)
        names = self.names()
        if name not in names:
            raise unknown(owner, self.what, name, names)
        return importlib.import_module(f"{self.package}.{name}")

    def _folders(self) -> list[Path]:
        found = importlib.util.find_spec(self.package)
        places = found.submodule_search_locations if found else None
        return [Path(place) for place in places or ()]


MIXERS = Catalog("attnjax.mixers", what="mixer", marker="SPEC", outside=True)


def names() -> list[str]:
    """Every mechanism of the package, sorted, without importing them."""
    return MIXERS.names()


def find(name: str, *, owner: str = "config") -> types.ModuleType:
    """The checked module of a mechanism, by catalog name or "path/my_mixer.py"."""
    module = MIXERS.find(name, owner=owner)
    check(module)
    return module


def is_outside(name: str) -> bool:
    """Whether `name` is a path to a file and not a catalog name."""
    return "/" in name or "\\" in name or name.endswith(".py")


def file_digest(name: str, *, owner: str = "config") -> str:
    """sha256 hex of the file behind a mechanism's name, for the run's manifest."""
    if is_outside(name):
        return digest_of(read_source(name, owner=owner))
    module = MIXERS.find(name, owner=owner)
    return digest_of(Path(module.__file__).read_bytes())


def check(module: types.ModuleType) -> None:
    """Verify that a module is a mechanism as the rest of the package expects one.

    It has SPEC (a MixerSpec whose name is the file's), Config (a frozen dataclass
    of types that a config may hold), and either `Mixer` or `preset`, not both.

    Raises:
        UserError: when it does not; the text says what is missing.
    """
    owner = getattr(module, "__file__", None) or module.__name__
    spec = getattr(module, "SPEC", None)
    if not isinstance(spec, MixerSpec):
        raise _malformed(owner, "SPEC must be a core.spec.MixerSpec", type(spec))
    stem = Path(module.__file__).stem
    if spec.name != stem:
        raise UserError(
            f"{owner}: SPEC.name must equal the file's name; got {spec.name!r}. "
            f"Rename one to the other"
        )
    config = getattr(module, "Config", None)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise _malformed(owner, "Config must be a frozen dataclass", config)
    if not config.__dataclass_params__.frozen:
        raise UserError(
            f"{owner}: Config must be a frozen dataclass; got a mutable one"
        )
    field_types(config)
    forms = [name for name in ("Mixer", "preset") if hasattr(module, name)]
    if len(forms) != 1 or not callable(getattr(module, forms[0])):
        raise UserError(
            f"{owner}: must define either the class Mixer or the function preset; "
            f"got {' and '.join(forms) or 'neither'}"
        )


def _malformed(owner: str, rule: str, value: object) -> UserError:
    return UserError(f"{owner}: {rule}; got {value!r}")


_outside_modules: dict[tuple[str, str], types.ModuleType] = {}


def _load_outside(name: str, *, marker: str, owner: str) -> types.ModuleType:
    """The module of a file outside the package; the same bytes are run once."""
    path = Path(name).expanduser()
    sha = digest_of(read_source(path, owner=owner))
    place = str(path.resolve())
    if (place, sha) not in _outside_modules:
        # The place and the content in the module's name keep two files of one name,
        # or two versions of one file, apart.
        tag = hashlib.sha256(f"{place}:{sha}".encode()).hexdigest()[:12]
        module = run_file(path, owner=owner, module_name=f"attnjax_{path.stem}_{tag}")
        if not hasattr(module, marker):
            raise UserError(f"{owner}: {name} must define {marker}; got none.")
        _outside_modules[place, sha] = module
    return _outside_modules[place, sha]
