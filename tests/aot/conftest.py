"""Tests here look at what XLA makes of a program, with all of its passes."""

import jax
import pytest

SWITCH = "jax_disable_most_optimizations"


@pytest.fixture(autouse=True)
def all_passes(monkeypatch):
    """As a user compiles, in this process and in programs that it starts."""
    monkeypatch.delenv(SWITCH.upper())
    before = jax.config.read(SWITCH)
    jax.config.update(SWITCH, False)
    yield
    jax.config.update(SWITCH, before)
