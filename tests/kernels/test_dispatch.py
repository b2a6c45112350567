"""The entry point: choice of implementation, and every refusal."""

import jax
import jax.numpy as jnp
import pytest

from attnjax import kernels
from attnjax.kernels import Target

H200 = Target("gpu", "NVIDIA H200", "0.11.2")


def qkv(dtype=jnp.float32, *, b=1, t=8, s=8, h=4, kv=2, d=8, e=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(b, t, h, d), (b, s, kv, d), (b, s, kv, e)]
    return [jax.random.normal(k, x, dtype) for k, x in zip(keys, shapes, strict=True)]


def test_auto_takes_blocked_on_cpu_and_agrees_with_reference():
    q, k, v = qkv()
    spec = kernels.AttentionSpec(mask=kernels.Causal())
    assert kernels.explain(q, k, v, spec)[0] == "uses blocked on cpu"
    fast = kernels.attention(q, k, v, spec)
    slow = kernels.attention(q, k, v, spec, implementation="reference")
    assert jnp.allclose(fast, slow, atol=1e-6)


def test_auto_takes_cudnn_where_it_is_legal():
    arrays = qkv(jnp.bfloat16)
    spec = kernels.AttentionSpec(mask=kernels.Causal())
    assert kernels.explain(*arrays, spec, target=H200)[0] == "uses cudnn on gpu"


def test_unknown_implementation_lists_the_near_ones():
    with pytest.raises(ValueError, match="Did you mean blocked"):
        kernels.attention(*qkv(), implementation="bloked")
