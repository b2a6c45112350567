import numpy as np
import pytest

from attnjax.data.images.geometry import (
    INCEPTION_DRAWS,
    fit,
    flip,
    inception_box,
    pad_and_crop,
    resize,
)

RNG = np.random.default_rng(0)


def random_image(height, width, channels=1):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def ramp(height, width):
    """Brightness that rises by 4 a pixel to the right."""
    row = 4 * np.arange(width, dtype=np.uint8)
    return np.broadcast_to(row[:, None], (height, width, 1)).copy()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_is_left_alone(channels):
    image = random_image(7, 7, channels)
    assert np.array_equal(fit(image, 7), image)
    wide = random_image(7, 11, channels)
    assert np.array_equal(fit(wide, 7), wide[:, 2:9])


def test_a_constant_image_stays_constant_at_every_size():
    for size in (1, 3, 7, 20):
        assert (fit(np.full((11, 7, 3), 131, np.uint8), size) == 131).all()


def test_reducing_to_one_pixel_keeps_the_mean():
    image = random_image(8, 8)
    # A triangle over the whole image: each axis weighs its middle most.
    weight = 1 - np.abs((np.arange(8) + 0.5) / 8 - 0.5)
    weight /= weight.sum()
    expected = weight @ image[..., 0] @ weight
    assert abs(float(fit(image, 1)[0, 0, 0]) - expected) <= 1


def test_enlarging_interpolates_linearly():
    got = resize(ramp(4, 8), 16, (0, 0, 8, 4))[8, :, 0].astype(float)
    expected = 4 * np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
    np.testing.assert_allclose(got, expected, atol=0.51)


def test_the_middle_square_is_taken():
    got = fit(ramp(10, 30), 5)[2, :, 0].astype(float)
    np.testing.assert_allclose(got, 4 * (10 + 2 * np.arange(5) + 0.5), atol=1)
    share = fit(ramp(10, 30), 5, 0.5)
    assert np.array_equal(share, ramp(10, 30)[2:7, 12:17])


def test_resizing_commutes_with_mirroring():
    image = random_image(9, 9, 3)
    assert (
        np.abs(fit(image[:, ::-1], 5) - fit(image, 5)[:, ::-1].astype(int)).max() <= 1
    )


def test_a_box_lies_inside_and_has_the_area_and_ratio_that_are_drawn():
    height, width = 200, 300
    draws = RNG.random((3000, INCEPTION_DRAWS))
    boxes = np.array(
        [inception_box(height, width, row, min_area=0.08) for row in draws]
    )
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= width).all() and (bottom <= height).all()
    assert (boxes == boxes.astype(int)).all()
    area = (right - left) * (bottom - top) / (height * width)
    ratio = (right - left) / (bottom - top)
    assert 0.075 < area.min() < 0.09 and area.max() > 0.85
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35
    # Boxes of up to half the area always fit at the first attempt: uniform there.
    small = area[area < 0.5]
    assert abs(np.median(small) - (0.08 + 0.5) / 2) < 0.015
    log = np.log(ratio[area < 0.5])
    assert abs(log.mean()) < 0.015 and abs(log.var() - np.log(16 / 9) ** 2 / 12) < 0.004


def test_the_place_of_a_box_is_uniform():
    draws = RNG.random((3000, INCEPTION_DRAWS))
    draws[:, 0] = 0.5
    draws[:, 1] = 0.5
    boxes = np.array([inception_box(10, 10, row, min_area=0.02) for row in draws])
    side = boxes[0, 2] - boxes[0, 0]
    for edge in (0, 1):
        counts = np.bincount(boxes[:, edge].astype(int), minlength=11 - side)
        assert len(counts) == 11 - side and counts.min() > 3000 / (11 - side) * 0.8


def test_a_box_that_never_fits_is_the_middle_square():
    draws = np.full(INCEPTION_DRAWS, 0.999)
    assert inception_box(10, 100, draws, min_area=0.9) == (45, 0, 55, 10)
    assert inception_box(1, 1, draws, min_area=0.08) == (0, 0, 1, 1)


def test_a_later_attempt_is_used_when_the_first_does_not_fit():
    draws = np.full(INCEPTION_DRAWS, 0.999)
    draws[4:8] = 0.0  # the smallest area, ratio 3/4, upper left
    left, top, right, bottom = inception_box(100, 200, draws, min_area=0.03)
    assert (left, top) == (0, 0) and (right, bottom) == (21, 28)


def test_padding_and_cropping_moves_the_image():
    image = random_image(5, 5, 3)
    padded = np.zeros((9, 9, 3), np.uint8)
    padded[2:7, 2:7] = image
    cells = (np.arange(5) + 0.5) / 5
    draws = np.array([(down, right) for down in cells for right in cells])
    got = pad_and_crop(np.repeat(image[None], 25, axis=0), draws, pad=2)
    for place, crop in enumerate(got):
        down, right = divmod(place, 5)
        assert np.array_equal(crop, padded[down : down + 5, right : right + 5])
    assert np.array_equal(got[12], image)


def test_no_padding_is_the_identity():
    images = RNG.integers(0, 256, (4, 3, 5, 1), dtype=np.uint8)
    assert np.array_equal(pad_and_crop(images, RNG.random((4, 2)), pad=0), images)


def test_half_of_the_images_are_mirrored():
    images = RNG.integers(0, 256, (3, 4, 5, 1), dtype=np.uint8)
    got = flip(images, np.array([0.0, 0.49999, 0.5]))
    assert np.array_equal(got[:2], images[:2, :, ::-1])
    assert np.array_equal(got[2], images[2])
