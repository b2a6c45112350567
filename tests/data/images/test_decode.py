import io
import zlib

import numpy as np
import pytest
from PIL import Image

from attnjax.data.images.decode import Undecodable, decode

GREY = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 3, 3), dtype=np.uint8)


def encode(image, kind="png", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_grey_and_colour_are_kept():
    assert np.array_equal(decode(encode(GREY), 1)[..., 0], GREY)
    assert np.array_equal(decode(encode(COLOUR), 3), COLOUR)


def test_grey_becomes_three_equal_channels_and_colour_its_luma():
    assert np.array_equal(decode(encode(GREY), 3), np.repeat(GREY[..., None], 3, -1))
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(decode(encode(COLOUR), 1)[..., 0], luma, atol=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_white(channels):
    alpha = np.zeros((5, 3), np.uint8)
    alpha[2:] = 255
    rgba = encode(np.dstack([COLOUR, alpha]))
    la = encode(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]))
    for data, solid in ((rgba, COLOUR), (la, GREY)):
        got = decode(data, channels)
        assert got.shape == (5, 3, channels) and (got[:2] == 255).all()
        assert np.array_equal(got[2:], decode(encode(solid), channels)[2:])


def test_half_transparent_pixels_are_half_white():
    half = np.dstack([COLOUR, np.full((5, 3), 51, np.uint8)])
    expected = 0.2 * COLOUR + 0.8 * 255
    np.testing.assert_allclose(decode(encode(half), 3), expected, atol=1)


def test_palettes_are_looked_up_and_their_transparency_is_white():
    image = Image.new("P", (3, 5), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert (decode(encode(image), 3) == (200, 100, 50)).all()
    image.putpixel((0, 0), 0)
    got = decode(encode(image, transparency=0), 3)
    assert (got[0, 0] == 255).all() and (got[1:] == (200, 100, 50)).all()


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert decode(encode(values), 1).ravel().tolist() == [0, 1, 128, 255]
    assert decode(encode(values, "tiff"), 3)[0, :, 2].tolist() == [0, 1, 128, 255]


def test_bilevel_and_cmyk_images_are_converted():
    bits = Image.fromarray(GREY).convert("1")
    assert set(np.unique(decode(encode(bits), 1))) == {0, 255}
    cmyk = Image.new("CMYK", (3, 5), (255, 0, 0, 0))
    assert (decode(encode(cmyk, "tiff"), 3) == (0, 255, 255)).all()


def test_the_exif_orientation_is_applied():
    image = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    got = decode(encode(image, exif=exif), 3)
    assert np.array_equal(got, np.rot90(COLOUR, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_orientation_is_not_applied():
    jpeg = encode(COLOUR, "jpeg")
    tag = b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff"
    got = decode(jpeg[:2] + tag + jpeg[2:], 3)
    assert np.array_equal(got, decode(jpeg, 3))


def test_the_first_picture_of_an_animation_is_taken():
    frames = [Image.new("L", (3, 5), shade) for shade in (40, 200)]
    data = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (decode(data, 1) == 40).all()


def png_of_size(width, height):
    """A small PNG that says it is that large."""
    data = encode(GREY)
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image format"),
        (b"hello", "no image format"),
        (encode(COLOUR)[:60], r"(OSError|SyntaxError)"),
        (encode(COLOUR, "jpeg")[:-40], "OSError"),
        (png_of_size(10**6, 10**6), "DecompressionBombError"),
        (encode(np.zeros((2, 2), np.float32), "tiff"), "pixels are floats"),
        (encode(np.full((2, 2), -1, np.int32), "tiff"), r"outside \[0, 65535\]"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "huge", "float", "negative"],
)
def test_what_cannot_be_decoded_says_why_and_nothing_else(data, reason):
    with pytest.raises(Undecodable, match=reason) as caught:
        decode(data, 3)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_damaged_bytes_never_raise_anything_else():
    rng, good = np.random.default_rng(0), [encode(COLOUR, k) for k in ("png", "jpeg")]
    failed = 0
    for trial in range(200):
        data = bytearray(good[trial % 2])
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data), 3).shape[-1] == 3
        except Undecodable:
            failed += 1
    assert 0 < failed < 200
