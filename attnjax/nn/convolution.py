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
        padding: zeros on each side of the image, or (before, behind) along each axis.
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
        padding: int | tuple[int, int] = 0,
        use_bias: bool = True,
        std: float | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.size, self.stride = size, stride
        both = (padding, padding) if isinstance(padding, int) else padding
        self.padding = both
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
        """[B, H, W, I] -> [B, (H + padded - size) // stride + 1, ..., O]."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.size == self.stride and not any(self.padding):
            rows, columns = (side // self.size for side in x.shape[1:3])
            y = (patchify(x, self.size) @ kernel).reshape(len(x), rows, columns, -1)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel.reshape(self.size, self.size, x.shape[-1], -1),
                window_strides=(self.stride,) * 2,
                padding=(self.padding,) * 2,
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
    stride: int = 1,
) -> jax.Array:
    """Each channel [B, prod(grid)] of x [B, T, C] with its own kernel of `size` places
    (odd) along each axis, [size^rank, C] in row-major order. Outside of the grid are
    zeros, or where it is `circular` the other end of it.

    With a `stride` there is an output for every so many places of an axis, n / stride
    rounded up. Of the places outside that they read, as many lie in front as behind,
    or one less: those of 3 at every second of an even axis read places 2 p to 2 p + 2
    (TensorFlow's "same").
    """
    rank = len(grid)
    counts = [-(-n // stride) for n in grid]
    outside = [
        max((count - 1) * stride + size - n, 0)
        for n, count in zip(grid, counts, strict=True)
    ]
    image = x.reshape(len(x), *grid, x.shape[-1])
    ends = ((0, 0), *((n // 2, n - n // 2) for n in outside), (0, 0))
    image = jnp.pad(image, ends, mode="wrap" if circular else "constant")
    # A sum of moved images: inside of a scan XLA's CPU code takes some 40 times as long
    # for the gradients of a convolution with groups.
    total = 0.0
    for weight, move in zip(kernel, np.ndindex((size,) * rank), strict=True):
        here = tuple(
            slice(i, i + (n - 1) * stride + 1, stride)
            for i, n in zip(move, counts, strict=True)
        )
        total = total + image[(slice(None), *here)] * weight
    return total.reshape(len(x), -1, x.shape[-1])


class DepthwiseConvolution(nnx.Module):
    """Every channel with its own kernel, on tokens that lie on a grid of two axes.

    Parameters: `conv_kernel` [size * size, C] in row-major order, which is no matrix of
    a linear map, and `conv_bias` [C] (zero at the start).

    Args:
        dim: C.
        size: side of the kernel, odd.
        circular: whether the grid's ends meet; else zeros are outside of it.
        stride: places from one output to the next, as in `depthwise`.
        use_bias: whether there is a bias.
    """

    def __init__(
        self,
        dim: int,
        *,
        size: int = 3,
        circular: bool = False,
        stride: int = 1,
        use_bias: bool = True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.size, self.circular, self.dtype = size, circular, jnp.dtype(dtype)
        self.stride = stride
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
        """[B, extra_tokens + prod(grid), C] -> the same in the compute dtype; with a
        stride fewer places.

        Tokens before the grid, which have no place on it, give zeros.
        """
        kernel = self.conv_kernel[...].astype(self.dtype)
        places = x[:, extra_tokens:].astype(self.dtype)
        form = dict(size=self.size, circular=self.circular, stride=self.stride)
        y = depthwise(places, kernel, grid, **form)
        y = y if self.conv_bias is None else y + self.conv_bias[...].astype(self.dtype)
        return jnp.pad(y, ((0, 0), (extra_tokens, 0), (0, 0)))
