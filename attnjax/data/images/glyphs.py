"""`glyphs`: characters drawn with Matplotlib's fonts, as many images as are wanted.

Image i of class c is a pure function of (seed, i, c): its font, size, angle, place and
grey levels or colours are drawn from a stream of its own. Nothing is stored or
downloaded. The held-out images are other ones of the same kind.
"""

import dataclasses
import hashlib
import json
import math

import numpy as np

from attnjax.core.errors import UserError, unknown
from attnjax.data import keyed
from attnjax.data.config import require
from attnjax.data.images import captions, fonts
from attnjax.data.images.config import ImageConfig
from attnjax.data.images.corpus import ImageCorpus, make_corpus
from attnjax.data.source import SourceSpec

SOURCE = SourceSpec(summary="characters drawn with Matplotlib's fonts, endless")

SIZES = 8  # steps between the smallest and the largest size of a font
MOST_STORED = 1 << 28  # bytes of images that are kept once they are drawn
DRAWS = 12  # label, font, size, angle, place (2), ink (3), paper (3)
_REFERENCE = 24  # pixels at which the fingerprint looks at every character
_MARGIN = 0.95  # share of the image's side that the upright character may take


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Options of `glyphs`.

    Attributes:
        chars: the classes, one character each.
        num_train: images to train on; None for no end of them (every one new).
        num_eval: images held out.
        seed: of the images; the order of training has its own, `train.seed`.
        fonts: names of Matplotlib's text fonts; empty for all 21.
        font_size: smallest and largest size of the font (its em) as a share of the
            image's side; capital letters are about 0.7 em high.
        rotation: largest angle, in degrees, either way.
        shift: largest distance from the middle, as a share of the side.
    """

    name: str = "glyphs"
    image_size: int = 32
    chars: str = "0123456789"
    num_train: int | None = None
    num_eval: int = 1000
    seed: int = 0
    fonts: tuple[str, ...] = ()
    font_size: tuple[float, float] = (0.75, 1.1)
    rotation: float = 15.0
    shift: float = 0.08

    def __post_init__(self):
        super().__post_init__()
        require(
            len(self.chars) >= 2 and len(set(self.chars)) == len(self.chars),
            "glyphs: chars must be at least two different characters; got "
            f"chars={self.chars!r}. Write them side by side, e.g. 0123456789.",
        )
        for name, count in (("num_train", self.num_train), ("num_eval", self.num_eval)):
            require(
                count is None or count >= 1,
                f"glyphs: {name} must be at least 1; got {name}={count}.",
            )
        smallest, largest = self.font_size
        require(
            0.0 < smallest <= largest <= 4.0,
            "glyphs: font_size must be two rising shares in (0, 4]; got "
            f"font_size={tuple(self.font_size)}. Use e.g. 0.75,1.1.",
        )
        require(
            0.0 <= self.rotation <= 180.0,
            "glyphs: rotation must be in [0, 180] degrees; got "
            f"rotation={self.rotation}. Use e.g. 15.",
        )
        require(
            0.0 <= self.shift <= 1.0,
            f"glyphs: shift must be in [0, 1]; got shift={self.shift}. It is a share "
            "of the image's side, e.g. 0.08.",
        )


def num_classes(config: Config) -> int:
    """Known without drawing anything."""
    return len(config.chars)


caption = captions.character


def open_source(config: Config) -> ImageCorpus:
    """The two readers; nothing is drawn yet but one mask of every character.

    Raises:
        UserError: an unknown font, a character that no font has, or no FreeType.
    """
    for font in config.fonts:
        if font not in fonts.FONTS:
            raise unknown("glyphs", "font", font, fonts.FONTS)
    usable = tuple(_fonts_with(char, config) for char in config.chars)
    facts = _facts(config, usable)
    counts = (config.num_train, config.num_eval)
    train, held_out = (
        Glyphs(config, usable, part, count) for part, count in enumerate(counts)
    )
    return make_corpus(
        config,
        (train, held_out),
        counts,
        tuple(config.chars),
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        provenance={key: facts[key] for key in ("seed", "fonts")},
    )


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """A reader (see `corpus.Reader`) that draws what it is asked for.

    Attributes:
        config: what is drawn.
        usable: for each class the fonts that have its character.
        part: 0 for the images to train on, 1 for those held out.
        count: number of images, None for no end.
    """

    config: Config
    usable: tuple[tuple[str, ...], ...]
    part: int
    count: int | None
    damage: None = dataclasses.field(default=None, init=False)

    @property
    def size(self) -> str:
        """They are drawn in the size that is asked for."""
        return f"{self.config.image_size}x{self.config.image_size}"

    @property
    def is_stored(self) -> bool:
        """Whether so few are wanted that they are kept."""
        pixels = self.config.image_size**2 * self.config.channels
        return self.count is not None and self.count * pixels <= MOST_STORED

    def read(self, indices, finish):
        """See `corpus.Reader.read`; every image can be drawn."""
        draws = self.draws(indices)
        labels = (draws[:, 0] * len(self.config.chars)).astype(np.int32)
        made = [
            finish(k, self.image(int(label), draws[k]))
            for k, label in enumerate(labels)
        ]
        return made, labels

    def draws(self, indices: np.ndarray) -> np.ndarray:
        """[n, DRAWS] in [0, 1): all that is random about these images."""
        places = 2 * np.asarray(indices, np.int64) + self.part
        return keyed.unit(keyed.rows(self.config.seed, keyed.GLYPHS, places, DRAWS))

    def image(self, label: int, draws: np.ndarray) -> np.ndarray:
        """uint8 [H, W, Ch]: the character of a class, as the numbers say.

        Args:
            label: the class; `draws[0]` is not looked at.
            draws: [DRAWS] in [0, 1).
        """
        config = self.config
        _, font, size, angle, down, right = draws[:6]
        names = self.usable[label]
        ink = fonts.mask(
            names[int(font * len(names))], config.chars[label], self._pixels(size)
        )
        degrees = (2 * angle - 1) * config.rotation
        reach = config.shift * config.image_size
        cover = place(
            ink,
            config.image_size,
            degrees=degrees,
            shift=((2 * right - 1) * reach, (2 * down - 1) * reach),
        )
        front = 0.6 + 0.4 * draws[6 : 6 + config.channels]
        back = 0.4 * draws[9 : 9 + config.channels]
        mixed = back + (front - back) * (cover[..., None] / 255.0)
        return np.rint(255 * mixed).astype(np.uint8)

    def _pixels(self, draw: float) -> int:
        """The font's size in pixels, one of `SIZES`, so that masks are used again."""
        smallest, largest = self.config.font_size
        step = int(draw * SIZES) / (SIZES - 1)
        share = smallest + (largest - smallest) * step
        return max(1, round(share * self.config.image_size))


def place(
    ink: np.ndarray, side: int, *, degrees: float, shift: tuple[float, float]
) -> np.ndarray:
    """A mask turned about its middle and laid near the middle of a square.

    Args:
        ink: uint8 [h, w]; reduced if it is larger than the square.
        side: of the square, in pixels.
        degrees: counterclockwise.
        shift: (right, down) in pixels, fractions allowed.

    Returns: uint8 [side, side].
    """
    from PIL import Image

    height, width = ink.shape
    factor = max(1.0, max(height, width) / (_MARGIN * side))
    flat = Image.fromarray(ink)
    if factor > 1.0:
        width, height = (max(1, round(n / factor)) for n in (width, height))
        flat = flat.resize((width, height), Image.Resampling.BILINEAR)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Where a pixel (x, y) of the square comes from: its distance from the new middle,
    # turned back, seen from the middle of the mask.
    x, y = side / 2 + shift[0], side / 2 + shift[1]
    matrix = (
        *(cos, -sin, width / 2 - cos * x + sin * y),
        *(sin, cos, height / 2 - sin * x - cos * y),
    )
    turned = flat.transform(
        (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(turned)


def _fonts_with(char: str, config: Config) -> tuple[str, ...]:
    wanted = config.fonts or fonts.FONTS
    found = tuple(font for font in wanted if fonts.draws(font, char, _REFERENCE))
    if not found:
        raise UserError(
            "glyphs: every character must be in one of the fonts; got "
            f"{char!r} (U+{ord(char):04X}), in none of {len(wanted)}. Remove it from "
            "data.chars, or add a font to data.fonts."
        )
    return found


def _facts(config: Config, usable: tuple[tuple[str, ...], ...]) -> dict:
    """What decides how images come out, drawn characters included."""
    digest = hashlib.sha256()
    for char, names in zip(config.chars, usable, strict=True):
        for name in names:
            ink = fonts.mask(name, char, _REFERENCE)
            digest.update(repr(ink.shape).encode() + ink.tobytes())
    names = ("chars", "num_train", "num_eval", "seed", "font_size", "rotation", "shift")
    return {
        **{name: getattr(config, name) for name in names},
        "fonts": sorted({name for group in usable for name in group}),
        "masks": digest.hexdigest(),
    }
