"""Numbers as texts."""

import math

import pytest

from attnjax.studies import numbers
from attnjax.studies.statistics import Difference, Spread


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread(5, 1.907612, 0.00623), "1.9076 ± 0.0062 (5)"),
        (Spread(3, 1907.612, 62.3), "1908 ± 62 (3)"),
        (Spread(1, 1.907612, None), "1.908 (1)"),
        (Spread(2, 2.0, 0.0), "2.000 ± 0.000 (2)"),
        (Spread(2, math.nan, None), "nan (2)"),
        (None, ""),
    ],
)
def test_the_spread_decides_the_digits(spread, text):
    assert numbers.mean(spread) == text


@pytest.mark.parametrize(
    ("gap", "text"),
    [
        (Difference(5, -0.012, -0.02, -0.004, 0.01), "-0.0120 [-0.0200, -0.0040]"),
        (Difference(1, 0.01234, None, None, None), "+0.01234 [n=1]"),
        (None, ""),
    ],
)
def test_differences_have_signs_and_intervals(gap, text):
    assert numbers.difference(gap) == text


@pytest.mark.parametrize(
    ("p", "text"), [(0.0123, "0.012"), (1e-9, "<0.0001"), (0.5, "0.5"), (None, "")]
)
def test_small_p_values_are_bounded(p, text):
    assert numbers.p_value(Difference(3, 0.1, 0.0, 0.2, p)) == text


def test_a_difference_that_is_not_finite_is_shown():
    assert numbers.difference(Difference(2, math.inf, None, None, None)) == "+inf [n=2]"


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (1234567.0, "1,234,567"), (12.3456, "12.35")]
)
def test_costs(value, text):
    assert numbers.cost(value) == text
