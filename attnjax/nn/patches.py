"""Images as sequences of patches."""

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax.core.errors import UserError
from attnjax.nn.linear import Linear


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, Ch] -> [B, (H / patch) (W / patch), patch * patch * Ch].

    Patches come in row-major order, and so do the pixels of each, channels last.

    Raises:
        UserError: when the patch does not divide height and width.
    """
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise UserError(
            f"patches: patch_size must divide the image; got patch_size={patch}, image "
            f"{height} x {width}. Change config.model.patch_size or "
            "config.data.image_size."
        )
    rows, columns = height // patch, width // patch
    x = images.reshape(batch, rows, patch, columns, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(patches: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """[B, rows * columns, patch * patch * Ch] -> [B, H, W, Ch]: undoes `patchify`."""
    rows, columns = grid
    x = patches.reshape(len(patches), rows, columns, patch, patch, -1)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(patches), rows * patch, columns * patch, -1)


class PatchEmbedding(Linear):
    """One linear map for every patch, equal to a convolution of stride `patch`.

    Its kernel [patch * patch * Ch, C] is the convolution's [patch, patch, Ch, C] with
    the leading axes made one. Source: Dosovitskiy et al., arXiv 2010.11929, eq. 1.

    Args:
        patch: side of a patch, pixels.
        channels: Ch.
        dim: C.
        use_bias: whether it has a bias.
        std: of its first values (None: 1 / sqrt(patch * patch * Ch)).
    """

    def __init__(
        self,
        patch: int,
        channels: int,
        dim: int,
        *,
        use_bias: bool = True,
        std: float | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch = patch
        size = patch * patch * channels
        super().__init__(
            size,
            dim,
            use_bias=use_bias,
            std=size**-0.5 if std is None else std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, Ch] -> [B, P, C] in the compute dtype."""
        return super().__call__(patchify(images, self.patch))
