"""What the loader and the run directory see of a set of images."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data.corpus import Memory
from attnjax.data.images.config import ImageConfig
from attnjax.data.images.damage import Damage
from attnjax.data.images.geometry import fit

MOST_KEPT = 1 << 28  # bytes of resized images that are kept in memory

# What becomes of one stored image: (its place in the request, uint8 [h, w, Ch]) ->
# uint8 [H, W, Ch].
Finish = Callable[[int, np.ndarray], np.ndarray]


class Reader(Protocol):
    """Random access to the stored images of one split.

    Attributes:
        is_stored: all images are in memory, so what is made of them may be kept.
        size: "28x28" or another text for people.
        damage: counts what cannot be decoded; None where everything can.
    """

    is_stored: bool
    size: str
    damage: Damage | None

    def read(
        self, indices: np.ndarray, finish: Finish
    ) -> tuple[list[np.ndarray | None], np.ndarray]:
        """What `finish` makes of the images, and their labels.

        Args:
            indices: [n] int64, any of them, in any order.
            finish: applied to each image, perhaps in threads.

        Returns: n uint8 arrays [H, W, Ch], None where an image cannot be decoded,
            and [n] int32 labels.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A `Reader` of images that are in memory.

    Attributes:
        images: N uint8 arrays [h, w, Ch]; one array [N, h, w, Ch] will do.
        labels: [N] int32.
        size: for people.
    """

    images: Any = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    size: str = ""
    is_stored: bool = dataclasses.field(default=True, init=False)
    damage: None = dataclasses.field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices, finish):
        """See `Reader.read`; every image can be decoded."""
        made = [finish(k, self.images[index]) for k, index in enumerate(indices)]
        return made, self.labels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit:
    """One split's images and how they are brought to one shape.

    Attributes:
        reader: where the images are.
        num_images: N, None where there is no end of them.
        num_classes: labels are in [0, num_classes).
        config: the source's options: size, channels, normalisation.
        name: "train" or "eval", for messages.
    """

    reader: Reader = dataclasses.field(repr=False)
    num_images: int | None
    num_classes: int
    config: ImageConfig = dataclasses.field(repr=False)
    name: str = "train"
    _memory: Memory = dataclasses.field(
        default_factory=lambda: Memory(), repr=False, init=False
    )

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, kept for the few keys asked for last. It must be pure."""
        return self._memory.get(key, make)

    def read(
        self, indices: np.ndarray, finish: Finish | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images of one shape.

        Args:
            indices: [n], which.
            finish: makes uint8 [H, W, Ch] of a stored image; None for the square in
                its middle, resized, as evaluation sees it.

        Returns: images uint8 [n, H, W, Ch] (black where one cannot be decoded),
            labels int32 [n], and [n] bool: whether it could be decoded.
        Raises:
            UserError: a label outside [0, num_classes).
        """
        if finish is None and self._is_kept:
            images, labels, readable = self.remember("all", self._all)
            return images[indices], labels[indices], readable[indices]
        return self._read(indices, finish or self._fit)

    @property
    def _is_kept(self) -> bool:
        """Whether all images, resized, are kept once they are made."""
        pixels = self.config.image_size**2 * self.config.channels
        return self.reader.is_stored and self.num_images * pixels <= MOST_KEPT

    def _all(self):
        return self._read(np.arange(self.num_images), self._fit)

    def _fit(self, place: int, image: np.ndarray) -> np.ndarray:
        return fit(image, self.config.image_size, self.config.eval_crop)

    def _read(self, indices, finish):
        side, channels = self.config.image_size, self.config.channels
        made, labels = self.reader.read(indices, finish)
        readable = np.array([image is not None for image in made], bool)
        images = np.zeros((len(made), side, side, channels), np.uint8)
        for place in np.flatnonzero(readable):
            images[place] = made[place]
        return images, self.checked(labels), readable

    def checked(self, labels: np.ndarray) -> np.ndarray:
        """The labels; raise where one is no class."""
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise UserError(
                "data: labels must be in [0, number of classes); got label="
                f"{int(outside[0])} in the {self.name} split of {self.config.name}, "
                f"{self.num_classes} classes. Use a split whose labels are known."
            )
        return labels

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, H, W, Ch] of pixels in [0, 1]: less the mean, over the std."""
        mean = np.asarray(self.config.mean, np.float32)
        done = images - mean
        done /= np.asarray(self.config.std, np.float32)
        return done


@dataclasses.dataclass(frozen=True, eq=False)
class ImageCorpus:
    """A set of images.

    Attributes:
        train: the split to train on.
        eval: the held-out split.
        class_names: one a class, in the order of the labels.
        fingerprint: hex digest of what is stored; equal exactly when training sees
            the same images, on any machine. What a config does to them is not in it.
        provenance: JSON-able facts for the manifest: source, versions, counts.
    """

    train: ImageSplit
    eval: ImageSplit
    class_names: tuple[str, ...]
    fingerprint: str
    provenance: dict[str, Any]

    @property
    def image_size(self) -> int:
        """H = W."""
        return self.train.config.image_size

    @property
    def channels(self) -> int:
        """Ch."""
        return self.train.config.channels

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def unreadable(self) -> dict[str, str]:
        """Name -> why of the images that batches so far held with weight 0."""
        counts = (split.reader.damage for split in (self.train, self.eval))
        return {n: why for d in counts if d for n, why in d.unreadable.items()}

    def describe(self) -> str:
        """One line for the log."""
        config, split = self.train.config, self.train
        count = "endless" if split.num_images is None else split.num_images
        side = f"{self.image_size}x{self.image_size}"
        stored = split.reader.size
        origin = f" (from {stored})" if stored not in ("", side) else ""
        return (
            f"{config.name}: {count} images to train on, {self.eval.num_images} held "
            f"out, {side}x{self.channels}{origin}, {self.num_classes} classes"
        )


def make_corpus(
    config: ImageConfig,
    readers: tuple[Reader, Reader],
    counts: tuple[int | None, int],
    class_names: tuple[str, ...],
    *,
    fingerprint: str,
    provenance: dict[str, Any],
) -> ImageCorpus:
    """An `ImageCorpus` of the readers of its two splits.

    Raises:
        UserError: a split without images.
    """
    for name, count in zip(("train", "eval"), counts, strict=True):
        if count == 0:
            raise UserError(
                f"data: every split must have an image; got none in the {name} split "
                f"of {config.name}. Hold out another share, or name other splits."
            )
    train, held_out = (
        ImageSplit(reader, count, len(class_names), config, name)
        for reader, count, name in zip(readers, counts, ("train", "eval"), strict=True)
    )
    facts = {
        "source": config.name,
        **provenance,
        "num_classes": len(class_names),
        "splits": {
            "train": {"num_images": counts[0]},
            "eval": {"num_images": counts[1]},
        },
    }
    return ImageCorpus(train, held_out, tuple(class_names), fingerprint, facts)
