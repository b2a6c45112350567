"""Features by a network of the user's: what it is shown, and what is refused."""

import sys
import types

import numpy as np
import pytest

from attnjax.analysis import image_features
from attnjax.analysis.image_features import Network, check_data, open_network
from attnjax.core.errors import UserError
from attnjax.data import images


def shown(pictures, size=None, pixels="uint8"):
    return Network("toy", size, pixels, None)._shown(pictures)


def test_pixels_are_given_as_the_network_takes_them():
    pictures = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3) * 3
    wanted = pictures.transpose(0, 3, 1, 2)
    assert shown(pictures).dtype == np.uint8
    np.testing.assert_array_equal(shown(pictures), wanted)
    unit = shown(pictures, pixels="unit")
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, wanted / 255.0, rtol=1e-6)
    signed = shown(pictures, pixels="signed")
    np.testing.assert_allclose(signed, wanted / 127.5 - 1.0, atol=1e-6)
    grey = shown(pictures[..., :1])
    np.testing.assert_array_equal(grey, wanted[:, :1].repeat(3, axis=1))


def test_pictures_are_resized_to_what_is_declared():
    flat = np.full((2, 5, 5, 3), 7, np.uint8)
    np.testing.assert_array_equal(shown(flat, 11), np.full((2, 3, 11, 11), 7))
    halves = np.zeros((1, 4, 4, 1), np.uint8)
    halves[:, :, 2:] = 200
    found = shown(halves, 2)[0, 0]
    # Averaged, not picked: what is left of the edge leaks over it.
    assert found[0, 0] < 40 and found[0, 1] > 160 and found[0, 0] + found[0, 1] == 200


def test_images_to_compare_with_are_always_the_same():
    split = types.SimpleNamespace(num_images=31)
    everything = np.arange(31)
    np.testing.assert_array_equal(image_features._chosen(split, None), everything)
    np.testing.assert_array_equal(image_features._chosen(split, 40), everything)
    few = image_features._chosen(split, 7)
    np.testing.assert_array_equal(few, image_features._chosen(split, 7))
    assert len(np.unique(few)) == 7 and few.max() > 7
    endless = types.SimpleNamespace(num_images=None)
    assert len(image_features._chosen(endless, 9)) == 9
    assert len(image_features._chosen(endless, None)) == image_features.OF_ENDLESS


def test_data_of_another_size_are_refused():
    name = types.SimpleNamespace(name="digits")
    run = types.SimpleNamespace(
        model=types.SimpleNamespace(image_size=8, channels=1),
        feed=types.SimpleNamespace(image_shape=(8, 1), data=name),
    )
    check_data(run)
    run.feed.image_shape = (16, 1)
    with pytest.raises(UserError, match=r"got \(16, 1\) of digits, the samples have"):
        check_data(run)


def test_what_is_no_network_is_refused(tmp_path, monkeypatch):
    def attempt(text, message, size=None):
        with pytest.raises(UserError, match=message):
            open_network(text, size=size, pixels=None)

    attempt("inception:x", "must be torchscript:FILE; got 'inception:x'")
    attempt("torchscript:", "must be torchscript:FILE")
    attempt("torchscript:x", "features_size: must be at least 1; got 0", size=0)
    missing = tmp_path / "none.pt"
    attempt(f"torchscript:{missing}", "must be readable.*No such file.*Download")
    missing.write_bytes(b"1")
    monkeypatch.setitem(sys.modules, "torch", None)
    attempt(f"torchscript:{missing}", "is run by torch.*pip install 'attnjax")


def test_a_reference_must_hold_moments(tmp_path):
    path = tmp_path / "moments.npz"
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3, dtype=np.float32))
    found = image_features.read_reference(path)
    assert found.covariance.dtype == np.float64 and found.mean.tolist() == [0, 1, 2]
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(UserError, match=r"got shapes \(3,\) and \(2, 2\)"):
        image_features.read_reference(path)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(UserError, match=r"\.npz with mu \[F\] and sigma"):
        image_features.read_reference(path)
    for content in (None, b"text"):
        other = tmp_path / "other.npz"
        if content:
            other.write_bytes(content)
        with pytest.raises(UserError, match=r"\.npz with mu \[F\] and sigma"):
            image_features.read_reference(other)


def test_distances_are_of_the_features_of_pictures(tmp_path):
    config = images.config_class("glyphs")(
        name="glyphs", chars="ab", image_size=8, num_train=23, num_eval=13
    )
    corpus = images.open_corpus(config)

    class Means:
        """Two features that a pen can follow."""

        name = "toy"

        def features(self, pictures):
            assert pictures.dtype == np.uint8 and len(pictures) <= 50
            top, low = pictures[:, :4], pictures[:, 4:]
            halves = [x.reshape(len(x), -1).mean(axis=1) for x in (top, low)]
            return np.stack(halves, axis=1).astype(np.float32)

    drawn = np.random.default_rng(0).normal(size=(61, 8, 8, 1))
    run = types.SimpleNamespace(
        pixels=lambda x: np.clip(128 + 60 * x, 0, 255).astype(np.uint8),
        feed=types.SimpleNamespace(corpus=corpus),
    )
    found = image_features.feature_distances(run, drawn, Means())
    made, real, held = (
        np.concatenate([x[:, :4].mean((1, 2)), x[:, 4:].mean((1, 2))], axis=1)
        for x in (
            run.pixels(drawn),
            corpus.train.read(np.arange(23))[0],
            corpus.eval.read(np.arange(13))[0],
        )
    )

    def distance(one, other):
        """tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2) of two by two."""
        a, b = np.cov(one.T), np.cov(other.T)
        root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
        gap = one.mean(0) - other.mean(0)
        return gap @ gap + np.trace(a + b) - 2 * root

    assert found["features"] == "torchscript:toy" and found["samples"] == 61
    assert found["frechet_data"] == "23 training images"
    assert found["frechet_distance"] == pytest.approx(distance(made, real), rel=1e-4)
    wanted = distance(held, real)
    assert found["frechet_distance_held_out"] == pytest.approx(wanted, rel=1e-4)
    moments = image_features.Moments(real.mean(0), np.cov(real.T))
    again = image_features.feature_distances(run, drawn, Means(), reference=moments)
    assert again["frechet_distance"] == pytest.approx(distance(made, real), rel=1e-4)
    assert again["frechet_data"] == "reference" and len(again) == 4
    other = image_features.Moments(np.zeros(3), np.eye(3))
    with pytest.raises(UserError, match="got 3 of them, toy has 2"):
        image_features.feature_distances(run, drawn, Means(), reference=other)
