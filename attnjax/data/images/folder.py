"""`folder:PATH`: image files in class folders, decoded batch by batch.

`PATH/train/CLASS/*.jpg` with `PATH/val/CLASS/*.jpg`, or `PATH/CLASS/*.jpg`, of which a
share of every class is held out. Files that cannot be decoded are found when the
folder is first opened, named on one line, and left out; a file that breaks later has
weight 0 in its batch.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from attnjax.data.config import check_fraction
from attnjax.data.folders import cache_root, disk_errors, one_builder
from attnjax.data.images.config import ImageConfig
from attnjax.data.images.corpus import ImageCorpus, make_corpus
from attnjax.data.images.damage import Damage, say_left_out
from attnjax.data.images.decode import Undecodable, decode
from attnjax.data.images.listing import File, Listing, read_listing
from attnjax.data.images.threads import each
from attnjax.data.progress import progress
from attnjax.data.source import SourceSpec

SOURCE = SourceSpec(summary="image files in class folders", argument="PATH")
_GROUP = 256  # files decoded between two steps of the progress bar


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Options of `folder:PATH`.

    Attributes:
        data_dir: what a relative PATH starts from; None for the current folder.
        eval_split: the folder inside PATH that is held out; None takes val,
            validation, test or eval beside train, else a share of every class.
        eval_fraction: that share, between 0 and 1.
        verify: decode every file when the folder is first opened, and again when
            files change; False leaves damaged ones to be met during training.
        cache_dir: where the result of that is kept; None for $ATTNJAX_CACHE, or
            ~/.cache/attnjax where that is not set.
    """

    name: str = "folder:."
    image_size: int = 224
    channels: int = 3
    data_dir: str | None = None
    eval_split: str | None = None
    eval_fraction: float = 0.1
    verify: bool = True
    cache_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_fraction(self.eval_fraction)


def num_classes(config: Config) -> int:
    """From the names of folders; no image is read."""
    return len(_listing(config).classes)


def open_source(config: Config) -> ImageCorpus:
    """The folder's images.

    Raises:
        UserError: a missing folder, too few classes, classes that differ between
            the splits, or no readable image.
    """
    listing = _listing(config)
    everything = (*listing.train, *listing.eval)
    unreadable = _unreadable(listing, config) if config.verify else {}
    say_left_out("folder", unreadable, len(everything))
    damage = Damage("folder")
    readers = [
        Files(listing.root, _without(files, unreadable), config.channels, damage)
        for files in (listing.train, listing.eval)
    ]
    facts = {
        "num_files": len(everything),
        "num_unreadable": len(unreadable),
        "unreadable": sorted(unreadable)[:100],
    }
    return make_corpus(
        config,
        tuple(readers),
        tuple(len(reader.files) for reader in readers),
        listing.classes,
        fingerprint=_fingerprint(listing, unreadable),
        provenance=facts,
    )


class Unreachable(Undecodable):
    """A file whose bytes could not be read; another time they may be."""


def _listing(config: Config) -> Listing:
    path = os.path.join(config.data_dir or "", os.path.expanduser(config.argument))
    return read_listing(
        Path(os.path.expanduser(path)),
        eval_split=config.eval_split,
        eval_fraction=config.eval_fraction,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """A reader (see `corpus.Reader`) of files.

    Attributes:
        root: the folder.
        files: those of one split.
        channels: 1 or 3.
        damage: counts what cannot be decoded.
    """

    root: Path
    files: tuple[File, ...] = dataclasses.field(repr=False)
    channels: int
    damage: Damage = dataclasses.field(repr=False)
    is_stored: bool = dataclasses.field(default=False, init=False)
    size: str = dataclasses.field(default="", init=False)

    def read(self, indices, finish):
        """See `corpus.Reader.read`; files are decoded in threads."""

        def one(place: int) -> np.ndarray | None:
            file = self.files[indices[place]]
            try:
                return finish(place, decode_file(self.root / file.name, self.channels))
            except Undecodable as error:
                self.damage.note(file.name, str(error))
                return None

        labels = [self.files[index].label for index in indices]
        return each(one, range(len(indices))), np.array(labels, np.int32)


def decode_file(path: Path, channels: int) -> np.ndarray:
    """uint8 [h, w, channels] of a file.

    Raises:
        Unreachable: it cannot be read.
        Undecodable: `decode` says so.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unreachable(error.strerror or type(error).__name__) from error
    return decode(data, channels)


def _without(files: Iterable[File], unreadable: dict[str, str]) -> tuple[File, ...]:
    return tuple(file for file in files if file.name not in unreadable)


def _fingerprint(listing: Listing, unreadable: dict[str, str]) -> str:
    """Of classes, names, sizes, and of which files are left out."""
    left_out = json.dumps(sorted(unreadable))
    return hashlib.sha256((listing.fingerprint() + left_out).encode()).hexdigest()


def _unreadable(listing: Listing, config: Config) -> dict[str, str]:
    """Name -> reason of every file that cannot be decoded; kept in the cache.

    The key holds names, sizes and times of change, so changed files are read again.
    """
    files = sorted((*listing.train, *listing.eval))
    facts = [[file.name, file.size, file.changed] for file in files]
    facts = [str(listing.root.absolute()), config.channels, facts]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    folder = cache_root(config.cache_dir) / "images"
    path = folder / f"{key}.json"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with one_builder(path):
            if (found := _kept(path)) is not None:
                return found
            failed = _decode_all(listing.root, files, config.channels)
            found = {name: str(error) for name, error in failed.items()}
            if not any(isinstance(error, Unreachable) for error in failed.values()):
                _keep(path, found)
            return found


def _decode_all(root: Path, files: list[File], channels: int) -> dict[str, Undecodable]:
    def failure(file: File) -> Undecodable | None:
        try:
            decode_file(root / file.name, channels)
        except Undecodable as error:
            return error
        return None

    found = {}
    with progress("folder: decoding every file once", total=len(files)) as advance:
        for begin in range(0, len(files), _GROUP):
            group = files[begin : begin + _GROUP]
            for file, error in zip(group, each(failure, group), strict=True):
                if error is not None:
                    found[file.name] = error
            advance(len(group))
    return found


def _kept(path: Path) -> dict[str, str] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or cut short: made again


def _keep(path: Path, found: dict[str, str]) -> None:
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump(found, file)
    os.replace(fresh, path)
