"""Images with labels, or latents of them: sources, batches, augmentation, corruptions.
One file a source.

Imported lazily where they are needed: Pillow, scikit-learn (`digits`), Matplotlib's
fonts (`glyphs`), TensorFlow Datasets (`tfds`).
"""

from typing import Any

from attnjax.data import source
from attnjax.data.images.batches import (
    batch,
    check_corruption,
    eval_batches,
    num_eval_batches,
    steps_per_epoch,
)
from attnjax.data.images.config import Augment, ImageConfig
from attnjax.data.images.corpus import ImageCorpus, ImageSplit
from attnjax.data.images.corruptions import CORRUPTIONS
from attnjax.data.images.latent_files import LatentFacts, facts_of

__all__ = [
    "CORRUPTIONS",
    "Augment",
    "ImageConfig",
    "ImageCorpus",
    "ImageSplit",
    "LatentFacts",
    "batch",
    "check_corruption",
    "config_class",
    "eval_batches",
    "facts_of",
    "image_shape",
    "known_sources",
    "num_classes",
    "num_eval_batches",
    "open_corpus",
    "steps_per_epoch",
]


def known_sources() -> dict[str, source.SourceSpec]:
    """Every source of images by prefix."""
    return source.known_sources(source.IMAGES)


def config_class(name: str) -> type:
    """The frozen dataclass of a source's options ("PREFIX" or "PREFIX:ARGUMENT").

    Raises:
        UserError: unknown source, or an argument missing or superfluous.
    """
    return source.source_module(name, source.IMAGES).Config


def open_corpus(config: Any) -> ImageCorpus:
    """The images that a source's config names.

    Raises:
        UserError: missing, unreadable or empty data, or labels that are no classes.
    """
    return source.source_module(config.name, source.IMAGES).open_source(config)


def image_shape(config: Any) -> tuple[int, int]:
    """H = W and the channels of a source's images; no image is read."""
    module = source.source_module(config.name, source.IMAGES)
    known = getattr(module, "image_shape", None)
    return known(config) if known else (config.image_size, config.channels)


def num_classes(config: Any) -> int:
    """How many classes a source's config names; the data is opened only if needed."""
    module = source.source_module(config.name, source.IMAGES)
    known = getattr(module, "num_classes", None)
    return known(config) if known else open_corpus(config).num_classes
