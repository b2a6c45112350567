"""MBConvs of a pyramid: in front of layers, between stages, and the stem before them.

Source: Tu et al., "MaxViT", arXiv 2204.01697, section 3.3, figure 2 and the authors'
code, whose convolutions of stride 2 have their zeros below and to the right of an image
of even sides.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context, MixerOut
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.models.block import Block, BlockDims
from attnjax.models.stack import POLICIES

# Behind the instance name of a layer with an MBConv, in the layout: the stack builds
# one block for each name. No schedule can spell it.
MARK = "+mbconv"


def marked(
    stages: Sequence[tuple[str, ...]], *, every: int | None, in_first: bool
) -> list[tuple[str, ...]]:
    """Schedules with the layers marked that have an MBConv of their own.

    Args:
        stages: the instance names of the layers of each stage.
        every: of so many layers of a stage the first has one; None: no layer.
        in_first: whether the first layer of a stage has one, too.
    """
    return [
        tuple(
            name + MARK if every and i % every == 0 and (i or in_first) else name
            for i, name in enumerate(names)
        )
        for names in stages
    ]


def bare(name: str) -> str:
    """The instance name of a layer, marked or not."""
    return name.removesuffix(MARK)


def stem_side(config) -> int:
    """Pixels along the side of a place of the stem: the first of the MBConvs between
    stages halves its grid."""
    return config.patch_size // (2 if config.downsampling == "mbconv" else 1)


def stem_dim(config) -> int:
    """Channels of the stem."""
    return config.stem_dim or config.embed_dim


def check(config) -> None:
    """Raise UserError where settings of a pyramid, with its sizes, do not fit."""
    between = config.downsampling == "mbconv"
    has_any = between or config.mbconv.every is not None
    own = config.mbconv
    plain = nn.MBConvConfig()
    if config.stem == "double":
        plain = nn.MBConvConfig(norm_eps=own.norm_eps, norm_momentum=own.norm_momentum)
    if not has_any and own != plain:
        raise UserError(
            "config.model.mbconv: describes MBConvs, of which there are none; got "
            f"{own}, downsampling={config.downsampling}. Set "
            "config.model.downsampling=mbconv or config.model.mbconv.every, or leave "
            "it at its defaults."
        )
    if has_any:
        for width in config.widths:
            try:
                own.widths(width)
            except ValueError as error:
                raise UserError(f"config.model.mbconv: {error}") from error
    if between and config.patch_size % 2:
        raise UserError(
            "config.model.patch_size: must be even for downsampling=mbconv, which "
            "halves the stem's grid for the first stage; got "
            f"{config.patch_size}."
        )
    if not between and stem_dim(config) != config.embed_dim:
        raise UserError(
            "config.model.stem_dim: the stem has the width of the first stage but with "
            f"downsampling=mbconv; got stem_dim={config.stem_dim}, embed_dim="
            f"{config.embed_dim}, downsampling={config.downsampling}. Leave it at none."
        )
    if config.stem == "double" and stem_side(config) > 2:
        raise UserError(
            "config.model.patch_size: stem=double has a stride of 1 or 2; got "
            f"patch_size={config.patch_size}, downsampling={config.downsampling}, a "
            f"stride of {stem_side(config)}. Use downsampling=mbconv, which halves "
            "the sides once more, or another stem."
        )
    if has_any and config.positions == "anchored":
        raise UserError(
            "config.model.mbconv: convolutions have zeros around the image, which "
            f"positions=anchored cannot have; got every={own.every}, downsampling="
            f"{config.downsampling}. Use other positions."
        )


class MBConvBlock(Block):
    """A `Block` behind an MBConv: parameters of both, those of the latter `mbconv`."""

    def __init__(
        self,
        make_mixer: Callable,
        dims: BlockDims,
        *,
        config: nn.MBConvConfig,
        rngs: nnx.Rngs,
    ):
        super().__init__(make_mixer, dims, rngs=rngs)
        self.mbconv = of_width(dims, config, rngs=rngs)

    def __call__(
        self, x: jax.Array, streams: dict, ctx: Context
    ) -> tuple[jax.Array, dict, MixerOut]:
        """See `Block`; of a grid alone."""
        image = x.reshape(len(x), *ctx.grid, -1)
        y = self.mbconv.residual(image, train=ctx.train)
        rate = self.dims.drop_path * self._depth(ctx)
        if self.dims.drop_path and ctx.train:
            key = jax.random.fold_in(ctx.prng_key, 10)
            y = nn.drop_path(y, rate, prng_key=key)
        image = self.mbconv.passed(image) + y.astype(x.dtype)
        return super().__call__(ctx.spread(image.reshape(x.shape)), streams, ctx)


def of_width(dims: BlockDims, config: nn.MBConvConfig, *, rngs: nnx.Rngs) -> nn.MBConv:
    """The MBConv in front of a layer."""
    return nn.MBConv(
        dims.embed_dim,
        dims.embed_dim,
        config=config,
        activation=dims.activation,
        use_bias=dims.use_bias,
        dtype=jnp.dtype(dims.dtype),
        param_dtype=jnp.dtype(dims.param_dtype),
        rngs=rngs,
    )


class MBConvDownsampling(nnx.Module):
    """In front of every stage, the first too: an MBConv of stride 2.

    Parameters: `mbconv_<i>`, i from 0.
    """

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        self.remat = config.remat
        # Drop-path grows over the layers; an MBConv has the rate of the one behind it.
        last = max(1, sum(config.depths) - 1)
        firsts = [sum(config.depths[:i]) for i in range(len(config.depths))]
        self.rates = tuple(config.drop_path * first / last for first in firsts)
        before = (stem_dim(config), *config.widths)
        for i, width in enumerate(config.widths):
            made = nn.MBConv(
                before[i],
                width,
                config=config.mbconv,
                stride=2,
                activation=config.activation,
                use_bias=config.use_bias,
                dtype=dtype,
                param_dtype=dtype_of(config.param_dtype),
                rngs=rngs,
            )
            setattr(self, f"mbconv_{i}", made)

    def __call__(self, x: jax.Array, stage: int, ctx: Context) -> jax.Array:
        """[B, H, W, C of the stage before] -> [B, H / 2, W / 2, C of `stage`]."""
        module = getattr(self, f"mbconv_{stage}")
        graph, params, buffers = nnx.split(module, nnx.Param, nn.Buffer)

        def run(params, buffers, x):
            own = nnx.merge(graph, params, buffers)
            y = own.residual(x, train=ctx.train)
            if self.rates[stage] and ctx.train:
                key = jax.random.fold_in(ctx.prng_key, 0x7FFFFF00 + stage)
                y = nn.drop_path(y, self.rates[stage], prng_key=key)
            return own.passed(x) + y.astype(x.dtype), nnx.state(own, nn.Buffer)

        if self.remat != "none":
            run = jax.checkpoint(run, policy=POLICIES[self.remat])
        y, buffers = run(params, buffers, x)
        nnx.update(module, buffers)
        return y

    def flops(self, places: Sequence[int]) -> float:
        """Forward FLOPs on one image, whose stages have so many places."""
        return sum(
            getattr(self, f"mbconv_{i}").flops(4 * count)
            for i, count in enumerate(places)
        )


class DoubleStem(nnx.Module):
    """Two convolutions of 3 x 3, the first with the stride; batch norm and activation
    stand between them and nothing behind.

    Parameters: `conv_0`, `norm_0`, `conv_1`.
    """

    def __init__(self, config, channels: int, *, dtype, rngs: nnx.Rngs):
        stored = dict(dtype=dtype, param_dtype=dtype_of(config.param_dtype), rngs=rngs)
        made = partial(nn.Convolution, size=3, use_bias=config.use_bias, **stored)
        dim, stride = stem_dim(config), stem_side(config)
        own = config.mbconv
        self.activation = nn.ACTIVATIONS[config.activation][0]
        padding = (0, 1) if stride == 2 else 1
        self.conv_0 = made(channels, dim, stride=stride, padding=padding)
        self.norm_0 = nn.BatchNorm(
            dim, eps=own.norm_eps, momentum=own.norm_momentum, **stored
        )
        self.conv_1 = made(dim, dim, padding=1)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """[B, H, W, Ch] -> [B, H / stride, W / stride, C]."""
        x = self.norm_0(self.conv_0(images), train=train)
        return self.conv_1(self.activation(x))

    def flops(self, image_size: int) -> float:
        """Forward FLOPs (2 a multiply-add) on one image."""
        places = (image_size // self.conv_0.stride) ** 2
        return 2.0 * places * (self.conv_0.kernel.size + self.conv_1.kernel.size)
