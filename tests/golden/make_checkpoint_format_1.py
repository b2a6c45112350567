"""Makes checkpoint_format_1: what version 0.1.0 writes, to be read forever.

python tests/golden/make_checkpoint_format_1.py
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax.numpy as jnp

from attnjax.training.checkpoints import Checkpointer


def state() -> dict:
    """Every kind of leaf and node that a checkpoint may hold."""
    return {
        "params": {"kernel": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7},
        "opt": ({"count": jnp.int32(5)}, {}),
        "half": jnp.array([0.5, -1.25], jnp.bfloat16),
        "empty": jnp.zeros((0, 4), jnp.float32),
        "flag": jnp.array(True),
        "a/b.c%": jnp.arange(3, dtype=jnp.uint8),
    }


def main() -> None:
    """Write the directory anew."""
    folder = Path(__file__).parent / "checkpoint_format_1"
    shutil.rmtree(folder, ignore_errors=True)
    # Orbax notes the place it wrote to; this one says nothing about the machine.
    with tempfile.TemporaryDirectory() as temporary:
        with Checkpointer(temporary) as saver:
            saver.save(3, state(), {"layout": {"names": ["attention"]}}, metric=1.5)
        shutil.copytree(temporary, folder)


if __name__ == "__main__":
    main()
