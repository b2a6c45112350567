"""Folders of images that were encoded once, and how they are made.

DIR/index.json          facts, and checksums of the other files; written last
DIR/SPLIT.latents.bin   [N, views, H, W, parts C], float32 or float16
DIR/SPLIT.labels.bin    [N] int32
for the splits train and eval; little-endian. Parts are the mean of an encoder's normal
distribution and the logarithm of its variance, or the values alone. The second view,
where there is one, is that of the mirrored image.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data.config import require
from attnjax.data.folders import new_folder, one_builder
from attnjax.data.store import INDEX, Damaged, map_file, open_store, write_index

KIND, VERSION = "attnjax latents", 1
SPLITS = ("train", "eval")
DTYPES = {"float32": "<f4", "float16": "<f2"}


@dataclasses.dataclass(frozen=True)
class LatentFacts:
    """What a folder of latents says of itself.

    Attributes:
        shape: H, W and C of a latent; H = W.
        class_names: one a class, in the order of the labels.
        scale, shift: one number, or one a channel: a model learns (z - shift) scale.
        has_variance: an encoder's mean and log-variance are stored, not values.
        has_flips: so are those of the mirrored images.
        dtype: "float32" or "float16".
        encoder: JSON-able facts: the name and the fingerprint of what encoded.
        source: the same of the images.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    has_variance: bool = True
    has_flips: bool = False
    dtype: str = "float32"
    encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        shape = tuple(self.shape)
        require(
            len(shape) == 3 and min(shape) >= 1 and shape[0] == shape[1],
            f"latents: shape must be (H, W, C) with H = W; got shape={shape}.",
        )
        for name in ("scale", "shift"):
            values = getattr(self, name)
            require(
                len(values) in (1, shape[2]) and all(map(math.isfinite, values)),
                f"latents: {name} must be one finite number, or one for each of "
                f"{shape[2]} channels; got {name}={tuple(values)}.",
            )
        require(
            all(self.scale),
            f"latents: scale must not be 0; got scale={tuple(self.scale)}.",
        )
        require(
            self.dtype in DTYPES,
            f"latents: dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.",
        )

    @property
    def views(self) -> int:
        """How many are stored of an image."""
        return 2 if self.has_flips else 1

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """[views, H, W, parts C] of an image."""
        side, width, channels = self.shape
        return self.views, side, width, channels * (2 if self.has_variance else 1)

    def scaled(self, latents: np.ndarray) -> np.ndarray:
        """(z - shift) scale: float32 [..., C] that a model learns."""
        shift, scale = (np.asarray(x, np.float32) for x in (self.shift, self.scale))
        return (np.asarray(latents, np.float32) - shift) * scale

    def unscaled(self, latents: np.ndarray) -> np.ndarray:
        """What `scaled` took: float32 [..., C] for a decoder."""
        shift, scale = (np.asarray(x, np.float32) for x in (self.shift, self.scale))
        return np.asarray(latents, np.float32) / scale + shift


def facts_of(given: dict[str, Any]) -> LatentFacts:
    """The facts from JSON values; other keys are passed over."""
    fields = {field.name for field in dataclasses.fields(LatentFacts)}
    plain = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    return LatentFacts(**{n: v for n, v in plain.items() if n in fields})


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """An opened folder.

    Attributes:
        facts: what it says of itself.
        rows: split -> [N, views, H, W, parts C], mapped from disk.
        labels: split -> [N] int32.
        fingerprint: hex digest of all that is stored.
    """

    facts: LatentFacts
    rows: dict[str, np.ndarray] = dataclasses.field(repr=False)
    labels: dict[str, np.ndarray] = dataclasses.field(repr=False)
    fingerprint: str


class Writer:
    """Takes rows into the files of a folder; see `new_latents`.

    Attributes:
        facts: of the folder.
        counts: split -> images so far.
    """

    def __init__(self, folder: Path, facts: LatentFacts):
        self.facts = facts
        self._folder = folder
        self.counts = dict.fromkeys(SPLITS, 0)
        self._hashes = {name: hashlib.sha256() for name in SPLITS}
        for split in SPLITS:
            for name in _names(split):
                (folder / name).touch()

    def add(self, split: str, rows: np.ndarray, labels: np.ndarray) -> None:
        """Append images.

        Args:
            split: "train" or "eval".
            rows: [n, views, H, W, parts C]; mean before log-variance.
            labels: [n] classes.

        Raises:
            UserError: for another shape, a number that is not finite as it is stored,
                or a label that is no class.
        """
        facts, count = self.facts, self.counts[split]
        require(
            rows.shape == (len(labels), *facts.row_shape),
            "latents: rows must be [n, views, H, W, channels] with a label each; got "
            f"shape={rows.shape}, {len(labels)} labels, where {facts.row_shape} "
            "follow n.",
        )
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, DTYPES[facts.dtype])
        finite = np.isfinite(stored).all(axis=(1, 2, 3, 4))
        if not finite.all():
            bad = count + int(np.flatnonzero(~finite)[0])
            raise UserError(
                f"latents: every number must be finite in {facts.dtype}; got another "
                f"in image {bad} of {split}. Encode in float32 and store dtype=float32."
            )
        labels = np.ascontiguousarray(labels, "<i4")
        _check_labels(labels, split, facts, first=count)
        for name, array in zip(_names(split), (stored, labels), strict=True):
            data = array.tobytes()
            with open(self._folder / name, "ab") as file:
                file.write(data)
            self._hashes[split].update(data)
        self.counts[split] += len(labels)

    def finish(self) -> None:
        """Write what is known of the folder.

        Raises:
            UserError: for a split without images.
        """
        for split, count in self.counts.items():
            require(
                count > 0,
                "latents: every split must have an image; got none in "
                f"{split}. Give it some.",
            )
        facts = dataclasses.asdict(self.facts)
        # What a model sees; who encoded, and from where, is no part of it.
        seen = sorted(facts.keys() - {"encoder", "source"})
        digest = hashlib.sha256(repr([(name, facts[name]) for name in seen]).encode())
        for split in SPLITS:
            digest.update(self._hashes[split].digest())
        about = {"kind": KIND, "version": VERSION, **facts, "splits": self.counts}
        write_index(self._folder, about | {"fingerprint": digest.hexdigest()})


@contextlib.contextmanager
def new_latents(path: Path, facts: LatentFacts) -> Iterator[Writer]:
    """A `Writer` whose folder appears at `path` when the block succeeds.

    Until then it has another name beside it and no index: what a killed process
    leaves reads as nothing, and the next one that makes `path` removes it.

    Raises:
        UserError: for a `path` that is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_builder(path):
        require(
            not path.exists(),
            f"latents: a new folder must not be there yet; got {str(path)!r}. Name "
            "another, or move it away.",
        )
        with new_folder(path) as folder:
            writer = Writer(folder, facts)
            yield writer
            writer.finish()


def read_facts(path: Path) -> LatentFacts:
    """What a folder says of itself; its files are not looked at.

    Raises:
        UserError: as `open_latents`.
    """
    return _opened(path, lambda folder, facts: facts_of(facts), files=False)


def open_latents(path: Path) -> Latents:
    """Check and map a folder.

    Raises:
        UserError: it is not there, not finished, damaged, or of another kind; or a
            label is no class.
    """
    return _opened(path, _read)


def _opened(path: Path, read, *, files: bool = True):
    cure = "Check config.data.name and data_dir, or make it again (docs/dit.md)."

    def of_kind(folder: Path, facts: dict[str, Any]):
        if (facts.get("kind"), facts.get("version")) != (KIND, VERSION):
            raise Damaged(
                f"{INDEX} is of kind {facts.get('kind')!r}, version "
                f"{facts.get('version')!r}, not {KIND!r}, version {VERSION}"
            )
        return read(folder, facts)

    try:
        return open_store(path, of_kind, verify=files)
    except FileNotFoundError as error:
        raise UserError(
            f"latents: DIR must be a folder of latents; got {str(path)!r}, which is "
            f"not there. {cure}"
        ) from error
    except (Damaged, KeyError, TypeError, ValueError) as damage:
        raise UserError(
            f"latents: DIR must be a finished folder of latents; got {str(path)!r}, "
            f"which is not ({damage}). {cure}"
        ) from damage


def _read(folder: Path, given: dict[str, Any]) -> Latents:
    facts = facts_of(given)
    rows, labels = {}, {}
    for split in SPLITS:
        count = given["splits"][split]
        values, classes = (folder / name for name in _names(split))
        shape = (count, *facts.row_shape)
        rows[split] = map_file(values, DTYPES[facts.dtype]).reshape(shape)
        labels[split] = np.asarray(map_file(classes, "<i4"))
        if len(labels[split]) != count:
            raise Damaged(f"{classes.name} has {len(labels[split])} labels of {count}")
        _check_labels(labels[split], split, facts, first=0)
    return Latents(facts, rows, labels, given["fingerprint"])


def _names(split: str) -> tuple[str, str]:
    """The files of a split: its rows, and their labels."""
    return f"{split}.latents.bin", f"{split}.labels.bin"


def _check_labels(labels: np.ndarray, split: str, facts: LatentFacts, *, first: int):
    count = len(facts.class_names)
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        row = int(outside[0])
        raise UserError(
            "latents: labels must be in [0, number of classes); got "
            f"label={int(labels[row])} of image {first + row} of {split}, {count} "
            "classes. Name every class in class_names."
        )
