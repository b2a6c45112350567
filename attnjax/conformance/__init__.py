"""The suite that every token mixer passes, inside the package or outside it.

    python -m attnjax.conformance linear_attention
    python -m attnjax.conformance path/my_mixer.py

`run(name, path or module) -> Report`; `cases(module) -> list[Case]` for pytest.
"""

from attnjax.conformance.expect import NotApplicableError, ViolationError
from attnjax.conformance.subject import Settings
from attnjax.conformance.suite import Case, Report, Result, cases, run

__all__ = [
    "Case",
    "NotApplicableError",
    "Report",
    "Result",
    "Settings",
    "ViolationError",
    "cases",
    "run",
]
