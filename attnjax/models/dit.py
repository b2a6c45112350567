"""The diffusion transformer: any bidirectional mixer between noise and image.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv
2212.09748: sections 3.2 (adaLN-Zero) and table 1 (sizes); its released code for the
embeddings and the first values. The same network is trained with flow matching by Ma
et al. (SiT), arXiv 2401.08740.

Tokens are the patches in row-major order; time and class reach the layers as one
vector, `Context.condition`.
"""

import dataclasses
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.models import backbone, denoiser, image_sizes, mixer_choice
from attnjax.models.block import BlockDims
from attnjax.models.stack import StackOut

# name -> C, layers, heads; the MLP is 4 C wide.
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


@dataclasses.dataclass(frozen=True)
class Config(backbone.Config):
    """`config.model` of a diffusion transformer; see also `backbone.Config`.

    Attributes:
        name: "dit".
        size: "S/2", "B/4", "L/8", "XL/2" or with any other patch: gives embed_dim,
            num_layers, num_heads and patch_size, unless they are given themselves
            (none: they are, or have the values told there).
        patch_size: side of a patch, pixels (none: the size's, else 2).
        num_layers: depth; the schedule repeats to fill it (none: a schedule string
            fills the size's; without a size, or as a list of layers, it is taken as
            it is).
        embed_dim: C (none: the size's, else 128).
        num_heads: H query heads (none: the size's, else 4).
        positions: "sincos" (fixed, added to the patches), "rope" (each axis turns half
            of each head) or "none".
        rope: rotary settings, of each axis.
        positions_grid: patches along the side of the image that sincos positions were
            trained on; other images see them resampled (none: those of this model's
            images).
        label_dropout: share of the training images, in [0, 1), whose class the model
            is not told: it then learns to do without, as guidance needs.
        time_features: width of the sines and cosines of the time; even.
        init_std: standard deviation of the layers' weights at the start (none: that
            of Xavier's uniform values for each map, as the released code has it).
    """

    name: Literal["dit"] = "dit"
    size: str | None = None
    patch_size: int | None = None
    num_layers: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    activation: str = "gelu_tanh"
    norm: Literal["rms", "layer"] = "layer"
    use_bias: bool = True
    scale_out_init: bool = False
    init_std: float | None = None
    positions: Literal["sincos", "rope", "none"] = "sincos"
    rope: nn.Rope = dataclasses.field(default_factory=lambda: nn.Rope(theta=100.0))
    positions_grid: int | None = None
    label_dropout: float = 0.1
    time_features: int = 256


def sized(config: Config) -> Config:
    """The config with the numbers of its size filled in.

    Raises:
        UserError: for a size of another form.
    """
    return image_sizes.filled(config, SIZES, patch=2, example="S/2")


def check(config: Config) -> None:
    """Raise UserError where settings, with their sizes filled in, do not fit."""
    denoiser.check(config, ("label_dropout", "in [0, 1)", lambda v: 0 <= v < 1))
    if config.zero_centered_norm:
        raise UserError(
            "config.model.zero_centered_norm: the norms of a dit have no scales; got "
            "true. Set it to false."
        )
    image_sizes.check_positions(config)


def check_choices(config: Config, choices: dict[str, mixer_choice.Choice]) -> None:
    """Raise UserError for mechanisms that have no use for a grid of patches."""
    del config
    mixer_choice.check_on_grid(choices, 2, extra_tokens=0)


def resolve(given: dict) -> dict:
    """Fill and check `config.model`; see `backbone.resolve`."""
    return backbone.resolve(
        Config, given, sized=sized, check=check, check_choices=check_choices
    )


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, model: "DiT", *, rngs: nnx.Rngs):
        c = model.config
        dim = c.embed_dim
        stored = dict(dtype=model.dtype, param_dtype=dtype_of(c.param_dtype), rngs=rngs)
        self.patches = denoiser.patch_embedding(model, **stored)
        self.time = nn.TimeEmbedding(dim, features=c.time_features, **stored)
        self.classes = nn.Embedding(model.num_labels, dim=dim, std=0.02, **stored)
        self.final_norm = denoiser.final_norm(c, rngs=rngs)
        self.final_modulation = nn.Modulation(dim, 2, **stored)
        self.head = denoiser.head(model, **stored)


class DiT(backbone.Backbone):
    """A denoiser of images: static description plus pure functions of its arrays.

    Params beside "layers": "patches", "time", "classes" (a row a class, and behind
    them the row of no class where label_dropout is above 0), "final_modulation",
    "head".

    Args:
        config: `config.model`, resolved.
        image_size: side of the images (or latents), pixels.
        channels: of the images.
        out_channels: of what it predicts.
        num_classes: labels are 0 to num_classes - 1.
        platform: where it will run; decides "auto" dtypes.
        target: a `kernels.Target` for kernel dispatch, or None.

    Attributes:
        grid: rows and columns of patches.
        num_tokens: T.
        null_label: the label that says nothing, or None without label dropout.
        num_labels: rows of the table of classes.
        told: the entry of a batch that it is told, whose rows have `told_shape`.
        dropout_option: the share of training images that it is not told it of.
    """

    told: ClassVar[str] = "label"
    told_shape: ClassVar[tuple[int, ...]] = ()
    dropout_option: ClassVar[str] = "label_dropout"

    def __init__(
        self,
        config: Config,
        *,
        image_size: int,
        channels: int,
        out_channels: int,
        num_classes: int,
        platform: str = "cpu",
        target=None,
    ):
        config = sized(config)
        check(config)
        image_sizes.check_images(config, image_size, channels, num_classes)
        like = partial(
            DiT,
            image_size=image_size,
            channels=channels,
            out_channels=out_channels,
            num_classes=num_classes,
            platform=platform,
            target=target,
        )
        super().__init__(config, platform=platform, like=like)
        c = self.config
        self.image_size, self.channels = image_size, channels
        self.out_channels, self.num_classes = out_channels, num_classes
        self.null_label = num_classes if c.label_dropout else None
        self.num_labels = num_classes + (self.null_label is not None)
        self.grid = (image_size // c.patch_size,) * 2
        self.positions_grid = (c.positions_grid or self.grid[0],) * 2
        self.num_tokens = self.grid[0] * self.grid[1]
        check_choices(c, self.choices)
        rope = c.rope if c.positions == "rope" else None
        self._build(
            max_len=self.num_tokens,
            prefix_tokens=0,
            grid=self.grid,
            rope=nn.rope_on_grid(rope, self.grid, 0),
            target=target,
        )

    def _stds(self) -> tuple[float, float]:
        c = self.config
        own = c.init_std is None
        return denoiser.attention_stds(c.embed_dim) if own else super()._stds()

    def _block_dims(self) -> BlockDims:
        dims = dataclasses.replace(super()._block_dims(), modulated=True)
        own = self.config.init_std is None
        return denoiser.with_xavier_mlp(dims) if own else dims

    def _make_ends(self, rngs: nnx.Rngs) -> Ends:
        return Ends(self, rngs=rngs)

    # ---- running

    def context(
        self, *, batch: int, prng_key=None, train: bool = False, rows=None
    ) -> Context:
        """The surroundings of `batch` images.

        Args:
            batch: B.
            prng_key: for dropout; needed where `train` and it is on.
            train: whether it is.
            rows: how arrays [B, ...] lie on the devices, or None on one.
        """
        return image_sizes.context(
            self, batch=batch, prng_key=prng_key, train=train, rows=rows
        )

    def drop_labels(self, labels: jax.Array, prng_key: jax.Array) -> jax.Array:
        """Labels [B] of which a share of label_dropout is `null_label`."""
        rate = self.config.label_dropout
        return denoiser.dropped(labels, self.null_label, rate, prng_key)

    def encode(self, params: dict, labels: jax.Array, *, rows=None) -> jax.Array:
        """What the network is told of classes: [B, C] from labels int32 [B]."""
        del rows
        return self._merge(params).classes(labels)

    def condition(self, params: dict, times: jax.Array, told: jax.Array) -> jax.Array:
        """[B, C] from times float [B], and classes as from `encode`."""
        return self._merge(params).time(times) + told

    def embed(self, params: dict, images: jax.Array) -> jax.Array:
        """Images [B, H, W, Ch] -> tokens [B, T, C] with added positions.

        Raises:
            UserError: for images of another size or number of channels.
        """
        image_sizes.check_batch(self, images)
        x = self._merge(params).patches(images)
        if self.config.positions != "sincos":
            return x
        places = nn.sincos_2d(
            self.grid,
            self.config.embed_dim,
            trained=self.positions_grid,
            reaches_end=False,
        )
        return x + jnp.asarray(places, x.dtype)

    def _stream(self, params, start, length: int) -> jax.Array:
        return image_sizes.stream(self, start, length)

    def denoise(
        self,
        params: dict,
        buffers: dict,
        images: jax.Array,
        times: jax.Array,
        told: jax.Array,
        ctx: Context,
    ) -> tuple[jax.Array, StackOut]:
        """`predict` with classes as from `encode`: samplers encode them once."""
        image_sizes.check_whole_rows(ctx)
        condition = self.condition(params, times, told)
        ctx = ctx.replace(condition=condition)
        x, out = self.run(params, buffers, self.embed(params, images), ctx)
        ends = self._merge(params)
        return denoiser.predicted(self, ends, x, condition, ctx), out

    def predict(
        self,
        params: dict,
        buffers: dict,
        images: jax.Array,
        times: jax.Array,
        labels: jax.Array,
        ctx: Context,
    ) -> tuple[jax.Array, StackOut]:
        """What the network says of noisy images.

        Args:
            params, buffers: as from `init`.
            images: [B, H, W, Ch].
            times: float [B], as the process embeds them.
            labels: int32 [B]; `null_label` for no class.
            ctx: as from `context`.

        Returns:
            float32 (or wider) [B, H, W, out_channels].
        """
        told = self.encode(params, labels, rows=ctx.rows)
        return self.denoise(params, buffers, images, times, told, ctx)

    # ---- counting

    def flops(self) -> float:
        """Forward FLOPs (2 a multiply-add) of one image."""
        c = self.config
        dim, depth = c.embed_dim, len(self.names)
        pixels = c.patch_size**2 * (self.channels + self.out_channels)
        total = 2.0 * self.num_tokens * pixels * dim
        parts = (6 if self.block_dims.mlp_dim else 3) * depth + 2
        total += 2.0 * dim * (parts * dim + c.time_features + dim)
        return total + self.layer_flops(self.num_tokens)
