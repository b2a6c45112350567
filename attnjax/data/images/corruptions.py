"""What evaluation may do to images, at five severities.

Source: Hendrycks and Dietterich, "Benchmarking neural network robustness to common
corruptions and perturbations" (arXiv:1903.12261), with its numbers for ImageNet: the
noise, the contrast and, of its additional corruptions, the Gaussian blur. Its blur is
for 224 pixels a side; other sizes have one whose width goes with the root of the side,
which lies between the same pixels and the same share of the image.
"""

import math

import numpy as np

from attnjax.core.errors import UserError, unknown
from attnjax.data import keyed

NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # of pixels in [0, 1]
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # what is left of the distance to the mean
BLUR_STD = (1.0, 2.0, 3.0, 4.0, 6.0)  # in pixels of an image of BLUR_SIDE
BLUR_SIDE = 224
SEVERITIES = 5


def check(corruption: str | None, severity: int) -> None:
    """Raise `UserError` unless both may be given to `apply` (or neither is)."""
    if corruption is None:
        if severity:
            raise UserError(
                "data: severity needs a corruption; got corruption=none, "
                f"severity={severity}. Name one: {', '.join(CORRUPTIONS)}."
            )
        return
    if corruption not in CORRUPTIONS:
        raise unknown("data", "corruption", corruption, CORRUPTIONS)
    if severity not in range(1, SEVERITIES + 1):
        raise UserError(
            f"data: severity must be 1 to {SEVERITIES}; got severity={severity}, "
            f"corruption={corruption}."
        )


def apply(
    corruption: str, severity: int, images: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Corrupted images, in [0, 1].

    Args:
        corruption: a name of `CORRUPTIONS`.
        severity: 1 to 5.
        images: float32 [n, H, W, Ch] in [0, 1].
        indices: [n], which images of their split they are: what is random depends
            on them and on nothing else.
    """
    done = CORRUPTIONS[corruption](images, indices, severity)
    return np.clip(done, 0.0, 1.0).astype(np.float32)


def gaussian_noise(images: np.ndarray, indices: np.ndarray, severity: int):
    """Independent normal noise on every pixel and channel."""
    shape = images.shape[1:]
    count = 2 * -(-math.prod(shape) // 2)

    def noise(index: int) -> np.ndarray:
        words = keyed.rows(severity, keyed.NOISE, np.array([index]), count)
        normal = _normal(keyed.unit(words[0]))[: math.prod(shape)].reshape(shape)
        return (NOISE_STD[severity - 1] * normal).astype(np.float32)

    # One by one: the words of a whole batch of large images would not fit.
    return np.stack(
        [image + noise(i) for image, i in zip(images, indices, strict=True)]
    )


def blur(images: np.ndarray, indices: np.ndarray, severity: int):
    """A Gaussian blur; what lies outside repeats the edge."""
    from scipy.ndimage import correlate1d

    size = images.shape[1]
    weights = gaussian_weights(BLUR_STD[severity - 1] * math.sqrt(size / BLUR_SIDE))
    for axis in (1, 2):
        images = correlate1d(images, weights, axis, mode="nearest")
    return images


def contrast(images: np.ndarray, indices: np.ndarray, severity: int):
    """Every channel drawn towards its mean over the image."""
    mean = images.mean(axis=(1, 2), keepdims=True)
    return mean + CONTRAST[severity - 1] * (images - mean)


def gaussian_weights(std: float) -> np.ndarray:
    """[2 r + 1] float64: the normal density's share of each pixel; the sum is 1.

    The density is integrated over pixels and not sampled at their middles, so that
    a blur much narrower than a pixel is still one.

    Args:
        std: in pixels, above 0.
    """
    reach = math.ceil(4 * std)
    edges = np.arange(-reach, reach + 2) - 0.5
    below = np.array([math.erf(edge / (std * math.sqrt(2))) for edge in edges])
    weights = np.diff(below)
    return weights / weights.sum()


def _normal(uniform: np.ndarray) -> np.ndarray:
    """[2 m] normal numbers of [2 m] in [0, 1) (Box and Muller, 1958)."""
    radius, angle = np.split(uniform, 2)
    radius, angle = np.sqrt(-2.0 * np.log1p(-radius)), 2.0 * np.pi * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


CORRUPTIONS = {"gaussian_noise": gaussian_noise, "blur": blur, "contrast": contrast}
