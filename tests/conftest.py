"""What every test runs on: eight CPU devices, float32, loud rank promotion.

Set before a backend starts. The settings also go into the environment, so that
programs which tests start see the same machine.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_enable_compilation_cache", False)
