"""What every test runs on: eight CPU devices, float32, programs compiled in haste.

Set before a backend starts. The settings also go into the environment, so that
programs which tests start see the same machine. Compiling is most of the suite's time,
and XLA is nearly twice as fast at it without its costly passes; tests of what XLA makes
of a program for another machine put them back (tests/aot/conftest.py).
"""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_enable_compilation_cache", False)

# Each compiled program is several mappings of memory, of which Linux gives a process
# 65,530; the compiler ends the process when there are no more.
MANY_MAPPINGS = 10_000


def pytest_runtest_teardown(item, nextitem):
    """Between files, let go of compiled programs where there are many."""
    if nextitem is not None and nextitem.path == item.path:
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
