"""Batch norm without factors."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn


def test_training_norms_by_the_batch_and_remembers_it():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(7, 5)).astype(np.float32)
    y, running = nn.batch_norm(jnp.asarray(x), nn.batch_statistics(5), train=True)
    wanted = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    np.testing.assert_allclose(running["mean"], 0.1 * x.mean(0), rtol=1e-5)
    sample = 0.9 + 0.1 * x.var(0, ddof=1)
    np.testing.assert_allclose(running["variance"], sample, rtol=1e-5)


def test_evaluation_norms_by_what_it_remembers():
    running = {"mean": jnp.full(3, 2.0), "variance": jnp.full(3, 4.0)}
    x = jnp.arange(6.0).reshape(2, 3)
    y, after = nn.batch_norm(x, running, train=False)
    np.testing.assert_allclose(y, (x - 2) / 2, atol=1e-5)
    assert after is running


def test_no_gradient_goes_through_what_is_remembered():
    def remembered(x):
        return nn.batch_norm(x, nn.batch_statistics(3), train=True)[1]["mean"].sum()

    x = jnp.arange(6.0).reshape(2, 3)
    assert not jax.grad(remembered)(x).any()


def test_a_narrow_input_is_normed_wide():
    x = jnp.ones((4, 2), jnp.bfloat16) * jnp.asarray([1.0, 300.0], jnp.bfloat16)
    y, running = nn.batch_norm(x, nn.batch_statistics(2), train=True)
    assert y.dtype == jnp.bfloat16 and running["mean"].dtype == jnp.float32
    assert not y.any()


def test_a_narrow_model_remembers_wide_statistics():
    layer = nn.BatchNorm(2, dtype="bfloat16", rngs=nnx.Rngs(0))
    layer(jnp.full((4, 2), 3.0, jnp.bfloat16), train=True)
    for one, wanted in ((layer.mean, 0.03), (layer.variance, 0.99)):
        assert one[...].dtype == jnp.float32
        np.testing.assert_allclose(one[...], wanted, rtol=1e-6)
