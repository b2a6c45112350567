"""What every test runs on: eight CPU devices, float32, programs compiled in haste.

Set before a backend starts. The settings also go into the environment, so that
programs which tests start see the same machine. Compiling is most of the suite's time,
and XLA is nearly twice as fast at it without its costly passes; tests of what XLA makes
of a program for another machine put them back (tests/aot/conftest.py). XLA's older way
to write fused loops compiles in a third of the time of the newer one, and a program
written in one piece sooner than in many.
"""

import gc
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA ends a process that is given a flag which it does not know: another version, and
# the compiler for TPUs, which reads them too, knows none of the CPU's.
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_enable_compilation_cache", False)

TESTS = pytest.StashKey[list]()

# Each compiled program is several mappings of memory, of which Linux gives a process
# 65,530; the compiler ends the process when there are no more.
MANY_MAPPINGS, TOO_MANY = 10_000, 40_000
LOOK_EVERY = 25

# Tracing makes many objects and few cycles: Python looks for those less often.
gc.set_threshold(100_000, 20, 50)


def pytest_collection_finish():
    """What is imported stays, so it is never searched for cycles."""
    gc.freeze()


@pytest.fixture(scope="module")
def shared_programs(tmp_path_factory):
    """Programs of a file are compiled once where they are the same: for files that
    train the same model in several runs."""
    folder = str(tmp_path_factory.mktemp("programs"))
    settings = [
        ("jax_enable_compilation_cache", True, False),
        ("jax_compilation_cache_dir", folder, None),
        ("jax_persistent_cache_min_compile_time_secs", 0.0, 1.0),
    ]
    for name, now, _ in settings:
        jax.config.update(name, now)
    compilation_cache.reset_cache()
    yield
    for name, _, before in settings:
        jax.config.update(name, before)
    compilation_cache.reset_cache()


def pytest_runtest_teardown(item, nextitem):
    """Let go of compiled programs: between files where there are many, inside of one
    where there would soon be too many."""
    between = nextitem is None or nextitem.path != item.path
    state = item.session.stash.setdefault(TESTS, [0])
    state[0] += 1
    if not between and state[0] % LOOK_EVERY:
        return
    maps = Path("/proc/self/maps")
    allowed = MANY_MAPPINGS if between else TOO_MANY
    if maps.exists() and maps.read_bytes().count(b"\n") > allowed:
        jax.clear_caches()
        gc.collect()
