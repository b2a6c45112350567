"""`digits`: scikit-learn's 1797 handwritten digits, 8x8 grey, in memory.

The same fifth of every class is held out on every machine, by a fixed permutation
and not by the order of the images, which goes writer by writer.
Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI
repository, 1998 (its test part).
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data import keyed
from attnjax.data.config import check_fraction
from attnjax.data.images import captions
from attnjax.data.images.config import ImageConfig
from attnjax.data.images.corpus import ImageCorpus, Stored, make_corpus
from attnjax.data.source import SourceSpec

SOURCE = SourceSpec(summary="scikit-learn's handwritten digits, 8x8")
CLASSES = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Options of `digits`.

    Attributes:
        eval_fraction: share of every class that is held out.
    """

    eval_fraction: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_fraction(self.eval_fraction)


def num_classes(config: Config) -> int:
    """Known without the data."""
    return len(CLASSES)


caption = captions.character


def open_source(config: Config) -> ImageCorpus:
    """The digits.

    Raises:
        UserError: scikit-learn is missing.
    """
    sklearn, datasets = _library()
    found = datasets.load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    labels = found.target.astype(np.int32)
    held_out = held_out_indices(labels, config.eval_fraction)
    train = np.setdiff1d(np.arange(len(labels)), held_out)
    digest, readers = hashlib.sha256(b"digits"), []
    for chosen in (train, held_out):
        digest.update(len(chosen).to_bytes(8, "little"))
        digest.update(pixels[chosen].tobytes() + labels[chosen].astype("<i4").tobytes())
        images = np.repeat(pixels[chosen][..., None], config.channels, axis=-1)
        readers.append(Stored(images, labels[chosen], "8x8"))
    return make_corpus(
        config,
        tuple(readers),
        (len(train), len(held_out)),
        CLASSES,
        fingerprint=digest.hexdigest(),
        provenance={"scikit_learn_version": sklearn.__version__},
    )


def held_out_indices(labels: np.ndarray, eval_fraction: float) -> np.ndarray:
    """The same share of every class, at least one image and not all, sorted.

    Args:
        labels: [N] int32.
        eval_fraction: in (0, 1).
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = keyed.permutation(0, keyed.HELD_OUT, int(label), len(members))
        count = round(eval_fraction * len(members))
        chosen.append(members[order[: min(max(count, 1), len(members) - 1)]])
    return np.sort(np.concatenate(chosen))


def _library() -> tuple[Any, Any]:
    try:
        import sklearn
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            f"digits: reading needs the package scikit-learn; got {error}. "
            "Run: pip install scikit-learn"
        ) from error
    return sklearn, datasets
