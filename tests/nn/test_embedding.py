"""The embedding table, looked up and as a tied head."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn


def test_lookup_takes_rows():
    layer = nn.Embedding(11, 5, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[3, 0, 10], [7, 7, 1]])
    table = np.asarray(layer.table[...])
    np.testing.assert_array_equal(layer(ids), table[np.asarray(ids)])


def test_attend_multiplies_with_the_table():
    layer = nn.Embedding(11, 5, std=1.0, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    expected = np.einsum("btc,vc->btv", x, layer.table[...])
    np.testing.assert_allclose(layer.attend(x), expected, rtol=1e-5, atol=1e-5)


def test_a_token_attends_most_to_itself_through_orthogonal_rows():
    layer = nn.Embedding(5, 5, rngs=nnx.Rngs(0))
    layer.table.set_value(jnp.eye(5))
    logits = layer.attend(layer(jnp.arange(5)))
    np.testing.assert_array_equal(jnp.argmax(logits, -1), jnp.arange(5))


def test_dtypes():
    layer = nn.Embedding(11, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.table[...].dtype == jnp.float32
    assert layer(jnp.arange(3)).dtype == jnp.bfloat16
    assert layer.attend(jnp.ones((2, 5))).dtype == jnp.bfloat16
