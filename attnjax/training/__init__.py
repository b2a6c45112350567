"""State, the pure step, the loop, optimizers, sharding, checkpoints, run directory."""
