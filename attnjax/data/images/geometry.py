"""Crops, mirrors and resizing. Images are uint8 [h, w, Ch], one or a batch of them."""

import math

import numpy as np

# Numbers in [0, 1) that `inception_box` takes: (area, ratio, y, x) for every attempt.
ATTEMPTS = 10
INCEPTION_DRAWS = 4 * ATTEMPTS
RATIO = 4 / 3  # boxes are at most this much wider than high, or the reverse

Box = tuple[float, float, float, float]


def resize(image: np.ndarray, size: int, box: Box) -> np.ndarray:
    """A box of an image, resized bilinearly; a smaller result is averaged, not sampled.

    Args:
        image: uint8 [h, w, Ch].
        size: side of the result.
        box: (left, top, right, bottom) in pixels, fractions allowed.

    Returns: uint8 [size, size, Ch].
    """
    left, top, right, bottom = box
    if (right - left, bottom - top) == (size, size) and left % 1 == top % 1 == 0:
        top, left = int(top), int(left)
        return image[top : top + size, left : left + size]
    from PIL import Image

    flat = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    done = np.asarray(flat.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return done.reshape(size, size, image.shape[-1])


def fit(image: np.ndarray, size: int, share: float = 1.0) -> np.ndarray:
    """The square in the middle of an image, resized.

    Args:
        image: uint8 [h, w, Ch].
        size: side of the result.
        share: side of the square as a share of the image's shorter side.
    """
    height, width = image.shape[:2]
    side = min(height, width) * share
    left, top = (width - side) / 2, (height - side) / 2
    if side == size:  # whole pixels, not resized
        left, top = int(left), int(top)
    return resize(image, size, (left, top, left + side, top + side))


def inception_box(
    height: int, width: int, draws: np.ndarray, *, min_area: float
) -> Box:
    """A box of random area and aspect ratio inside an image.

    The area is uniform in [min_area, 1] of the image's, the logarithm of the aspect
    ratio uniform between 3/4 and 4/3, the place uniform. A box that does not fit is
    drawn again, ten times in all; then it is the largest square in the middle.
    Source: Szegedy et al., "Going deeper with convolutions" (arXiv:1409.4842),
    section 6, with the numbers in general use.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        draws: [INCEPTION_DRAWS] in [0, 1).
        min_area: smallest share of the area.

    Returns: (left, top, right, bottom), whole pixels.
    """
    for area, ratio, down, right in draws.reshape(ATTEMPTS, 4):
        pixels = height * width * (min_area + (1.0 - min_area) * area)
        aspect = math.exp((2.0 * ratio - 1.0) * math.log(RATIO))
        w = round(math.sqrt(pixels * aspect))
        h = round(math.sqrt(pixels / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            left = int(right * (width - w + 1))
            top = int(down * (height - h + 1))
            return left, top, left + w, top + h
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def pad_and_crop(images: np.ndarray, draws: np.ndarray, *, pad: int) -> np.ndarray:
    """Images moved by up to `pad` pixels each way; black comes in at the sides.

    Source: He et al., "Deep residual learning" (arXiv:1512.03385), section 4.2.

    Args:
        images: uint8 [n, H, W, Ch].
        draws: [n, 2] in [0, 1): down, right.
        pad: pixels of black on each side.
    """
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = (draws * (2 * pad + 1)).astype(np.int64)
    down = offsets[:, 0, None, None] + np.arange(height)[:, None]
    right = offsets[:, 1, None, None] + np.arange(width)
    return padded[np.arange(n)[:, None, None], down, right]


def flip(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Images mirrored left and right where draws [n], in [0, 1), are below 1/2."""
    mirrored = (draws < 0.5)[:, None, None, None]
    return np.where(mirrored, images[:, :, ::-1], images)
