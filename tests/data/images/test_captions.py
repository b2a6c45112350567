"""What is on an image, in words."""

import pytest

from attnjax.data import images
from attnjax.data.images import captions


@pytest.mark.parametrize(
    ("source", "names", "wanted"),
    [
        ("digits", ("0", "8"), ("a zero", "an eight")),
        ("glyphs", ("a", "É", "1", "+"), None),
        ("folder:x", ("blue_jay", "8"), ("blue jay", "8")),
    ],
)
def test_a_source_says_what_its_classes_look_like(source, names, wanted):
    config = images.config_class(source)(name=source)
    signs = ("the letter a", "the capital letter É", "a one", "the sign +")
    assert captions.of_classes(config, names) == (wanted or signs)
