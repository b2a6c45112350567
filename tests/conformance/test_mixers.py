"""Every mechanism of the catalog against everything that it declares."""

import pytest

from attnjax.conformance import NotApplicableError, cases
from attnjax.core import discovery


def rows():
    """(mechanism, case) of every mechanism; one that does not load is a failure."""
    for name in discovery.names():
        try:
            listed = cases(discovery.find(name))
        except Exception as error:
            yield pytest.param(error, id=f"{name}-loads")
            continue
        for case in listed:
            yield pytest.param(case.check, id=f"{name}-{case.id}")


@pytest.mark.parametrize("check", list(rows()))
def test_conformance(check):
    if isinstance(check, Exception):
        raise check
    try:
        check()
    except NotApplicableError as reason:
        pytest.skip(str(reason))
