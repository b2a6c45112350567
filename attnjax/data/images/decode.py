"""From the bytes of a file to pixels, whatever kind of image it is.

All kinds become 8 bits a channel, grey or red-green-blue:
- the EXIF orientation is applied, so that pictures stand upright;
- 16 bits a channel are scaled from [0, 65535];
- transparent pixels are laid over white, also in palettes and grey images;
- palettes, CMYK, YCbCr, Lab, HSV and bilevel images are converted;
- colours become grey by 0.299 R + 0.587 G + 0.114 B, grey becomes three equal channels;
- of animations and multi-page files the first picture is taken.
Pixels that are floats or 32-bit integers out of range have no fixed scale: such a file
counts as one that cannot be decoded.
"""

import contextlib
import functools
import io
import re
import warnings
from typing import Any

import numpy as np

SIXTEEN_BITS = 65535


class Undecodable(Exception):
    """The bytes are no image that can be used; the text says why."""


def decode(data: bytes, channels: int) -> np.ndarray:
    """uint8 [h, w, channels] of the bytes of an image file.

    Args:
        data: a file of a kind that Pillow reads: PNG, JPEG, WebP, GIF, BMP, TIFF, ...
        channels: 1 or 3.

    Raises:
        Undecodable: truncated, damaged, empty, too large to be safe, or no image.
    """
    pillow = _pillow()
    try:
        with pillow.Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_array(image, channels)
    except Undecodable:
        raise
    # Decoders of damaged bytes fail in every way there is.
    except Exception as error:
        if isinstance(error, pillow.UnidentifiedImageError):
            raise Undecodable("no image format that is known") from error
        text = " ".join(re.sub(r"<_io\.BytesIO[^>]*>", "the file", str(error)).split())
        raise Undecodable(f"{type(error).__name__}: {text}"[:120]) from error


@functools.cache
def _pillow() -> Any:
    """Pillow's module, told not to warn of images that it decodes all the same.

    Once, and not around every call: filters of warnings are shared by all threads.
    """
    import PIL
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
    return PIL


def to_array(image: Any, channels: int) -> np.ndarray:
    """uint8 [h, w, channels] of a Pillow image of any mode.

    Raises:
        Undecodable: pixels without a fixed scale.
    """
    from PIL import ImageOps

    # A damaged orientation tag does not make the pixels worse.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    image = _opaque(_eight_bits(image)).convert("L" if channels == 1 else "RGB")
    return np.array(image).reshape(image.height, image.width, channels)


def _eight_bits(image: Any) -> Any:
    """The image with 8 bits a channel."""
    from PIL import Image

    if image.mode == "F":
        raise Undecodable("pixels are floats, which have no fixed range")
    if image.mode != "I" and not image.mode.startswith("I;"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > SIXTEEN_BITS:
        raise Undecodable("pixels are integers outside [0, 65535]")
    return Image.fromarray(np.rint(pixels / (SIXTEEN_BITS / 255)).astype(np.uint8))


def _opaque(image: Any) -> Any:
    """The image over white, where it has any transparency."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    front = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", front.size, "white"), front)
