"""Predicted temporaries against the memory that the first step really takes.

Slow: about 2 GB and half a minute. Run by hand: pytest -m slow tests/planning.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import json, resource, sys
import jax, numpy as np, psutil
from attnjax.core import config as configs
from attnjax.planning import problem, targets
from attnjax.training import experiment, start
given = configs.load_file("configs/quickstart.py")
given = configs.apply_overrides(given, [("train.batch_size", "128")])
target = targets.parse("cpu:1")
targets.prepare(target)
here = problem.experiment(experiment.resolve(given), target, targets.devices(target))
program = problem.training(here)
compiled = program.jitted.lower(*program.arguments).compile()
predicted = compiled.memory_analysis().temp_size_in_bytes
state = start.new_state(here)
batch = {k: jax.device_put(np.ones(v.shape, v.dtype), v.sharding)
         for k, v in program.arguments[1].items()}
jax.block_until_ready((state, batch))
before = psutil.Process().memory_info().rss
state, metrics = compiled(state, batch)
jax.block_until_ready((state, metrics))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([predicted, after - before]))
"""


@pytest.mark.slow
def test_predicted_temporaries_are_the_growth_of_peak_memory():
    import psutil

    if psutil.virtual_memory().available < 4 << 30:
        pytest.skip("needs 4 GiB of free memory")
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    predicted, grown = json.loads(done.stdout.splitlines()[-1])
    print(f"predicted {predicted / 1e9:.3f} GB, grown {grown / 1e9:.3f} GB")
    assert predicted >= 1 << 30
    assert abs(predicted - grown) <= 0.15 * grown
