"""One of two processes that save and restore one state together.

python tests/reliability/two_processes.py COORDINATOR INDEX FOLDER
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.training.checkpoints import Checkpointer


def main(coordinator: str, index: int, folder: str) -> None:
    """Restore what is there, add one to it, and save it as the next step."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=index)
    mesh = jax.make_mesh((4,), ("data",))
    place = NamedSharding(mesh, P("data"))
    with Checkpointer(folder, keep_last=1) as saver:
        found = saver.latest()
        if found is None:
            step, value = 0, np.arange(24, dtype=np.float32).reshape(8, 3)
            state = {
                "w": jax.make_array_from_callback((8, 3), place, lambda i: value[i])
            }
        else:
            step = found.step
            wanted = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=place)
            state, _ = saver.restore(step, {"w": wanted})
        advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
        for _ in range(3):
            step, state = step + 1, advance(state)
            saver.save(step, state, {"processes": jax.process_count()})
        saver.wait()
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
