"""Patches of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.core.errors import UserError


def test_patches_come_row_by_row_with_their_pixels_row_by_row():
    images = np.arange(2 * 4 * 6 * 1).reshape(2, 4, 6, 1)
    out = np.asarray(nn.patchify(jnp.asarray(images), 2))
    assert out.shape == (2, 6, 4)
    np.testing.assert_array_equal(out[0, 0], [0, 1, 6, 7])
    np.testing.assert_array_equal(out[0, 1], [2, 3, 8, 9])
    np.testing.assert_array_equal(out[1, 5], images[1, 2:, 4:].ravel())


def test_the_embedding_is_a_strided_convolution():
    layer = nn.PatchEmbedding(3, 2, 5, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(5.0)
    images = jax.random.normal(jax.random.key(1), (2, 6, 9, 2))
    kernel = layer.kernel[...].reshape(3, 3, 2, 5)
    wanted = jax.lax.conv_general_dilated(
        images, kernel, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    wanted = wanted + jnp.arange(5.0)
    np.testing.assert_allclose(layer(images), wanted.reshape(2, 6, 5), atol=1e-5)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(UserError, match="must divide the image; got patch_size=4"):
        nn.patchify(jnp.zeros((1, 8, 6, 3)), 4)
