"""Means and paired differences, against closed forms and scipy's own test."""

import math

import numpy as np
import pytest
from scipy import stats

from attnjax.studies.statistics import Spread, paired, spread


def test_mean_and_sample_deviation_of_three_numbers():
    assert spread([1.0, 2.0, 6.0]) == Spread(3, 3.0, math.sqrt(7.0))


def test_one_value_has_no_deviation_and_none_has_nothing():
    assert spread([2.5]) == Spread(1, 2.5, None)
    assert spread([]) is None


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 11):
        base = rng.normal(3.0, 0.5, size)
        row = base + rng.normal(-0.1, 0.2, size)
        theirs = stats.ttest_rel(row, base)
        interval = theirs.confidence_interval(0.95)
        ours = paired(dict(enumerate(row)), dict(enumerate(base)))
        assert ours.n == size
        np.testing.assert_allclose(
            [ours.mean, ours.p, ours.low, ours.high],
            [(row - base).mean(), theirs.pvalue, interval.low, interval.high],
            rtol=1e-12,
        )


def test_two_pairs_by_hand():
    # t with one degree of freedom is Cauchy: its 97.5 % quantile is tan(0.475 pi),
    # and P(|t| > x) is 1 - 2 atan(x) / pi.
    ours = paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert (ours.n, ours.mean) == (2, 2.0)
    reach = math.tan(0.475 * math.pi)
    assert ours.high == pytest.approx(2.0 + reach, rel=1e-12)
    assert ours.low == pytest.approx(2.0 - reach, rel=1e-12)
    assert ours.p == pytest.approx(1 - 2 * math.atan(2.0) / math.pi, rel=1e-12)


def test_only_seeds_that_both_have_are_paired():
    ours = paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.0, 0: 0.5, 9: -50.0})
    assert (ours.n, ours.mean) == (2, 0.75)


def test_pairs_go_by_seed_and_not_by_order():
    row, base = {0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 0.0, 1: 4.0}
    assert paired(row, base).mean == 1.0


def test_one_pair_has_no_interval():
    ours = paired({3: 1.0}, {3: 0.25})
    assert (ours.n, ours.mean, ours.low, ours.high, ours.p) == (1, 0.75, *[None] * 3)


def test_no_common_seed_is_no_difference():
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_equal_differences_leave_no_doubt():
    none = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (none.low, none.high, none.p) == (0.0, 0.0, 1.0)
    some = paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert (some.low, some.high, some.p) == (0.5, 0.5, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_has_no_interval(bad):
    ours = paired({0: bad, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert not math.isfinite(ours.mean)
    assert (ours.low, ours.high, ours.p) == (None, None, None)


def test_a_diverged_run_leaves_a_mean_and_no_deviation():
    found = spread([1.0, math.inf])
    assert (found.n, found.mean, found.sd) == (2, math.inf, None)
