"""`tfds:NAME[/CONFIG][:VERSION]`: images of TensorFlow Datasets, without TensorFlow.

Reads data sets that are prepared in the array_record format, as `attnjax.data.tfds`
does for text. Small ones are decoded once and kept in memory; large ones are decoded
batch by batch.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.errors import UserError, unknown
from attnjax.data.images.config import ImageConfig
from attnjax.data.images.corpus import ImageCorpus, Stored, make_corpus
from attnjax.data.images.damage import Damage, say_left_out
from attnjax.data.images.decode import Undecodable, decode
from attnjax.data.images.threads import each
from attnjax.data.progress import progress
from attnjax.data.source import SourceSpec
from attnjax.data.tfds import (
    data_source,
    default_eval_split,
    described_builder,
    library,
    prepared_builder,
    refuse_overlap,
)

SOURCE = SourceSpec(summary="TensorFlow Datasets (array_record)", argument="NAME")

MOST_STORED = 1 << 28  # bytes of decoded images that are kept in memory
_GROUP = 256  # examples read at a time


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Options of `tfds:NAME`.

    Attributes:
        data_dir: TFDS's folder, or the folder of one prepared version; None for
            TFDS's own default ($TFDS_DATA_DIR or ~/tensorflow_datasets).
        train_split: TFDS split to train on, e.g. "train" or "train[:90%]".
        eval_split: TFDS split to hold out; None takes "validation", or "test" where
            there is none.
        image_field: which feature is the image; None takes the only image, or the
            one named "image".
        label_field: which feature is the class; None takes the only one, or the one
            named "label".
    """

    name: str = "tfds:mnist"
    image_size: int = 224
    channels: int = 3
    data_dir: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    image_field: str | None = None
    label_field: str | None = None


def num_classes(config: Config) -> int:
    """From the data set's description; no image is read, nor need one be there."""
    builder = described_builder(config.argument, config.data_dir)
    return builder.info.features[_fields(builder, config)[1]].num_classes


def open_source(config: Config) -> ImageCorpus:
    """The data set's images.

    Raises:
        UserError: missing packages, a data set that is unknown, not prepared or in
            another format, an unknown split or feature, no readable image.
    """
    builder = prepared_builder(config.argument, config.data_dir)
    fields = _fields(builder, config)
    eval_split = config.eval_split or default_eval_split(builder, config.train_split)
    refuse_overlap(builder, config.train_split, eval_split)
    tfds = library()
    raw = {fields[0]: tfds.decode.SkipDecoding()}
    splits = [
        Examples(
            data_source(builder, split, raw),
            *fields,
            split,
            config.channels,
            Damage(config.name),
        )
        for split in (config.train_split, eval_split)
    ]
    feature = builder.info.features[fields[1]]
    facts = {
        "dataset": builder.info.full_name,
        "train_split": config.train_split,
        "eval_split": eval_split,
        "image_field": fields[0],
        "label_field": fields[1],
    }
    names = tuple(str(name) for name in feature.names or range(feature.num_classes))
    shape = builder.info.features[fields[0]].shape
    total = sum(len(split) for split in splits)
    too_large = None in shape or (
        total * shape[0] * shape[1] * config.channels > MOST_STORED
    )
    if too_large:
        readers, fingerprint = splits, _digest_of_files(builder, facts)
    else:
        readers, fingerprint = _store(config.name, splits)
    return make_corpus(
        config,
        tuple(readers),
        tuple(len(reader) for reader in readers),
        names,
        fingerprint=fingerprint,
        provenance=facts,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A reader (see `corpus.Reader`) that decodes what it is asked for.

    Attributes:
        source: TFDS's random access; images are left as bytes.
        image_field: the image's feature.
        label_field: the class's feature.
        split: for messages.
        channels: 1 or 3.
        damage: counts what cannot be decoded.
    """

    source: Any
    image_field: str
    label_field: str
    split: str
    channels: int
    damage: Damage
    is_stored: bool = dataclasses.field(default=False, init=False)
    size: str = dataclasses.field(default="", init=False)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices, finish):
        """See `corpus.Reader.read`."""
        examples = self.source.__getitems__([int(index) for index in indices])

        def one(place: int) -> np.ndarray | None:
            try:
                data = examples[place][self.image_field]
                return finish(place, decode(bytes(data), self.channels))
            except Undecodable as error:
                self.damage.note(self.called(indices[place]), str(error))
                return None

        made = each(one, range(len(indices)))
        labels = [example[self.label_field] for example in examples]
        return made, np.array(labels, np.int32)

    def called(self, index: int) -> str:
        """What an example is called in messages."""
        return f"example {int(index)} of {self.split}"


def _store(name: str, splits: list[Examples]) -> tuple[list[Stored], str]:
    """All images in memory, without those that cannot be decoded, and a digest.

    The digest is of the bytes as they are stored, whatever a config makes of them.
    """
    readers, unreadable = [], {}
    total = sum(len(split) for split in splits)
    digest = hashlib.sha256(b"images")
    with progress(f"decoding {name}", total=total) as advance:
        for split in splits:
            digest.update(len(split).to_bytes(8, "little"))
            images, labels = [], []
            for begin in range(0, len(split), _GROUP):
                indices = range(begin, min(begin + _GROUP, len(split)))
                done = _decode_group(split, indices, digest, unreadable)
                images += [image for image, _ in done]
                labels += [label for _, label in done]
                advance(len(indices))
            readers.append(Stored(images, np.array(labels, np.int32), _size(images)))
    say_left_out(name, unreadable, total)
    return readers, digest.hexdigest()


def _decode_group(split: Examples, indices: range, digest: Any, unreadable: dict):
    """(image, label) of the examples that can be decoded; the others are noted."""
    examples = split.source.__getitems__(list(indices))

    def one(example: dict) -> np.ndarray | Undecodable:
        try:
            return decode(bytes(example[split.image_field]), split.channels)
        except Undecodable as error:
            return error

    done = []
    for index, example, image in zip(
        indices, examples, each(one, examples), strict=True
    ):
        label = int(example[split.label_field])
        data = bytes(example[split.image_field])
        digest.update(f"{label} {len(data)} ".encode() + data)
        if isinstance(image, Undecodable):
            unreadable[split.called(index)] = str(image)
        else:
            done.append((image, label))
    return done


def _size(images: list[np.ndarray]) -> str:
    """ "28x28" where all images have one size, else ""."""
    shapes = {image.shape[:2] for image in images}
    return "x".join(map(str, shapes.pop())) if len(shapes) == 1 else ""


def _digest_of_files(builder: Any, facts: dict[str, str]) -> str:
    """Of the data set's name, splits, and the names and sizes of its files."""
    folder = Path(builder.data_dir)
    files = sorted((p.name, p.stat().st_size) for p in folder.iterdir() if p.is_file())
    return hashlib.sha256(json.dumps([facts, files]).encode()).hexdigest()


def _fields(builder: Any, config: Config) -> tuple[str, str]:
    """The names of the image's and the label's features."""
    tfds, features = library(), builder.info.features
    chosen = []
    for option, kind, usual, what in (
        ("image_field", tfds.features.Image, "image", "an image"),
        ("label_field", tfds.features.ClassLabel, "label", "a class"),
    ):
        names = [n for n, feature in features.items() if isinstance(feature, kind)]
        wanted = getattr(config, option)
        if wanted is not None and wanted not in names:
            raise unknown("tfds", option, wanted, names)
        if not names:
            raise UserError(
                f"tfds: images to classify need {what} feature; got "
                f"{builder.info.name} with {', '.join(sorted(features))}. Use another "
                "data set."
            )
        if wanted is None and len(names) > 1 and usual not in names:
            raise UserError(
                f"tfds: one feature must be {what}; got {', '.join(sorted(names))} in "
                f"{builder.info.name}. Set data.{option} to one of them."
            )
        chosen.append(wanted or (usual if usual in names else names[0]))
    if features[chosen[0]].np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            "tfds: images must have 8 or 16 bits a channel; got "
            f"{np.dtype(features[chosen[0]].np_dtype).name} in {builder.info.name}. "
            "Use another data set."
        )
    return chosen[0], chosen[1]
