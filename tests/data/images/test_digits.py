import sys

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data.images import config_class, num_classes, open_corpus
from attnjax.data.images.digits import Config, held_out_indices


@pytest.fixture(scope="module")
def corpus():
    return open_corpus(Config())


def test_the_split_is_fixed_and_disjoint(corpus):
    again = open_corpus(Config(image_size=16, channels=3))
    assert again.fingerprint == corpus.fingerprint
    train, held_out = (
        {image.tobytes() for image in split.reader.images}
        for split in (corpus.train, corpus.eval)
    )
    assert len(train) == 1438 and len(held_out) == 359
    assert not train & held_out


def test_the_choice_is_the_same_on_every_machine():
    chosen = held_out_indices(np.array([0, 1] * 10, np.int32), 0.3)
    assert chosen.tolist() == [4, 6, 9, 14, 15, 17]


def test_every_class_is_on_both_sides_in_its_share(corpus):
    counts = [
        np.bincount(split.reader.labels, minlength=10)
        for split in (corpus.train, corpus.eval)
    ]
    np.testing.assert_allclose(counts[1] / sum(counts), 0.2, atol=0.003)


def test_the_share_is_an_option_and_part_of_the_fingerprint(corpus):
    other = open_corpus(Config(eval_fraction=0.4))
    assert other.eval.num_images == pytest.approx(0.4 * 1797, abs=5)
    assert other.fingerprint != corpus.fingerprint
    with pytest.raises(UserError, match="eval_fraction must lie between 0 and 1"):
        Config(eval_fraction=1.0)


def test_pixels_are_scikit_learns(corpus):
    from sklearn.datasets import load_digits

    stored = load_digits().images
    expected = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in stored
    }
    assert {i.tobytes() for i in corpus.train.reader.images} < expected
    assert corpus.train.reader.images.max() == 255


def test_a_corpus_describes_itself(corpus):
    assert corpus.describe() == (
        "digits: 1438 images to train on, 359 held out, 8x8x1, 10 classes"
    )
    larger = open_corpus(Config(image_size=16, channels=3))
    assert "held out, 16x16x3 (from 8x8), 10 classes" in larger.describe()
    assert larger.train.read(np.arange(3))[0].shape == (3, 16, 16, 3)
    assert (corpus.image_size, corpus.channels, corpus.num_classes) == (8, 1, 10)
    assert corpus.provenance["splits"]["eval"] == {"num_images": 359}
    assert num_classes(config_class("digits")()) == 10


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        open_corpus(Config())
