"""Small splits of images that can be told apart."""

import numpy as np
import pytest

from attnjax.data.images.config import ImageConfig
from attnjax.data.images.corpus import ImageSplit, Stored


@pytest.fixture
def make_split():
    """Builds a split of n random images in memory; every label is known."""

    def make(n=23, *, side=6, channels=1, classes=5, name="train", **options):
        rng = np.random.default_rng(n)
        images = rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8)
        labels = (np.arange(n) % classes).astype(np.int32)
        options = {"image_size": side, "channels": channels, **options}
        config = ImageConfig(name="toy", **options)
        reader = Stored(images, labels, f"{side}x{side}")
        return ImageSplit(reader, n, classes, config, name)

    return make
