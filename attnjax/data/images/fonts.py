"""Masks of characters, from the fonts that come with Matplotlib."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.errors import UserError

# Text fonts only; the others hold symbols.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
_NOBODYS = "\U0010fffe"  # in no font: what is drawn for it stands for a missing one


def draws(font: str, char: str, pixels: int) -> bool:
    """Whether a font draws a character, and draws no other in its place.

    The fonts of TeX ("cm") have letters and digits where they belong; elsewhere they
    have dashes for "|" and the like.
    """
    if font.startswith("cm") and not (char.isascii() and char.isalnum()):
        return False
    return bool(mask(font, char, pixels).any())


@functools.cache
def mask(font: str, char: str, pixels: int) -> np.ndarray:
    """A character's coverage, cut to its ink.

    Args:
        font: a name of `FONTS`.
        char: one character.
        pixels: the font's size (its em).

    Returns: uint8 [h, w], empty if the character has no ink or the font lacks it.
    Raises:
        UserError: Pillow without FreeType, or Matplotlib without its fonts.
    """
    if char != _NOBODYS and _same_drawing(font, char, pixels):
        return np.zeros((0, 0), np.uint8)
    return _draw(font, char, pixels)


def _same_drawing(font: str, char: str, pixels: int) -> bool:
    return np.array_equal(_draw(font, char, pixels), mask(font, _NOBODYS, pixels))


def _draw(font: str, char: str, pixels: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    opened = _open(font, pixels)
    left, top, right, bottom = (int(edge) for edge in opened.getbbox(char))
    canvas = Image.new("L", (max(right - left, 1) + 2, max(bottom - top, 1) + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), char, fill=255, font=opened)
    ink = canvas.getbbox()
    return np.array(canvas.crop(ink) if ink else canvas.crop((0, 0, 0, 0)))


@functools.cache
def _open(font: str, pixels: int) -> Any:
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    try:
        # The basic engine: what a character looks like does not depend on others.
        engine = ImageFont.Layout.BASIC
        return ImageFont.truetype(str(path), pixels, layout_engine=engine)
    except (ImportError, OSError) as error:
        raise UserError(
            f"glyphs: drawing needs Pillow with FreeType and Matplotlib's fonts; got "
            f"{error} for {font}. Run: pip install --force-reinstall pillow matplotlib"
        ) from error
