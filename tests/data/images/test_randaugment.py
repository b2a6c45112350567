import numpy as np
import pytest
from PIL import Image

from attnjax.data.images import randaugment
from attnjax.data.images.randaugment import DRAWS, NAMES, OPERATIONS, apply

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 12), dtype=np.uint8)
FREE = ("autocontrast", "equalize")  # have no strength


def run(name, image, strength=1.0, sign=1):
    return np.asarray(OPERATIONS[name](Image.fromarray(image), strength, sign))


def test_there_are_the_papers_fourteen_operations():
    assert len(NAMES) == 14 and len(set(NAMES)) == 14


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image", [COLOUR, GREY], ids=["colour", "grey"])
def test_an_operation_keeps_the_shape_and_begins_at_nothing(name, image):
    for sign in (1, -1):
        assert run(name, image, 1.0, sign).shape == image.shape
        if name not in FREE:
            assert np.array_equal(run(name, image, 0.0, sign), image)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {*FREE, "identity"}))
def test_an_effect_grows_with_the_strength(name):
    smooth = np.asarray(Image.fromarray(COLOUR).resize((24, 24)), np.uint8)
    change = [
        np.abs(run(name, smooth, strength).astype(float) - smooth).mean()
        for strength in (0.0, 0.25, 1.0)
    ]
    assert change[0] < change[1] < change[2]


def test_posterize_keeps_the_upper_bits():
    assert np.array_equal(run("posterize", COLOUR), COLOUR & 0b11110000)
    assert np.array_equal(run("posterize", GREY, 0.5), GREY & 0b11111100)


def test_solarize_inverts_what_is_above_the_threshold():
    assert np.array_equal(run("solarize", GREY), 255 - GREY)
    half = np.where(GREY < 128, GREY, 255 - GREY)
    assert np.array_equal(run("solarize", GREY, 0.5), half)


def test_brightness_and_colour_and_contrast_blend_with_their_limits():
    limits = {
        "brightness": np.zeros_like(COLOUR),
        "color": np.repeat(
            np.asarray(Image.fromarray(COLOUR).convert("L"))[..., None], 3, axis=-1
        ),
        "contrast": np.full_like(
            COLOUR, int(np.asarray(Image.fromarray(COLOUR).convert("L")).mean() + 0.5)
        ),
    }
    for name, limit in limits.items():
        for sign in (1, -1):
            factor = 1 + sign * 0.9 * 0.5
            expected = np.clip(limit + factor * (COLOUR.astype(float) - limit), 0, 255)
            np.testing.assert_allclose(run(name, COLOUR, 0.5, sign), expected, atol=1)


def test_sharpness_leaves_a_constant_image_and_smooths_a_dot():
    flat = np.full((7, 7), 90, np.uint8)
    assert np.array_equal(run("sharpness", flat, 1.0), flat)
    dot = flat.copy()
    dot[3, 3] = 200
    smooth, sharp = run("sharpness", dot, 1.0, -1), run("sharpness", dot, 1.0, 1)
    assert smooth[3, 3] < 200 < sharp[3, 3]
    assert smooth[3, 2] > 90 > sharp[3, 2]


def test_autocontrast_fills_the_range_and_keeps_the_order():
    narrow = (GREY // 4 + 60).astype(np.uint8)
    got = run("autocontrast", narrow)
    assert (got.min(), got.max()) == (0, 255)
    order = np.argsort(narrow, axis=None, kind="stable")
    assert (np.diff(got.ravel()[order].astype(int)) >= 0).all()
    again = run("autocontrast", got)
    assert np.array_equal(again, got)


def test_equalize_makes_brightness_uniform():
    skewed = (np.linspace(0, 1, 64 * 64) ** 4 * 255).astype(np.uint8).reshape(64, 64)
    before, after = (
        np.histogram(i, 4, (0, 256))[0] / 64**2
        for i in (skewed, run("equalize", skewed))
    )
    assert np.abs(after - 0.25).max() < 0.25 * np.abs(before - 0.25).max()


def test_shifts_are_whole_pixels_and_black_comes_in():
    side = 20
    image = RNG.integers(1, 256, (side, side), dtype=np.uint8)
    right, left = run("translate_x", image, 1.0, -1), run("translate_x", image, 1.0, 1)
    assert np.array_equal(left[:, : side - 9], image[:, 9:]) and not left[:, -9:].any()
    assert np.array_equal(right[:, 9:], image[:, : side - 9]) and not right[:, :9].any()
    up = run("translate_y", image, 1.0, 1)
    assert np.array_equal(up, run("translate_x", image.T, 1.0, 1).T)


def test_rotations_and_shears_go_both_ways_and_undo_each_other():
    yy, xx = np.mgrid[-1:1:41j, -1:1:41j]
    blob = (255 * np.exp(-8 * ((xx - 0.3) ** 2 + 4 * (yy + 0.2) ** 2))).astype(np.uint8)
    for name in ("rotate", "shear_x", "shear_y"):
        one, other = run(name, blob, 0.5, 1), run(name, blob, 0.5, -1)
        assert np.abs(one.astype(int) - other).max() > 20
        back = run(name, one, 0.5, -1)
        assert np.abs(back.astype(int) - blob).mean() < 2


def test_a_shear_leaves_the_middle_where_it_is():
    bar = np.zeros((41, 41), np.uint8)
    bar[:, 20] = 255
    for sign in (1, -1):
        got = run("shear_x", bar, 1.0, sign).astype(float)
        place = got @ np.arange(41) / got.sum(1)
        np.testing.assert_allclose(
            place, 20 - sign * 0.3 * (np.arange(41) - 20), atol=0.05
        )
        other = run("shear_y", bar.T, 1.0, sign).astype(float)
        np.testing.assert_allclose(other, got.T, atol=1)


def test_a_rotation_is_by_the_angle_it_says():
    yy, xx = np.mgrid[-30:31, -30:31]
    bar = ((np.abs(yy) < 3) & (np.abs(xx) < 20)).astype(np.uint8) * 255
    turned = run("rotate", bar, 0.5, 1).astype(float)  # 15 degrees counterclockwise
    moments = (turned * xx * yy).sum(), (turned * (xx**2 - yy**2)).sum()
    angle = np.degrees(0.5 * np.arctan2(2 * moments[0], moments[1]))
    assert angle == pytest.approx(-15, abs=0.5)  # rows count downwards


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_depends_on_its_own_numbers_alone(channels):
    images = RNG.integers(0, 256, (9, 8, 8, channels), dtype=np.uint8)
    draws = RNG.random((9, 6 * DRAWS))
    whole = apply(images, draws, layers=2, magnitude=7.0)
    assert whole.shape == images.shape and whole.dtype == np.uint8
    part = apply(images[4:6], draws[4:6], layers=2, magnitude=7.0)
    assert np.array_equal(part, whole[4:6])
    other = np.where(np.arange(6 * DRAWS) < 2 * DRAWS, draws, 0.5)
    assert np.array_equal(apply(images, other, layers=2, magnitude=7.0), whole)
    assert apply(images[:0], draws[:0], layers=2, magnitude=7.0).shape[0] == 0


def test_layers_are_drawn_with_their_signs():
    image = np.full((1, 8, 8, 1), 100, np.uint8)
    which = (NAMES.index("brightness") + 0.5) / len(NAMES)
    draws = np.array([[which, 0.1, which, 0.9]])
    up = apply(image, draws, layers=1, magnitude=10.0)
    both = apply(image, draws, layers=2, magnitude=10.0)
    assert (up == 190).all() and (both == 19).all()


def test_every_operation_is_drawn_equally_often():
    draws = RNG.random(14_000)
    counts = np.bincount((draws * len(NAMES)).astype(int), minlength=14)
    assert counts.min() > 850 and counts.max() < 1150


def test_large_images_are_worked_on_by_threads_with_the_same_result(monkeypatch):
    images = RNG.integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    draws = RNG.random((3, 2 * DRAWS))
    called = []
    monkeypatch.setattr(
        randaugment, "each", lambda f, items: called.append(1) or [f(i) for i in items]
    )
    expected = apply(images, draws, layers=2, magnitude=9.0)
    monkeypatch.undo()
    got = apply(images, draws, layers=2, magnitude=9.0)
    assert called and np.array_equal(got, expected)
