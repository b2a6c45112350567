"""The files of an image folder: which there are, which class and split they are of.

PATH/train/CLASS/**.png and PATH/val/CLASS/**.png    or
PATH/CLASS/**.png, of which a share of every class is held out
"""

import dataclasses
import difflib
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from attnjax.core.errors import UserError, unknown

TRAIN = "train"
HELD_OUT = ("val", "validation", "test", "eval")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class File:
    """One image file.

    Attributes:
        name: its path inside the folder, with forward slashes.
        label: its class.
        size: bytes.
        changed: nanoseconds since 1970 when its content last changed.
    """

    name: str
    label: int
    size: int = dataclasses.field(compare=False)
    changed: int = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Listing:
    """All image files of a folder, sorted by name.

    Attributes:
        root: the folder.
        classes: names, sorted; a label is a place in them.
        train: the files to train on.
        eval: those held out.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[File, ...]
    eval: tuple[File, ...]

    def fingerprint(self) -> str:
        """Hex digest of the classes and of both splits' names and sizes."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for files in (self.train, self.eval):
            digest.update(f"\1{len(files)}".encode())
            for file in files:
                digest.update(f"{file.name}\0{file.size}\0".encode())
        return digest.hexdigest()


def read_listing(
    root: Path, *, eval_split: str | None, eval_fraction: float
) -> Listing:
    """List a folder.

    Args:
        root: the folder.
        eval_split: the folder inside it that is held out; None takes the first of
            `HELD_OUT`, or a share of every class where there is none.
        eval_fraction: that share; files are chosen by a hash of their names.

    Raises:
        UserError: a missing folder, fewer than two classes, no image, or a class
            that is held out and not trained on.
    """
    require_folder(root)
    is_split = (root / TRAIN).is_dir()
    base = root / TRAIN if is_split else root
    held_out = _held_out_folder(root, eval_split, is_split)
    classes = _folders(base, leave_out=None if is_split else held_out)
    if len(classes) < 2:
        raise UserError(
            "folder: there must be at least two classes, a folder each; got "
            f"{len(classes)} in {base}. Lay images out as PATH/train/CLASS/*.png or "
            "PATH/CLASS/*.png."
        )
    train = _files(root, base, classes)
    if held_out is None:
        train, held = _split(train, len(classes), eval_fraction)
    else:
        held = _files(root, held_out, _known(held_out, classes, base))
    listing = Listing(root, tuple(classes), tuple(sorted(train)), tuple(sorted(held)))
    for name, files in (("trained on", listing.train), ("held out", listing.eval)):
        if not files:
            place = base if name == "trained on" or held_out is None else held_out
            raise UserError(
                f"folder: there must be images to be {name}; got none in {place}. "
                f"Known kinds are {' '.join(sorted(SUFFIXES))}."
            )
    return listing


def require_folder(path: Path) -> None:
    """Raise `UserError` unless there is such a folder; the nearest names are told."""
    if path.is_dir():
        return
    parent = path.absolute()
    while not parent.parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    missing, where = parent.name, parent.parent
    if parent.is_file():
        raise UserError(
            f"folder: PATH must be a folder of class folders; got the file {parent}."
        )
    beside = [entry.name for entry in where.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(missing, sorted(beside), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"folder: PATH must be a folder; got {path}, but {where} has no folder "
        f"{missing!r}. {hint}Check data.name and data.data_dir."
    )


def _held_out_folder(root: Path, wanted: str | None, is_split: bool) -> Path | None:
    if wanted is not None:
        if wanted == TRAIN or not (root / wanted).is_dir():
            names = [name for name in _folders(root) if name != TRAIN]
            raise unknown("folder", "eval_split", wanted, names)
        return root / wanted
    if not is_split:
        return None
    found = (root / name for name in HELD_OUT if (root / name).is_dir())
    return next(found, None)


def _folders(base: Path, leave_out: Path | None = None) -> list[str]:
    """Names of the folders in a folder that are not hidden, sorted."""
    with os.scandir(base) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    left_out = leave_out.name if leave_out is not None else None
    return sorted(n for n in names if not n.startswith(".") and n != left_out)


def _known(held_out: Path, classes: list[str], base: Path) -> list[str]:
    """`classes`, after a check that the held-out folder has no other."""
    for name in _folders(held_out):
        if name not in classes:
            error = unknown("folder", "class", name, classes)
            raise UserError(f"{error} It is in {held_out} and not in {base}.")
    return classes


def _files(root: Path, base: Path, classes: list[str]) -> list[File]:
    return [
        File(name, label, size, changed)
        for label, folder in enumerate(classes)
        for name, size, changed in _walk(root, base / folder)
    ]


def _walk(root: Path, folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of change of every image file below a folder."""
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(here).relative_to(root).as_posix()
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES and not name.startswith("."):
                yield f"{inside}/{name}", *_stat(os.path.join(here, name))


def _stat(path: str) -> tuple[int, int]:
    """Bytes and time of change; of a link to nothing, none."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _split(files: list[File], num_classes: int, fraction: float):
    """The same share of every class held out, at least one file but not the only one.

    The choice depends on the names in the folder and not on where it lies.
    """
    train, held = [], []
    groups: list[list[File]] = [[] for _ in range(num_classes)]
    for file in files:
        groups[file.label].append(file)
    for members in groups:
        members.sort(key=lambda file: hashlib.sha256(file.name.encode()).digest())
        count = math.floor(fraction * len(members) + 0.5)
        count = min(max(count, 1), max(len(members) - 1, 0))
        held += members[:count]
        train += members[count:]
    return train, held
