"""Samplers, generation over mixer states, and opening a run."""
