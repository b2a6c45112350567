"""The short version of the suite, on each of a mechanism's VARIANTS."""

from attnjax.conformance import samples
from attnjax.conformance.checks import (
    declarations,
    decoding,
    gradients,
    isolation,
    outputs,
)
from attnjax.conformance.subject import Subject, subject


def short(s: Subject, changes: dict) -> None:
    """Shapes, isolation, gradients, counts and decoding under other options."""
    other = subject(s.module, changes)
    can = other.spec.capabilities
    outputs.shapes_and_dtypes(other)
    if can.causal:
        isolation.causality(other)
    if can.segments:
        isolation.padding(other)
        isolation.documents(other)
    gradients.parameter_gradients(other)
    gradients.input_gradients(other)
    declarations.parameter_count(other)
    if can.decode:
        decoding.state_size(other)
    if can.decode and other.spec.decode.exact:
        _token_by_token(decoding.exact(other))


def _token_by_token(s: Subject) -> None:
    x, ctx = samples.sample(s, "left", causal=True)
    decoding.expect_exact(s, x, ctx, [(1,) * s.length])
