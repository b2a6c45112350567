"""Convolutions against sums over the places that they read."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn


def test_an_output_place_reads_its_window_of_all_channels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 5, 3)).astype(np.float32)
    for size, stride, padding in ((3, 2, 1), (1, 1, 0), (2, 2, 1)):
        layer = nn.Convolution(
            3, 4, size=size, stride=stride, padding=padding, rngs=nnx.Rngs(0)
        )
        layer.bias[...] = jnp.arange(4.0)
        kernel = np.asarray(layer.kernel[...]).reshape(size, size, 3, 4)
        padded = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
        rows, columns = ((n + 2 * padding - size) // stride + 1 for n in (7, 5))
        wanted = np.zeros((2, rows, columns, 4))
        for a, b in np.ndindex(rows, columns):
            seen = padded[:, a * stride :, b * stride :][:, :size, :size]
            wanted[:, a, b] = np.einsum("nijc,ijco->no", seen, kernel) + np.arange(4)
        np.testing.assert_allclose(layer(x), wanted, atol=1e-5)


def test_patches_beside_one_another_are_the_same_convolution():
    x = jax.random.normal(jax.random.key(1), (2, 6, 4, 3))
    layer = nn.Convolution(3, 4, size=2, stride=2, rngs=nnx.Rngs(0))
    patches = nn.PatchEmbedding(2, 3, 4, rngs=nnx.Rngs(0))
    patches.kernel[...] = layer.kernel[...]
    np.testing.assert_allclose(layer(x).reshape(2, 6, 4), patches(x), atol=1e-6)


def test_channels_stay_apart_and_tokens_before_the_grid_get_nothing():
    layer = nn.DepthwiseConvolution(3, rngs=nnx.Rngs(0))
    layer.conv_bias[...] = jnp.ones(3)
    x = np.zeros((1, 2 + 4 * 5, 3), np.float32)
    x[0, 2 + 1 * 5 + 4, 1] = 1.0  # Row 1, column 4, at the edge; channel 1.
    out = np.asarray(layer(x, (4, 5), extra_tokens=2))
    assert not out[:, :2].any()
    out = out[0, 2:].reshape(4, 5, 3) - 1
    kernel = np.asarray(layer.conv_kernel[...])[:, 1].reshape(3, 3)
    wanted = np.zeros((4, 5, 3))
    wanted[:3, 3:, 1] = kernel[::-1, ::-1][:, :2]
    np.testing.assert_allclose(out, wanted, atol=1e-6)


def test_on_a_circular_grid_a_shift_moves_what_comes_out():
    layer = nn.DepthwiseConvolution(3, circular=True, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)

    def out(x):
        return np.asarray(layer(x.reshape(2, 20, 3), (4, 5))).reshape(x.shape)

    moved = out(np.roll(x, (1, 3), (1, 2)))
    np.testing.assert_allclose(moved, np.roll(out(x), (1, 3), (1, 2)), atol=1e-6)
    plain = nn.DepthwiseConvolution(3, rngs=nnx.Rngs(0))
    inside = plain(x.reshape(2, 20, 3), (4, 5)).reshape(x.shape)[:, 1:-1, 1:-1]
    np.testing.assert_allclose(out(x)[:, 1:-1, 1:-1], inside, atol=1e-6)


def test_strides_of_channels_apart_are_those_of_a_padded_convolution():
    """An odd axis and an even one, at every second place."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    layer = nn.DepthwiseConvolution(3, stride=2, use_bias=False, rngs=nnx.Rngs(0))
    wanted = jax.lax.conv_general_dilated(
        x,
        layer.conv_kernel[...].reshape(3, 3, 1, 3),
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    assert wanted.shape == (2, 3, 2, 3)
    out = layer(x.reshape(2, 20, 3), (5, 4))
    np.testing.assert_allclose(out, wanted.reshape(2, 6, 3), atol=1e-5)
