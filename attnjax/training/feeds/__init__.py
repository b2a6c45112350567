"""What a run learns from: text or images, behind one interface (`feeds.base.Feed`).

The name of the model decides: `config.model.name=lm` reads text, `vit` and `pyramid`
name images, `dit` and `mmdit` take noise out of them, told a class or a caption.
"""

from collections.abc import Mapping
from typing import Any

from attnjax.core.errors import unknown
from attnjax.training.feeds.base import Feed
from attnjax.training.feeds.captioned import CaptionedFeed
from attnjax.training.feeds.diffusion import DiffusionFeed
from attnjax.training.feeds.images import ImageFeed
from attnjax.training.feeds.pyramid import PyramidFeed
from attnjax.training.feeds.text import TextFeed

__all__ = [
    "FEEDS",
    "CaptionedFeed",
    "DiffusionFeed",
    "Feed",
    "ImageFeed",
    "PyramidFeed",
    "TextFeed",
    "feed_class",
    "make",
]

FEEDS: dict[str, type[Feed]] = {
    "lm": TextFeed,
    "vit": ImageFeed,
    "pyramid": PyramidFeed,
    "dit": DiffusionFeed,
    "mmdit": CaptionedFeed,
}


def feed_class(model: Mapping[str, Any]) -> type[Feed]:
    """The feed of a `config.model`, resolved or not.

    Raises:
        UserError: for an unknown `name`.
    """
    name = str(model.get("name", "lm"))
    if name not in FEEDS:
        raise unknown("config.model.name", "model", name, FEEDS)
    return FEEDS[name]


def make(config: Mapping[str, Any]) -> Feed:
    """The feed of a resolved config; its data is not opened yet."""
    return feed_class(config["model"])(config)
