"""What every test runs on: eight CPU devices, float32, programs compiled in haste.

Set before a backend starts. The settings also go into the environment, so that
programs which tests start see the same machine. Compiling is most of the suite's time,
and XLA is nearly twice as fast at it without its costly passes; tests of what XLA makes
of a program for another machine put them back (tests/aot/conftest.py).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_enable_compilation_cache", False)
