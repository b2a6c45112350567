"""Convolutions over images [B, H, W, C]: outside are zeros, or the ends meet."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from attnjax.nn.parameter import param
from attnjax.nn.patches import patchify


class Convolution(nnx.Module):
    """Every output place reads `size` x `size` places of all channels.

    The kernel [size * size * I, O] is [size, size, I, O] with its leading axes made
    one, as that of `PatchEmbedding`. With an odd size and padding = (size - 1) // 2,
    output place p is centred on input place p * stride.

    Args:
        in_dim: I.
        out_dim: O.
        size: side of the kernel.
        stride: places from one output to the next.
        padding: zeros on each side of the image.
        use_bias: whether there is a bias (zero at the start).
        std: of the kernel's first values (None: 1 / sqrt(size * size * I)).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        size: int,
        stride: int = 1,
        padding: int = 0,
        use_bias: bool = True,
        std: float | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.size, self.stride, self.padding = size, stride, padding
        self.dtype = jnp.dtype(dtype)
        fan_in = size * size * in_dim
        start = initializers.normal(fan_in**-0.5 if std is None else std)
        self.kernel = param(rngs, (fan_in, out_dim), start, dtype=param_dtype)
        self.bias = (
            param(rngs, (out_dim,), initializers.zeros, dtype=param_dtype)
            if use_bias
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, I] -> [B, (H + 2 padding - size) // stride + 1, ..., O]."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.size == self.stride and not self.padding:
            rows, columns = (side // self.size for side in x.shape[1:3])
            y = (patchify(x, self.size) @ kernel).reshape(len(x), rows, columns, -1)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel.reshape(self.size, self.size, x.shape[-1], -1),
                window_strides=(self.stride,) * 2,
                padding=((self.padding,) * 2,) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def depthwise(
    x: jax.Array,
    kernel: jax.Array,
    grid: tuple[int, ...],
    *,
    size: int = 3,
    circular: bool = False,
) -> jax.Array:
    """Each channel [B, prod(grid)] of x [B, T, C] with its own kernel of `size` places
    (odd) along each axis, [size^rank, C] in row-major order. Outside of the grid are
    zeros, or where it is `circular` the other end of it.
    """
    rank, half = len(grid), size // 2
    image = x.reshape(len(x), *grid, x.shape[-1])
    ends = ((0, 0), *((half, half),) * rank, (0, 0))
    image = jnp.pad(image, ends, mode="wrap" if circular else "constant")
    # A sum of moved images: inside of a scan XLA's CPU code takes some 40 times as long
    # for the gradients of a convolution with groups.
    total = 0.0
    for weight, move in zip(kernel, np.ndindex((size,) * rank), strict=True):
        here = tuple(slice(i, i + n) for i, n in zip(move, grid, strict=True))
        total = total + image[(slice(None), *here)] * weight
    return total.reshape(x.shape)


class DepthwiseConvolution(nnx.Module):
    """Every channel with its own kernel, on tokens that lie on a grid of two axes.

    Parameters: `conv_kernel` [size * size, C] in row-major order, which is no matrix of
    a linear map, and `conv_bias` [C] (zero at the start).

    Args:
        dim: C.
        size: side of the kernel, odd.
        circular: whether the grid's ends meet; else zeros are outside of it.
        use_bias: whether there is a bias.
    """

    def __init__(
        self,
        dim: int,
        *,
        size: int = 3,
        circular: bool = False,
        use_bias: bool = True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.size, self.circular, self.dtype = size, circular, jnp.dtype(dtype)
        start = initializers.normal(1 / size)
        self.conv_kernel = param(rngs, (size * size, dim), start, dtype=param_dtype)
        self.conv_bias = (
            param(rngs, (dim,), initializers.zeros, dtype=param_dtype)
            if use_bias
            else None
        )

    def __call__(
        self, x: jax.Array, grid: tuple[int, int], *, extra_tokens: int = 0
    ) -> jax.Array:
        """[B, extra_tokens + prod(grid), C] -> the same in the compute dtype.

        Tokens before the grid, which have no place on it, give zeros.
        """
        kernel = self.conv_kernel[...].astype(self.dtype)
        places = x[:, extra_tokens:].astype(self.dtype)
        y = depthwise(places, kernel, grid, size=self.size, circular=self.circular)
        y = y if self.conv_bias is None else y + self.conv_bias[...].astype(self.dtype)
        return jnp.pad(y, ((0, 0), (extra_tokens, 0), (0, 0)))
