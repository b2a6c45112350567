"""Dtype names that configs may use."""

import jax.numpy as jnp

from attnjax.core.errors import unknown

DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float64": jnp.float64,
}


def dtype_of(name: str, *, owner: str = "config"):
    """The dtype called `name`; an unknown name lists the known ones."""
    if name not in DTYPES:
        raise unknown(owner, "dtype", name, DTYPES)
    return DTYPES[name]
