"""Stands in for the Python of a batch script: adds one number a process over gloo.

Reads what train_multinode.sbatch exports, as the training does.
"""

import os
import shlex
import sys

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils


def main() -> None:
    """Print which process this is, of how many, and the sum of 1, 2, ..."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    index = int(os.environ["JAX_PROCESS_ID"])
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"],
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
        process_id=index,
    )
    numbers = multihost_utils.process_allgather(jnp.asarray(index + 1))
    words = shlex.join(sys.argv[1:])
    print(
        f"{index} of {jax.process_count()}: {int(numbers.sum())} for {words}\n", end=""
    )
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
