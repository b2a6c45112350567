"""The oracle against loops over rows in plain numpy, and against `jax.nn`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels

B, T, S, H, K, D, E = 2, 5, 7, 4, 2, 3, 2


def attend(q, k, v, spec, operands=None):
    return kernels.attention(q, k, v, spec, operands, implementation="reference")


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(B, T, H, D)),
        rng.normal(size=(B, S, K, D)),
        rng.normal(size=(B, S, K, E)),
    )


def by_rows(q, k, v, score, visible, sink=None):
    """Softmax attention written as the formula of one row, one row at a time."""
    out = np.zeros((B, T, H, E))
    lse = np.full((B, T, H), -np.inf)
    for b, i, h in np.ndindex(B, T, H):
        group = h // (H // K)
        terms = [
            (math.exp(score(q[b, i, h] @ k[b, j, group], b, h, i, j)), v[b, j, group])
            for j in range(S)
            if visible(b, h, i, j)
        ]
        total = sum(u for u, _ in terms)
        total += 0 if sink is None else math.exp(sink[h])
        if total:
            lse[b, i, h] = math.log(total)
            out[b, i, h] = sum((u * row for u, row in terms), np.zeros(E)) / total
    return out, lse


def check(spec, operands, score, visible, sink=None):
    q, k, v = inputs()
    wanted = by_rows(q, k, v, score, visible, sink)
    with jax.enable_x64(True):
        got = attend(*map(jnp.asarray, (q, k, v)), spec, operands)
    for left, right in zip(got, wanted, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-14)


def test_plain_attention_is_the_formula():
    spec = kernels.AttentionSpec(return_lse=True)
    check(spec, {}, lambda s, *_: s / math.sqrt(D), lambda *_: True)


def test_steps_apply_in_the_order_of_the_spec():
    rng = np.random.default_rng(1)
    bias, slopes, sink = rng.normal(size=(1, H, T, S)), rng.normal(size=H), [0.3] * H
    spec = kernels.AttentionSpec(
        scale=0.7,
        score=(kernels.Bias(), kernels.SoftCap(1.2), kernels.ALiBi()),
        weight_map=kernels.Softmax(sink="logit"),
        return_lse=True,
    )
    operands = {"bias": bias, "alibi_slopes": slopes, "sink": np.array(sink)}

    def score(s, b, h, i, j):
        capped = 1.2 * math.tanh((0.7 * s + bias[0, h, i, j]) / 1.2)
        return capped - slopes[h] * abs(i - j)

    check(spec, operands, score, lambda *_: True, sink)


def test_masks_combine_and_rows_without_keys_give_zeros():
    ids_q, ids_k = (
        np.array([[1, 1, 2, 0, 5]] * B),
        np.array([[1, 2, 2, 1, 0, 3, 1]] * B),
    )
    prefix = np.array([2, 0], np.int32)
    mask = (kernels.SlidingWindow(2, 1) | kernels.Prefix()) & kernels.Segments()
    spec = kernels.AttentionSpec(mask=mask, return_lse=True)
    operands = {
        "q_segment_ids": ids_q,
        "k_segment_ids": ids_k,
        "prefix_len": prefix,
        "q_offset": np.array([0, 1], np.int32),
        "kv_mask": np.array([[True] * 3 + [False] + [True] * 3] * B),
    }

    def visible(b, h, i, j):
        near = i + b - 2 <= j <= i + b + 1 or j < prefix[b]
        same = ids_q[b, i] == ids_k[b, j] and ids_q[b, i] != 0
        return near and same and j != 3

    check(spec, operands, lambda s, *_: s / math.sqrt(D), visible)


@pytest.mark.parametrize("window", [None, (3, 0), (2, 2)])
def test_agrees_with_jax_nn(window):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 6, 4, 8)) for i in range(3))
    causal = window is None
    wanted = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, local_window_size=window
    )
    mask = kernels.Causal() if causal else kernels.SlidingWindow(*window)
    got = attend(q, k, v, kernels.AttentionSpec(mask=mask))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_sigmoid_weights_are_the_formula():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs())
    got = attend(q, k, v, kernels.AttentionSpec(weight_map=kernels.Sigmoid(-0.4)))
    heads = jnp.repeat(k, H // K, axis=2), jnp.repeat(v, H // K, axis=2)
    s = jnp.einsum("bthd,bshd->bhts", q, heads[0]) / math.sqrt(D)
    wanted = jnp.einsum("bhts,bshe->bthe", 1 / (1 + jnp.exp(0.4 - s)), heads[1])
    np.testing.assert_allclose(got, wanted, atol=1e-6)
