"""`latents:DIR`: images that an autoencoder has encoded, drawn anew every epoch.

DIR is made by `python -m attnjax.data.extract_latents`, or from arrays by
`latent_files.new_latents`. It holds the mean and the variance of the autoencoder's
posterior. A latent is a sample of it, less a shift and times a scale: in training a
pure function of (seed, row of the endless sequence of epochs), in an evaluation of the
image's place in its split.
Source: Rombach et al., arXiv 2112.10752, section 3.1 and appendix G; Peebles and Xie,
arXiv 2212.09748, section 3.2.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from attnjax.data import keyed
from attnjax.data.config import require
from attnjax.data.corpus import Memory
from attnjax.data.images.config import Augment
from attnjax.data.images.latent_files import (
    LatentFacts,
    Latents,
    open_latents,
    read_facts,
)
from attnjax.data.source import SourceSpec

SOURCE = SourceSpec(summary="latents of an autoencoder", argument="DIR")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `latents:DIR`; sizes and classes are those of the folder.

    Attributes:
        name: "latents:DIR".
        data_dir: what a relative DIR starts from; None for the current folder.
        sample: draw from the posterior; False takes its mean.
        augment: what training does: flip, of folders that hold mirrored images too,
            and mixup; the rest is done to pixels.
    """

    is_latent: ClassVar[bool] = True

    name: str = "latents:."
    data_dir: str | None = None
    sample: bool = True
    augment: Augment = dataclasses.field(default_factory=Augment)

    def __post_init__(self):
        for name, off in (("crop", "none"), ("randaugment_layers", 0)):
            value = getattr(self.augment, name)
            require(
                value == off,
                f"data.augment: {name} is done to pixels, and latents have none; got "
                f"{name}={value}, name={self.name}. Set it to {off}.",
            )

    @property
    def argument(self) -> str:
        """DIR."""
        return self.name.partition(":")[2]

    @property
    def path(self) -> Path:
        """Where DIR is."""
        inside = os.path.join(self.data_dir or "", os.path.expanduser(self.argument))
        return Path(os.path.expanduser(inside))


def num_classes(config: Config) -> int:
    """From the folder's index."""
    return len(read_facts(config.path).class_names)


def image_shape(config: Config) -> tuple[int, int]:
    """H = W and C, from the folder's index."""
    side, _, channels = read_facts(config.path).shape
    return side, channels


def open_source(config: Config) -> "LatentCorpus":
    """The folder's latents.

    Raises:
        UserError: it is not there, not finished or damaged; a flip of images whose
            mirrored latents are not in it.
    """
    opened = open_latents(config.path)
    require(
        opened.facts.has_flips or not config.augment.flip,
        "data.augment: flip needs the latents of mirrored images; got flip=true, and "
        f"{str(config.path)!r} has none. Encode them with --flips, or set flip=false.",
    )
    return LatentCorpus(config, opened)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSplit:
    """The latents of one split.

    Attributes:
        config: the source's options.
        facts: of the folder.
        rows: [N, views, H, W, parts C].
        labels: [N] int32.
        name: "train" or "eval".
    """

    config: Config = dataclasses.field(repr=False)
    facts: LatentFacts = dataclasses.field(repr=False)
    rows: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    name: str
    _memory: Memory = dataclasses.field(
        default_factory=lambda: Memory(), repr=False, init=False
    )

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Labels are in [0, num_classes)."""
        return len(self.facts.class_names)

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, kept for the few keys asked for last. It must be pure."""
        return self._memory.get(key, make)

    def drawn(
        self,
        indices: np.ndarray,
        *,
        seed: int,
        ordinals: np.ndarray,
        mirrored: np.ndarray | None = None,
        purpose: int = keyed.LATENTS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents as a model learns them.

        Args:
            indices: [n], which images.
            seed, ordinals: of the draws; [n], one for each.
            mirrored: [n] bool, which of them as in a mirror; None for none.
            purpose: what the draws are for, of `keyed`.

        Returns: float32 [n, H, W, C], and int32 [n] labels.
        """
        views = (
            np.zeros(len(indices), int) if mirrored is None else mirrored.astype(int)
        )
        rows = np.asarray(self.rows[indices, views], np.float32)
        if self.facts.has_variance:
            mean, log_variance = np.split(rows, 2, axis=-1)
            rows = mean
            if self.config.sample:
                noise = normal(seed, purpose, ordinals, mean.shape[1:])
                rows = mean + np.exp(0.5 * log_variance) * noise
        return self.facts.scaled(rows), self.labels[indices]

    def held(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`drawn` for an evaluation: of image i always the same."""
        purpose = keyed.HELD_OUT_LATENTS
        return self.drawn(indices, seed=0, ordinals=indices, purpose=purpose)


def normal(
    seed: int, purpose: int, ordinals: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """float32 [n, *shape] of unit normal numbers; row i is that of ordinals[i].

    Uniform numbers through the inverse of the distribution function.
    """
    from scipy.special import ndtri

    words = keyed.rows(seed, purpose, ordinals, int(np.prod(shape)))
    # The middle of one of 2^52 equal shares: neither 0 nor 1.
    uniform = ((words >> np.uint64(12)) + 0.5) * 2.0**-52
    return ndtri(uniform).astype(np.float32).reshape(len(words), *shape)


class LatentCorpus:
    """A folder of latents, as `ImageCorpus` is of images.

    Attributes:
        train, eval: the splits.
        facts: of the folder.
        class_names: one a class, in the order of the labels.
        fingerprint: hex digest of what is stored.
        provenance: JSON-able facts for the manifest.
        unreadable: nothing: what cannot be decoded was left out when it was encoded.
    """

    def __init__(self, config: Config, opened: Latents):
        self.facts = facts = opened.facts
        self.config = config
        self.class_names = facts.class_names
        self.fingerprint = opened.fingerprint
        self.unreadable: dict[str, str] = {}
        self.train, self.eval = (
            LatentSplit(config, facts, opened.rows[name], opened.labels[name], name)
            for name in ("train", "eval")
        )
        self.provenance = {
            "source": config.name,
            "encoder": facts.encoder,
            "images": facts.source,
            "num_classes": self.num_classes,
            "splits": {
                split.name: {"num_images": split.num_images}
                for split in (self.train, self.eval)
            },
        }

    @property
    def image_size(self) -> int:
        """H = W."""
        return self.facts.shape[0]

    @property
    def channels(self) -> int:
        """C."""
        return self.facts.shape[2]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def describe(self) -> str:
        """One line for the log."""
        side, channels = self.image_size, self.channels
        kept = 3 if channels >= 3 else 1
        return (
            f"{self.config.name}: {self.train.num_images} latents to train on, "
            f"{self.eval.num_images} held out, {side}x{side}x{channels}, "
            f"{self.num_classes} classes; pictures show channels 1 to {kept} from -3 "
            "(black) to 3 (white)"
        )
