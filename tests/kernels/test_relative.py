"""Biases by distance: the two ways through a tile agree, and T5's buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import RelativeBias

H, REACH = 2, 4


def tile(first_q, first_k, size, table, *, contiguous):
    t, s = size
    return kernels.Tile(
        b=jnp.zeros((1, 1, 1, 1), jnp.int32),
        h=jnp.arange(H, dtype=jnp.int32)[None, :, None, None],
        q=(first_q + jnp.arange(t, dtype=jnp.int32))[None, None, :, None],
        k=(first_k + jnp.arange(s, dtype=jnp.int32))[None, None, None, :],
        operands={"relative_bias": table},
        contiguous=contiguous,
    )


@pytest.mark.parametrize("place", [(0, 0, (3, 5)), (7, 2, (5, 3)), (0, 9, (1, 4))])
def test_both_ways_through_a_tile_agree_with_the_table(place):
    first_q, first_k, (t, s) = place
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(H, 2 * REACH + 1)), jnp.float32)
    s_in = jnp.asarray(rng.normal(size=(1, H, t, s)), jnp.float32)
    distance = first_q + np.arange(t)[:, None] - first_k - np.arange(s)
    steps = np.clip(distance, -REACH, REACH) + REACH
    weight = rng.normal(size=s_in.shape).astype(np.float32)
    slope = np.zeros_like(table)
    for h, i, j in np.ndindex(H, t, s):
        slope[h, steps[i, j]] += weight[0, h, i, j]
    for contiguous in (True, False):

        def total(table, contiguous=contiguous):
            where = tile(*place, table, contiguous=contiguous)
            out = RelativeBias(REACH).apply(s_in, where)
            return jnp.sum(out * weight), out

        got, out = jax.grad(total, has_aux=True)(table)
        np.testing.assert_allclose(out, s_in + table[:, steps], atol=1e-6)
        np.testing.assert_allclose(got, slope, atol=1e-5)


def test_t5_buckets_are_the_published_ones():
    def bucket(distance, *, bidirectional):
        table = kernels.t5_buckets(
            200, num_buckets=32, max_distance=128, bidirectional=bidirectional
        )
        return table[200 + distance]

    causal = {0: 0, 1: 1, 15: 15, 16: 16, 32: 21, 64: 26, 127: 31, 200: 31, -5: 0}
    for distance, wanted in causal.items():
        assert bucket(distance, bidirectional=False) == wanted
    both = {0: 0, 7: 7, 8: 8, 16: 10, 127: 15, -1: 17, -8: 24, -200: 31}
    for distance, wanted in both.items():
        assert bucket(distance, bidirectional=True) == wanted


def test_t5_bias_reaches_beyond_its_last_bucket():
    """Distances past max_distance share a bucket: a table that ends there is whole."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(8, H)), jnp.float32)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 23, H, 4)), jnp.float32) for _ in "qkv")
    operand = kernels.t5_bias(table, max_distance=9)
    assert operand.shape == (H, 19)
    spec = kernels.AttentionSpec(score=RelativeBias(9))
    got = kernels.attention(q, k, v, spec, {"relative_bias": operand})
    buckets = kernels.t5_buckets(22, num_buckets=8, max_distance=9, bidirectional=True)
    bias = table.T[:, buckets[22 + np.arange(23)[:, None] - np.arange(23)]]
    wanted = kernels.attention(
        q, k, v, kernels.AttentionSpec(score=kernels.Bias()), {"bias": bias[None]}
    )
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_tables_and_reaches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="reach must be an integer >= 0; got reach=-1"):
        RelativeBias(-1)
    q, spec = jnp.ones((1, 5, H, 4)), kernels.AttentionSpec(score=RelativeBias(3))
    with pytest.raises(ValueError, match="2 reach . 1 = 7 distances"):
        kernels.attention(q, q, q, spec, {"relative_bias": jnp.ones((H, 5))})
    with pytest.raises(ValueError, match=r"\[H, R\] = \(2, 'any'\)"):
        kernels.attention(q, q, q, spec, {"relative_bias": jnp.ones((3, 7))})
