"""How good samples are, by the features of a classifier."""

import types

import numpy as np
import pytest
import scipy.linalg

from attnjax.analysis import sample_quality
from attnjax.analysis.sample_quality import frechet_distance, precision_recall
from attnjax.data import images


def spread(means, stds, seed, count=4):
    """Points whose mean and covariance are exactly those wanted."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count * len(means), len(means)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x * np.asarray(stds) + np.asarray(means)


def test_the_distance_of_axis_aligned_sets_has_its_closed_form():
    one = spread([0.0, 1.0, 2.0], [1.0, 2.0, 0.5], 0)
    other = spread([1.0, 1.0, 0.0], [3.0, 2.0, 1.5], 1)
    wanted = (1 + 0 + 4) + (2.0**2 + 0 + 1.0**2)
    assert frechet_distance(one, other) == pytest.approx(wanted)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)


def test_the_distance_does_not_see_a_common_turn():
    one, other = spread([0, 1], [1, 2], 0), spread([1, 1], [3, 1], 1)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(2, 2)))
    wanted = frechet_distance(one, other)
    assert frechet_distance(one @ turn, other @ turn) == pytest.approx(wanted)
    # Not a sum over axes any more, and fewer points than features will do.
    few = np.random.default_rng(3).normal(size=(3, 5))
    assert frechet_distance(few, few + 2.0) == pytest.approx(5 * 4.0)


def test_precision_and_recall_count_neighbourhoods():
    line = np.arange(10.0)[:, None]
    assert precision_recall(line, line) == (1.0, 1.0)
    # Half of the samples are far away, and the others cover half of the data.
    made = np.concatenate([line[:5], line[:5] + 1000.0])
    precision, recall = precision_recall(line, made, neighbours=1)
    assert precision == 0.5
    assert recall == 0.6  # 0 to 4, and 5 at the distance of a neighbour
    with pytest.raises(ValueError, match="got 3 and 10, neighbours=3"):
        precision_recall(line[:3], line)


# ---- against the formulas written out


def correlated(seed, count, features=5):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(features, features))
    return rng.normal(size=(count, features)) @ mixed + rng.normal(size=features)


def test_the_distance_is_that_of_a_root_of_the_product():
    one, other = correlated(0, 31).astype(np.float32), correlated(1, 23)
    first, second = np.cov(one.T.astype(np.float64)), np.cov(other.T)
    gap = one.mean(0, dtype=np.float64) - other.mean(0)
    # A root of a product that is not symmetric, as the papers' own codes take it.
    root = scipy.linalg.sqrtm(first @ second)
    wanted = gap @ gap + np.trace(first + second - 2 * root.real)
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(wanted, rel=1e-9)


def share_by_loops(points, others, neighbours):
    """The share of the others within a point's distance to its k-th neighbour."""
    inside = 0
    for other in others:
        for i, point in enumerate(points):
            rest = [np.linalg.norm(point - p) for j, p in enumerate(points) if j != i]
            radius = sorted(rest)[neighbours - 1]
            if np.linalg.norm(other - point) <= radius:
                inside += 1
                break
    return inside / len(others)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_those_of_loops_over_points(neighbours):
    rng = np.random.default_rng(4)
    real, made = rng.normal(size=(17, 2)), 1.5 + 1.1 * rng.normal(size=(13, 2))
    found = precision_recall(real, made, neighbours=neighbours)
    wanted = (
        share_by_loops(real, made, neighbours),
        share_by_loops(made, real, neighbours),
    )
    assert found == pytest.approx(wanted)
    low, high = sorted(wanted)
    assert 0 < low < high < 1


def test_distances_are_taken_a_few_rows_at_a_time(monkeypatch):
    rng = np.random.default_rng(4)
    real, made = rng.normal(size=(23, 3)), 1.5 * rng.normal(size=(17, 3))
    wanted = precision_recall(real, made)
    monkeypatch.setattr(sample_quality, "ROWS", 5)
    assert precision_recall(real, made) == wanted


def test_endless_data_are_taken_so_many():
    config = images.config_class("glyphs")(name="glyphs", chars="ab", image_size=8)
    corpus = images.open_corpus(config)
    assert corpus.train.num_images is None
    taken = sample_quality._all(corpus.train)
    assert taken.shape == (sample_quality.OF_ENDLESS, 8, 8, 1)


def test_every_part_of_the_samples_has_noise_of_its_own(monkeypatch):
    seeds = []

    class Denoiser:
        class_names = ("a", "b")

        def draw(self, labels, *, seed):
            seeds.append(seed)
            return np.zeros((len(labels), 1))

    monkeypatch.setattr(sample_quality, "AT_ONCE", 3)
    monkeypatch.setattr(sample_quality, "Judge", lambda *runs: None)
    sets = (np.zeros((4, 1)), np.ones((4, 1)))
    monkeypatch.setattr(sample_quality, "data_features", lambda judge: sets)
    shown = []
    monkeypatch.setattr(
        sample_quality,
        "compared",
        lambda judge, images, labels, *, real: (
            shown.append((len(images), labels)) or {}
        ),
    )
    for seed in (0, 3):  # The second part of one begins where the other does.
        sample_quality.judged(Denoiser(), None, per_class=4, seed=seed)
    assert len(seeds) == len(set(seeds)) == 6
    assert shown[0][0] == 8 and shown[0][1].tolist() == [0] * 4 + [1] * 4


def test_a_judge_sees_samples_normalised_as_its_own_images(monkeypatch):
    def run(mean, std):
        data = {"name": "digits", "mean": [mean], "std": [std]}
        return types.SimpleNamespace(
            config={"data": data}, model=None, params=None, buffers=None
        )

    judge = object.__new__(sample_quality.Judge)
    object.__setattr__(judge, "classifier", run(0.4, 0.25))
    object.__setattr__(judge, "denoiser", run(0.2, 0.5))

    def looks(model, params, buffers, part):
        logits = np.asarray([[0.0, np.log(3.0)]] * len(part))
        return np.asarray(part).reshape(len(part), -1), logits

    monkeypatch.setattr(sample_quality, "_looks", looks)
    monkeypatch.setattr(sample_quality, "AT_ONCE", 2)
    drawn = np.asarray([-1.0, 0.0, 2.0]).reshape(3, 1, 1, 1)
    features, named = judge.look(drawn)
    pixels = np.asarray([-0.3, 0.2, 1.2])
    np.testing.assert_allclose(features[:, 0], (pixels - 0.4) / 0.25, rtol=1e-6)
    np.testing.assert_array_equal(named, [1, 1, 1])
    told = judge.log_probabilities(drawn, [0, 1, 1])
    np.testing.assert_allclose(np.exp(told), [0.25, 0.75, 0.75], rtol=1e-6)


def test_samples_are_compared_with_the_training_images(monkeypatch):
    """Of the half-far samples above: precision is not recall."""
    line = np.arange(10.0)[:, None]
    made = np.concatenate([line[:5], line[:5] + 1000.0])
    held_out = line + 3.0
    monkeypatch.setattr(sample_quality, "_all", lambda split: split)
    corpus = types.SimpleNamespace(train=line, eval=held_out)
    judge = types.SimpleNamespace(
        denoiser=types.SimpleNamespace(feed=types.SimpleNamespace(corpus=corpus)),
        look=lambda images: (images, (images[:, 0] > 100).astype(int)),
    )
    labels = np.asarray([0] * 4 + [1] * 6)
    found = sample_quality.judged_samples(judge, made, labels)
    precision, recall = precision_recall(line, made)
    assert precision != recall
    assert (found["precision"], found["recall"]) == (precision, recall)
    assert (found["samples"], found["named"]) == (10, 0.9)
    assert found["frechet"] == pytest.approx(frechet_distance(made, line))
    assert found["frechet_held_out"] == pytest.approx(9.0)
