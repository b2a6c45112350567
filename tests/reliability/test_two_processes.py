import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.training.checkpoint_reader import CheckpointReader

pytestmark = pytest.mark.reliability
PROGRAM = Path(__file__).parent / "two_processes.py"


def run_two(folder):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    programs = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), address, str(index), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    told = [program.communicate(timeout=200)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], told


def test_two_processes_save_one_checkpoint_that_any_number_reads(tmp_path):
    folder = tmp_path / "checkpoints"
    start = np.arange(24, dtype=np.float32).reshape(8, 3)
    run_two(folder)
    reader = CheckpointReader(folder)
    assert reader.latest().meta == {"processes": 2}
    assert reader.steps() == [3]
    np.testing.assert_array_equal(reader.restore_numpy(3)[0]["w"], start + 3)
    place = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    wanted = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=place)
    np.testing.assert_array_equal(reader.restore(3, {"w": wanted})[0]["w"], start + 3)
    run_two(folder)
    reader = CheckpointReader(folder)
    assert reader.steps() == [6]
    np.testing.assert_array_equal(reader.restore_numpy(6)[0]["w"], start + 6)
