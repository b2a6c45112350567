"""Compilation is most of these tests' time, so it is told to hurry."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation(request):
    hurried = "optimised" not in request.fixturenames
    jax.config.update("jax_disable_most_optimizations", hurried)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimised():
    """For a test about what the compiler makes of the code."""
