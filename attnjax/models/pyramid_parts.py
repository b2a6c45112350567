"""What a pyramid is made of: the stem, what halves a grid, a stage, and the head."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.models import backbone, pyramid_mbconv
from attnjax.models.layout import Layout


class Stage(backbone.Backbone):
    """The layers of one resolution: a `Backbone` whose stack is a part of the model's.

    Args:
        config: its own settings, see `pyramid.stage_config`.
        grid: rows and columns of its places.
        layout, groups: the whole model's layout, and the groups of this stage.
        block: fields of `BlockDims` that only some models have.
        mbconv: of the layers that the layout marks.
        rope: rotary settings on the grid, or None.
        platform, target: as of the model.
    """

    def __init__(
        self,
        config: backbone.Config,
        *,
        grid: tuple[int, int],
        layout: Layout,
        groups: range,
        block: dict[str, Any],
        mbconv: nn.MBConvConfig,
        rope,
        platform: str,
        target,
    ):
        super().__init__(config, platform=platform, like=None)
        self.grid, self.num_tokens = grid, grid[0] * grid[1]
        self._block, self._mbconv = block, mbconv
        self._build(
            layout=layout,
            groups=groups,
            max_len=self.num_tokens,
            prefix_tokens=0,
            grid=grid,
            rope=rope,
            target=target,
        )

    def _block_dims(self):
        depth = len(self.layout.names)
        return dataclasses.replace(
            super()._block_dims(), **self._block, num_layers=depth
        )

    def _make_block(self, name: str, *, rngs: nnx.Rngs):
        own = pyramid_mbconv.bare(name)
        if own == name:
            return super()._make_block(name, rngs=rngs)
        choice = self.choices[own]
        return pyramid_mbconv.MBConvBlock(
            lambda *, rngs: choice.make(self.dims, rngs=rngs),
            self.block_dims,
            config=self._mbconv,
            rngs=rngs,
        )

    def _make_ends(self, rngs: nnx.Rngs) -> nnx.Module:
        """None of its own."""
        del rngs
        return nnx.Module()

    def flops(self) -> float:
        """Forward FLOPs of its layers on one image."""
        b = self.block_dims
        convolutions = b.conv_positions * (1 + (b.mlp_dim > 0)) * len(self.names)
        each = 2.0 * 9 * b.embed_dim * self.num_tokens
        total = convolutions * each + self.layer_flops(self.num_tokens)
        patterns = [self.layout.groups[g] for g in self.stack.groups]
        marks = sum(
            repeats * (pyramid_mbconv.bare(name) != name)
            for pattern, repeats in patterns
            for name in pattern
        )
        if marks:
            make = partial(pyramid_mbconv.of_width, b, self._mbconv)
            made = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
            total += marks * made.flops(self.num_tokens)
        return total


def _makers(config, dtype, rngs):
    """(convolutions, norms) with the settings of the model."""
    param_dtype = dtype_of(config.param_dtype)
    convolution = partial(
        nn.Convolution,
        use_bias=config.use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    norm = partial(
        nn.make_norm,
        config.norm,
        eps=config.norm_eps,
        use_bias=config.use_bias,
        zero_centered=config.zero_centered_norm,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    return convolution, norm


class Stem(nnx.Module):
    """Images [B, H, W, Ch] -> [B, H / patch_size, W / patch_size, C], normed.

    Parameters: `conv_<i>` and `norm_<i>`, i from 0.
    """

    def __init__(self, config, channels: int, *, dtype, rngs: nnx.Rngs):
        convolution, norm = _makers(config, dtype, rngs)
        side = pyramid_mbconv.stem_side(config)
        dim = pyramid_mbconv.stem_dim(config)
        self.activation = nn.ACTIVATIONS[config.activation][0]
        if config.stem == "conv":
            count = side.bit_length() - 1
            shapes = [(3, 2, 1, dim // 2 ** (count - 1 - i)) for i in range(count)]
        elif config.stem == "overlap":
            shapes = [(2 * side - 1, side, side - 1, dim)]
        else:
            shapes = [(side, side, 0, dim)]
        self.count = len(shapes)
        for i, (size, stride, padding, width) in enumerate(shapes):
            made = convolution(
                channels, width, size=size, stride=stride, padding=padding
            )
            setattr(self, f"conv_{i}", made)
            setattr(self, f"norm_{i}", norm(width))
            channels = width

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """See the class."""
        del train
        x = images
        for i in range(self.count):
            x = self.activation(x) if i else x
            x = getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x))
        return x

    def flops(self, image_size: int) -> float:
        """Forward FLOPs (2 a multiply-add) on one image."""
        total, side = 0.0, image_size
        for i in range(self.count):
            made = getattr(self, f"conv_{i}")
            side //= made.stride
            total += 2.0 * side * side * made.kernel.size
        return total


class Downsampling(nnx.Module):
    """Between stages i - 1 and i: a norm, then half as many places along each axis;
    with downsampling=merge the norm is behind.

    Parameters: `norm_<i>` and `conv_<i>`, i from 1.
    """

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        convolution, norm = _makers(config, dtype, rngs)
        size, padding = (3, 1) if config.downsampling == "overlap" else (2, 0)
        self.norms_behind = config.downsampling == "merge"
        if self.norms_behind:
            convolution = partial(convolution, use_bias=False)
        for i in range(1, len(config.widths)):
            before, width = config.widths[i - 1 : i + 1]
            made = convolution(before, width, size=size, stride=2, padding=padding)
            setattr(self, f"norm_{i}", norm(width if self.norms_behind else before))
            setattr(self, f"conv_{i}", made)

    def __call__(self, x: jax.Array, stage: int) -> jax.Array:
        """[B, H, W, C] -> [B, H / 2, W / 2, C of `stage`]."""
        norm, conv = getattr(self, f"norm_{stage}"), getattr(self, f"conv_{stage}")
        return norm(conv(x)) if self.norms_behind else conv(norm(x))

    def flops(self, places: Sequence[int]) -> float:
        """Forward FLOPs on one image, whose stages have so many places."""
        later = enumerate(places[1:], 1)
        return sum(2.0 * n * getattr(self, f"conv_{i}").kernel.size for i, n in later)


class Ends(nnx.Module):
    """What stands before, between and behind the stages."""

    def __init__(self, config, last: Stage, *, channels, num_classes, rngs: nnx.Rngs):
        dim, stored = last.dims.embed_dim, dict(dtype=last.dtype, rngs=rngs)
        make_stem = pyramid_mbconv.DoubleStem if config.stem == "double" else Stem
        self.stem = make_stem(config, channels, **stored)
        self.enters_first = config.downsampling == "mbconv"
        if self.enters_first:
            self.downsampling = pyramid_mbconv.MBConvDownsampling(config, **stored)
        elif len(config.widths) > 1:
            self.downsampling = Downsampling(config, **stored)
        else:
            self.downsampling = None
        self.final_norm = backbone.final_norm(last.config, rngs=rngs)
        linear = partial(
            nn.Linear,
            use_bias=config.use_bias,
            param_dtype=dtype_of(config.param_dtype),
            **stored,
        )
        hidden = config.head_hidden
        self.head_hidden = linear(dim, hidden, std=dim**-0.5) if hidden else None
        self.head = linear(hidden or dim, num_classes, std=config.head_std)

    def flops(self, image_size: int, places: Sequence[int]) -> float:
        """Forward FLOPs (2 a multiply-add) of the stem and in front of stages, which
        have so many places, on one image."""
        return self.stem.flops(image_size) + (
            self.downsampling.flops(places) if self.downsampling is not None else 0.0
        )

    def entered(self, image: jax.Array, stage: int, ctx: Context) -> jax.Array:
        """The grid [B, H, W, C] of a stage from that of the one before, or the stem."""
        if self.enters_first:
            return self.downsampling(image, stage, ctx)
        return self.downsampling(image, stage) if stage else image
