import math

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data.images import CORRUPTIONS, eval_batches
from attnjax.data.images.corruptions import (
    CONTRAST,
    NOISE_STD,
    apply,
    check,
    gaussian_weights,
)

RNG = np.random.default_rng(0)
SEVERITIES = range(1, 6)


def images(n=3, side=16, channels=3):
    return RNG.random((n, side, side, channels)).astype(np.float32)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_keeps_range_shape_and_dtype_and_grows(name):
    given, places = images(), np.arange(3)
    distance = []
    for severity in SEVERITIES:
        got = apply(name, severity, given, places)
        assert got.shape == given.shape and got.dtype == np.float32
        assert got.min() >= 0 and got.max() <= 1
        distance.append(np.abs(got - given).mean())
    assert (np.diff(distance) > 0).all() and distance[0] > 0.005


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_wherever_it_stands(name):
    given = images(5)
    whole = apply(name, 3, given, np.arange(40, 45))
    part = apply(name, 3, given[[3, 1]], np.array([43, 41]))
    assert np.array_equal(part, whole[[3, 1]])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_is_normal_with_the_papers_spread(severity):
    grey = np.full((4, 60, 60, 1), 0.5, np.float32)
    got = apply("gaussian_noise", severity, grey, np.arange(4)) - 0.5
    std = NOISE_STD[severity - 1]
    inside = np.abs(got) < 0.499  # what is not clipped
    share = math.erf(0.499 / (std * math.sqrt(2)))
    assert inside.mean() == pytest.approx(share, abs=0.01)
    assert np.median(np.abs(got)) == pytest.approx(0.6745 * std, rel=0.04)
    assert got.mean() == pytest.approx(0, abs=4 * std / 120)
    # Neighbours, channels and images are independent.
    assert abs(np.corrcoef(got[:, :-1].ravel(), got[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(got[0].ravel(), got[1].ravel())[0, 1]) < 0.06


def test_severities_have_noise_of_their_own():
    grey = np.full((1, 9, 9, 1), 0.5, np.float32)
    one, two = (apply("gaussian_noise", s, grey, np.array([0])) - 0.5 for s in (1, 2))
    assert not np.allclose(one / NOISE_STD[0], two / NOISE_STD[1], atol=0.1)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_the_mean_and_shrinks_the_spread(severity):
    given = images()
    got = apply("contrast", severity, given, np.arange(3)).astype(np.float64)
    axes = (1, 2)
    np.testing.assert_allclose(got.mean(axes), given.mean(axes), atol=1e-5)
    ratio = got.std(axes) / given.std(axes)
    np.testing.assert_allclose(ratio, CONTRAST[severity - 1], rtol=1e-4)


def test_a_blur_leaves_constant_images_and_keeps_the_sum():
    flat = np.full((1, 9, 9, 1), 0.3, np.float32)
    np.testing.assert_allclose(apply("blur", 5, flat, np.array([0])), flat, atol=1e-6)
    dot = np.zeros((1, 57, 57, 1), np.float32)
    dot[0, 28, 28] = 1
    got = apply("blur", 5, dot, np.array([0]))[0, ..., 0].astype(np.float64)
    assert got.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(got, got.T, atol=1e-7)
    np.testing.assert_allclose(got, got[::-1, ::-1], atol=1e-7)
    # Its variance is that of the Gaussian and of the pixel that it is spread over.
    spread = (got.sum(0) * (np.arange(57) - 28) ** 2).sum()
    assert spread == pytest.approx(6**2 * 57 / 224 + 1 / 12, rel=0.01)


def test_a_blur_repeats_the_edge():
    halves = np.zeros((1, 32, 32, 1), np.float32)
    halves[:, :, 16:] = 1
    got = apply("blur", 3, halves, np.array([0]))[0, :, :, 0]
    np.testing.assert_allclose(got, np.broadcast_to(got[:1], got.shape), atol=1e-6)
    assert (got[:, 0] == 0).all() and got[0, -1] == pytest.approx(1)


@pytest.mark.parametrize("std", [0.05, 0.5, 3.0])
def test_the_weights_of_a_blur_are_the_normal_density(std):
    weights = gaussian_weights(std)
    assert weights.sum() == pytest.approx(1) and (weights == weights[::-1]).all()
    middle = math.erf(0.5 / (std * math.sqrt(2)))
    assert weights[len(weights) // 2] == pytest.approx(middle, rel=1e-4)


def test_what_is_evaluated_is_the_corrupted_image(make_split):
    split = make_split(5, mean=(0.0,), std=(1.0,))
    (plain,) = eval_batches(split, batch_size=5)
    shift = {"corruption": "contrast", "severity": 4}
    (got,) = eval_batches(split, batch_size=5, **shift)
    expected = apply("contrast", 4, plain["image"], np.arange(5))
    assert np.array_equal(got["image"], expected)
    assert np.array_equal(got["label"], plain["label"])


@pytest.mark.parametrize(
    ("corruption", "severity", "message"),
    [
        ("blurr", 1, r"unknown corruption 'blurr'\. Did you mean blur"),
        ("blur", 0, "severity must be 1 to 5; got severity=0, corruption=blur"),
        ("blur", 6, "severity must be 1 to 5; got severity=6"),
        (None, 2, "severity needs a corruption; got corruption=none, severity=2"),
    ],
)
def test_a_corruption_that_does_not_exist_is_refused(
    make_split, corruption, severity, message
):
    with pytest.raises(UserError, match=message):
        # Before the first batch is asked for.
        eval_batches(
            make_split(), batch_size=4, corruption=corruption, severity=severity
        )
    check(None, 0)
