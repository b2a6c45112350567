"""Numbers as texts: the spread decides how many digits a mean has."""

import math

from attnjax.studies.statistics import Difference, Spread


def decimals(error: float | None, value: float) -> int:
    """Digits behind the point: two significant ones of the error, at most 6.

    Without an error, four significant digits of the value.
    """
    scale = error if error else None
    wanted = 2 if scale else 4
    scale = scale or abs(value)
    if not scale or not math.isfinite(scale):
        return 4
    return min(6, max(0, wanted - 1 - math.floor(math.log10(scale))))


def mean(spread: Spread | None) -> str:
    """ "1.9076 ± 0.0062 (5)"; one repetition has no spread."""
    if spread is None:
        return ""
    if not math.isfinite(spread.mean):
        return f"{spread.mean} ({spread.n})"
    places = decimals(spread.sd, spread.mean)
    text = f"{spread.mean:.{places}f}"
    if spread.sd is not None:
        text += f" ± {spread.sd:.{places}f}"
    return f"{text} ({spread.n})"


def difference(gap: Difference | None) -> str:
    """ "-0.0120 [-0.0200, -0.0040]", or "n=1" for the interval of one pair."""
    if gap is None:
        return ""
    if gap.low is None or gap.high is None:
        return f"{signed(gap.mean, decimals(None, gap.mean))} [n={gap.n}]"
    places = decimals((gap.high - gap.low) / 2, gap.mean)
    low, high = signed(gap.low, places), signed(gap.high, places)
    return f"{signed(gap.mean, places)} [{low}, {high}]"


def p_value(gap: Difference | None) -> str:
    """Two significant digits; "<0.0001" below."""
    if gap is None or gap.p is None:
        return ""
    if gap.p < 1e-4:
        return "<0.0001"
    return f"{gap.p:.2g}"


def signed(value: float, places: int) -> str:
    """A number with its sign always shown."""
    return f"{value:+.{places}f}"


def cost(value: float | None) -> str:
    """A cost: thousands apart, three digits of small ones."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
