"""Means over seeds, and differences between rows with the same seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repetitions of one number.

    Attributes:
        n: how many.
        mean: their mean.
        sd: sample standard deviation (n - 1), None for one repetition or a mean that
            is not finite.
    """

    n: int
    mean: float
    sd: float | None


@dataclasses.dataclass(frozen=True)
class Difference:
    """Paired differences of a row to the baseline.

    Attributes:
        n: pairs (seeds that both have).
        mean: of row minus baseline.
        low, high: ends of the 95 % interval of Student's t, None for one pair.
        p: two-sided p-value of a mean difference of zero, None for one pair.

    A difference that is not finite (a run diverged) has neither interval nor p.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None of no values."""
    if not len(values):
        return None
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    judged = len(array) > 1 and math.isfinite(mean)
    return Spread(len(array), mean, float(array.std(ddof=1)) if judged else None)


def paired(
    row: Mapping[object, float], baseline: Mapping[object, float]
) -> Difference | None:
    """Compare two rows on the seeds that both have.

    Args:
        row: seed -> value.
        baseline: seed -> value.

    Returns:
        None where no seed is common. With equal differences in all pairs there is no
        spread to judge by: the interval is the mean, p is 1 for a mean of zero and 0
        otherwise.
    """
    common = sorted(row.keys() & baseline.keys(), key=str)
    if not common:
        return None
    gaps = np.asarray([row[s] - baseline[s] for s in common], np.float64)
    n, mean = len(gaps), float(gaps.mean())
    if n == 1:
        return Difference(1, mean, None, None, None)
    if not math.isfinite(mean):
        return Difference(n, mean, None, None, None)
    error = float(gaps.std(ddof=1)) / math.sqrt(n)
    if error == 0.0:
        return Difference(n, mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Difference(n, mean, mean - reach, mean + reach, p)
