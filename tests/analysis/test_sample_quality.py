"""How good samples are, by the features of a classifier."""

import numpy as np
import pytest

from attnjax.analysis.sample_quality import frechet_distance, precision_recall


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
