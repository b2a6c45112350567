"""How a check says that a mechanism breaks its word."""

import jax
import numpy as np


class ViolationError(AssertionError):
    """A mechanism does not do what every mechanism must, or what it declares."""


class NotApplicableError(Exception):
    """A check cannot be made here; the text says why."""


def expect(condition, message: str) -> None:
    """Raise ViolationError with `message` unless `condition` holds."""
    if not condition:
        raise ViolationError(message)


def wide(array) -> np.ndarray:
    """Any array as numpy float64, so that differences are exact."""
    return np.asarray(jax.device_get(array)).astype(np.float64)


def difference(a, b) -> float:
    """Largest absolute difference; infinite where a number is not finite."""
    a, b = wide(a), wide(b)
    if a.size == 0:
        return 0.0
    gap = np.abs(a - b)
    return float(np.max(np.where(np.isfinite(gap), gap, np.inf)))


def expect_equal(a, b, rule: str, *, atol: float) -> None:
    """Raise ViolationError unless a equals b within atol times their size.

    The size is the largest entry of b, at least 1.
    """
    b = wide(b)
    scale = max(1.0, float(np.max(np.abs(b), initial=0.0)))
    gap = difference(a, b)
    expect(
        gap <= atol * scale,
        f"{rule}; got a difference of {gap:.3g}, allowed {atol * scale:.3g}.",
    )


def expect_trees_equal(a, b, rule: str, *, atol: float) -> None:
    """`expect_equal` on every leaf; the message names the leaf."""
    rows = jax.tree_util.tree_leaves_with_path(a)
    others = jax.tree.leaves(b)
    expect(
        jax.tree.structure(a) == jax.tree.structure(b),
        f"{rule}; got {jax.tree.structure(a)} and {jax.tree.structure(b)}.",
    )
    for (path, one), other in zip(rows, others, strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        expect_equal(one, other, f"{rule} ({where})", atol=atol)


def expect_changed(a, b, rule: str, *, least: float = 1e-5) -> None:
    """Raise ViolationError unless a and b differ by at least `least` somewhere."""
    gap = difference(a, b)
    expect(
        np.isfinite(gap) and gap >= least,
        f"{rule}; got a difference of {gap:.3g}.",
    )


def expect_finite(array, rule: str) -> None:
    """Raise ViolationError at the first NaN or infinity."""
    bad = ~np.isfinite(wide(array))
    expect(
        not bad.any(),
        f"{rule}; got {int(bad.sum())} of {bad.size} not finite, the first at "
        f"{tuple(int(i[0]) for i in np.nonzero(bad)) if bad.any() else ()}.",
    )
