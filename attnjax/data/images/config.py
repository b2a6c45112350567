"""The options that every image source shares."""

import dataclasses
from typing import ClassVar, Literal

from attnjax.data.config import require

CROPS = ("none", "inception", "pad")


@dataclasses.dataclass(frozen=True)
class Augment:
    """`config.data.augment`: what training does to images; evaluation does not.

    In this order: crop, flip, RandAugment, normalisation, mixup.

    Attributes:
        crop: "inception" cuts a box of random area and aspect ratio out of the
            stored image and resizes it; "pad" surrounds the resized image with
            black and cuts its size out of that at a random place; "none".
        min_area: smallest share of the image that crop=inception keeps, in (0, 1].
        pad: pixels on each side with crop=pad.
        flip: mirror left and right with probability 1/2.
        randaugment_layers: operations of RandAugment, one after another (0: none).
        randaugment_magnitude: their strength, in [0, 10].
        mixup: alpha of the Beta distribution of mixup's weight (0: none).
    """

    crop: Literal["none", "inception", "pad"] = "none"
    min_area: float = 0.08
    pad: int = 4
    flip: bool = False
    randaugment_layers: int = 0
    randaugment_magnitude: float = 10.0
    mixup: float = 0.0

    def __post_init__(self):
        require(
            self.crop in CROPS,
            f"data.augment: crop must be one of {', '.join(CROPS)}; "
            f"got crop={self.crop!r}.",
        )
        require(
            0.0 < self.min_area <= 1.0,
            "data.augment: min_area must be in (0, 1]; got "
            f"min_area={self.min_area}. It is the smallest share kept, e.g. 0.08.",
        )
        require(
            self.pad >= 0,
            f"data.augment: pad must be at least 0; got pad={self.pad}. "
            "It is a number of pixels, e.g. 4.",
        )
        require(
            0 <= self.randaugment_layers <= 8,
            "data.augment: randaugment_layers must be in [0, 8]; got "
            f"randaugment_layers={self.randaugment_layers}. The papers use 2.",
        )
        require(
            0.0 <= self.randaugment_magnitude <= 10.0,
            "data.augment: randaugment_magnitude must be in [0, 10]; got "
            f"randaugment_magnitude={self.randaugment_magnitude}. Use e.g. 10.",
        )
        require(
            self.mixup >= 0.0,
            "data.augment: mixup must be at least 0; got "
            f"mixup={self.mixup}. It is the alpha of Beta(alpha, alpha), e.g. 0.2.",
        )


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Options of an image source; each source's `Config` adds its own.

    Attributes:
        name: the source, "PREFIX" or "PREFIX:ARGUMENT"; the prefix is the name of
            a file of `attnjax.data.images`.
        image_size: H = W of every image that leaves the loader, in pixels.
        channels: 1 (grey) or 3 (red, green, blue); images are converted.
        mean: subtracted from pixels in [0, 1]; one number for all channels, or one
            for each.
        std: what they are divided by then.
        eval_crop: images are resized from the square in their middle; this is its
            side as a share of their shorter side, in (0, 1]. ImageNet's usual
            "resize to 256, crop 224" is 0.875.
        augment: what training does to images.
    """

    # Whether the source holds latents of an autoencoder and no pixels.
    is_latent: ClassVar[bool] = False

    name: str = "digits"
    image_size: int = 8
    channels: int = 1
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    eval_crop: float = 1.0
    augment: Augment = Augment()

    def __post_init__(self):
        require(
            self.image_size >= 1,
            "data: image_size must be at least 1; got "
            f"image_size={self.image_size}. It is a number of pixels, e.g. 32.",
        )
        require(
            self.channels in (1, 3),
            f"data: channels must be 1 (grey) or 3 (colour); got "
            f"channels={self.channels}. Images are converted to what is asked for.",
        )
        for name, values in (("mean", self.mean), ("std", self.std)):
            require(
                len(values) in (1, self.channels),
                f"data: {name} must have 1 or channels={self.channels} entries; got "
                f"{name}={tuple(values)}. Give one number for all channels or one "
                "for each.",
            )
        require(
            all(value > 0 for value in self.std),
            f"data: std must be above 0; got std={tuple(self.std)}. Pixels are in "
            "[0, 1]; use e.g. 0.5, or 1 to leave their spread alone.",
        )
        require(
            0.0 < self.eval_crop <= 1.0,
            "data: eval_crop must be in (0, 1]; got "
            f"eval_crop={self.eval_crop}. Use 1 for the whole middle square.",
        )

    @property
    def argument(self) -> str:
        """What follows the first colon of `name`, "" if there is none."""
        return self.name.partition(":")[2]
