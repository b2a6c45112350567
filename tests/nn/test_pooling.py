"""Attentive pooling: the facts of efficient probing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn

B, N, C, M = 2, 7, 12, 3


@pytest.fixture(scope="module")
def pool():
    return nn.AttentivePool(C, M, query_std=1.0, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, N, C))


def test_it_is_its_definition(pool, x):
    query, value = np.float64(pool.query[...]), np.float64(pool.value.kernel[...])
    tokens = np.float64(x)
    wanted = np.zeros((B, C))
    for b in range(B):
        for j in range(M):
            scores = np.exp(tokens[b] @ query[j] / np.sqrt(C))
            block = slice(j * C // M, (j + 1) * C // M)
            wanted[b, block] = scores / scores.sum() @ (tokens[b] @ value)[:, block]
    np.testing.assert_allclose(pool(x), wanted, atol=1e-5)
    np.testing.assert_allclose(pool.weights(x).sum(-1), 1.0, atol=1e-6)


def test_order_of_tokens_does_not_matter_and_masked_ones_do_not_count(pool, x):
    np.testing.assert_allclose(pool(x[:, ::-1]), pool(x), atol=1e-5)
    mask = jnp.arange(N)[None] < 4
    np.testing.assert_allclose(pool(x, mask), pool(x[:, :4]), atol=1e-5)


def test_zero_queries_average_and_with_the_identity_that_is_all(pool, x):
    graph, state = nnx.split(pool)
    plain = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    plain.query[...] = jnp.zeros((M, C))
    np.testing.assert_allclose(plain(x), plain.value(x).mean(1), atol=1e-6)
    plain.value.kernel[...] = jnp.eye(C)
    np.testing.assert_allclose(plain(x), x.mean(1), atol=1e-6)


def test_a_query_moves_its_own_channels_only(pool, x):
    graph, state = nnx.split(pool)
    arrays = nnx.to_pure_dict(state)

    def run(query):
        return nnx.merge(graph, arrays | {"query": query})(x)

    jacobian = jax.jit(jax.jacobian(run))(pool.query[...])  # [B, C, M, C]
    moved = np.abs(jacobian).max(axis=(0, 3)).reshape(M, C // M, M)
    for j in range(M):
        assert (moved[j, :, j] > 1e-4).all()
        assert (np.delete(moved[j], j, axis=1) == 0).all()


def test_cross_attention_with_one_latent_is_the_same_with_other_queries(pool, x):
    """Heads of width C / M: W_k of head j times its query is one C-vector."""
    rng = np.random.default_rng(0)
    latent, to_query, to_key = rng.normal(size=(C,)), *rng.normal(size=(2, C, C))
    width = C // M
    heads = (latent @ to_query).reshape(M, width)
    keys = (np.asarray(x) @ to_key).reshape(B, N, M, width)
    scores = np.einsum("mw,bnmw->bmn", heads, keys) / np.sqrt(width)
    value = np.asarray(pool.value(x)).reshape(B, N, M, width)
    wanted = np.einsum("bmn,bnme->bme", jax.nn.softmax(scores, -1), value)
    graph, state = nnx.split(pool)
    same = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    folded = np.einsum("cmw,mw->mc", to_key.reshape(C, M, width), heads)
    same.query[...] = jnp.asarray(folded * np.sqrt(C / width), jnp.float32)
    np.testing.assert_allclose(same(x), wanted.reshape(B, C), atol=1e-4)


def test_parameters_are_counted_as_in_the_paper():
    sizes = nnx.eval_shape(lambda: nn.AttentivePool(768, 32, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(sizes))
    assert sum(np.prod(leaf.shape) for leaf in leaves) == 614_400
    narrow = nnx.eval_shape(
        lambda: nn.AttentivePool(768, 32, out_dim=192, rngs=nnx.Rngs(0))
    )
    assert narrow.value.kernel.shape == (768, 192)


def test_queries_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="queries=5, out_dim=12"):
        nn.AttentivePool(C, 5, rngs=nnx.Rngs(0))
