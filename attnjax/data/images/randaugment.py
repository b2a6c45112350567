"""RandAugment: a few random operations, all of one strength.

Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a
reduced search space" (arXiv:1909.13719), section 3 and its table of 14 operations.
Differs: the effect of every operation grows with the magnitude (in the authors' code
posterize and solarize grow weaker), shifts are a share of the image's side, and what
a rotation, shear or shift uncovers is black.

An operation takes a Pillow image of mode L or RGB, a strength in [0, 1] and a sign,
and returns an image of the same mode and size. At strength 0 all but autocontrast and
equalize, which have no strength, leave the image as it is.
"""

from typing import Any

import numpy as np

from attnjax.data.images.threads import each

DRAWS = 2  # numbers in [0, 1) that one operation takes: which one, and its sign

MAX_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_SHIFT = 0.45  # share of the side; 150 of 331 pixels in AutoAugment
MAX_BITS = 4  # posterize keeps 8 bits less these
MAX_FACTOR = 0.9  # enhancements blend by 1 - 0.9 to 1 + 0.9
_THREADED = 64 * 64  # images of fewer pixels are done sooner than handed to a thread


def apply(
    images: np.ndarray, draws: np.ndarray, *, layers: int, magnitude: float
) -> np.ndarray:
    """Every image after `layers` operations of its own.

    Args:
        images: uint8 [n, H, W, Ch].
        draws: [n, >= layers DRAWS] in [0, 1).
        layers: how many.
        magnitude: in [0, 10].
    """

    def one(place: int) -> np.ndarray:
        return augment(images[place], draws[place], layers, magnitude / 10.0)

    places = range(len(images))
    work = each if images[0:1].size >= _THREADED else map
    return np.stack(list(work(one, places))) if len(images) else images


def augment(
    image: np.ndarray, draws: np.ndarray, layers: int, strength: float
) -> np.ndarray:
    """One image uint8 [H, W, Ch] after `layers` operations."""
    from PIL import Image

    done = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    for which, sign in draws[: layers * DRAWS].reshape(layers, DRAWS):
        name = NAMES[int(which * len(NAMES))]
        done = OPERATIONS[name](done, strength, 1 if sign < 0.5 else -1)
    return np.asarray(done).reshape(image.shape)


def _identity(image: Any, strength: float, sign: int) -> Any:
    return image


def _autocontrast(image: Any, strength: float, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: Any, strength: float, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _posterize(image: Any, strength: float, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(MAX_BITS * strength))


def _solarize(image: Any, strength: float, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.solarize(image, threshold=256 - round(256 * strength))


def _rotate(image: Any, strength: float, sign: int) -> Any:
    from PIL import Image

    degrees = sign * MAX_DEGREES * strength
    return image.rotate(degrees, Image.Resampling.BILINEAR)


def _shear_x(image: Any, strength: float, sign: int) -> Any:
    slope = sign * MAX_SHEAR * strength
    return _affine(image, (1, slope, -slope * image.height / 2, 0, 1, 0))


def _shear_y(image: Any, strength: float, sign: int) -> Any:
    slope = sign * MAX_SHEAR * strength
    return _affine(image, (1, 0, 0, slope, 1, -slope * image.width / 2))


def _translate_x(image: Any, strength: float, sign: int) -> Any:
    shift = sign * round(MAX_SHIFT * strength * image.width)
    return _affine(image, (1, 0, shift, 0, 1, 0))


def _translate_y(image: Any, strength: float, sign: int) -> Any:
    shift = sign * round(MAX_SHIFT * strength * image.height)
    return _affine(image, (1, 0, 0, 0, 1, shift))


def _affine(image: Any, matrix: tuple[float, ...]) -> Any:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    from PIL import Image

    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


def _enhancement(name: str):
    def enhance(image: Any, strength: float, sign: int) -> Any:
        from PIL import ImageEnhance

        factor = 1.0 + sign * MAX_FACTOR * strength
        return getattr(ImageEnhance, name)(image).enhance(factor)

    return enhance


OPERATIONS = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": _solarize,
    "color": _enhancement("Color"),
    "posterize": _posterize,
    "contrast": _enhancement("Contrast"),
    "brightness": _enhancement("Brightness"),
    "sharpness": _enhancement("Sharpness"),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
NAMES = tuple(OPERATIONS)
