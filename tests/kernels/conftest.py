"""What tests of the kernels ask of the compiler."""

import jax
import pytest


@pytest.fixture
def optimised():
    """For a test about what the compiler makes of the code."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def without_places():
    """For a test that compares programs: their text does not name lines of source."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)
