"""The multimodal diffusion transformer: text and image in one attention.

Source: Esser et al. (Stable Diffusion 3), arXiv 2403.03206, section 4; its released
code for sizes, positions and the last layer. The text encoder is our own, small and
trained with the rest, where theirs are three large frozen ones.

Rows hold the tokens of the text first, then the patches in row-major order. Time and
the text's pooled vector reach the layers as one vector, `Context.condition`.
"""

import dataclasses
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.mixers.slots import joint
from attnjax.models import (
    backbone,
    denoiser,
    image_sizes,
    mixer_choice,
    text_encoder,
)
from attnjax.models.block import BlockDims
from attnjax.models.joint_block import JointBlock
from attnjax.models.layout import Layout
from attnjax.models.stack import Stack, StackOut


@dataclasses.dataclass(frozen=True)
class Config(backbone.Config):
    """`config.model` of a multimodal diffusion transformer; see also `backbone.Config`.

    Attributes:
        name: "mmdit".
        layers: instances of `attention`, or of the options of its output.
        patch_size: side of a patch, pixels.
        qk_norm: RMSNorm of each head's query and key, of each stream its own.
        positions: "sincos" (fixed, added to the patches), "rope" (each axis turns half
            of each head; text is not turned) or "none". Text has the places that its
            encoder gives it.
        rope: rotary settings, of each axis.
        positions_grid: side of a table of sincos positions, of whose middle the patches
            take theirs (none: as many as the image has).
        positions_step: distance of two neighbours in that table.
        caption_dropout: share of the training images, in [0, 1), whose caption the
            model is not told: it then learns to do without, as guidance needs.
        time_features: width of the sines and cosines of the time; even.
        init_std: standard deviation of the layers' weights at the start (none: that
            of Xavier's uniform values for each map, as in `dit`).
        text: the encoder of captions.
    """

    name: Literal["mmdit"] = "mmdit"
    patch_size: int = 2
    activation: str = "gelu_tanh"
    norm: Literal["rms", "layer"] = "layer"
    use_bias: bool = True
    scale_out_init: bool = False
    init_std: float | None = None
    positions: Literal["sincos", "rope", "none"] = "sincos"
    rope: nn.Rope = dataclasses.field(default_factory=lambda: nn.Rope(theta=100.0))
    positions_grid: int | None = None
    positions_step: float = 1.0
    caption_dropout: float = 0.1
    time_features: int = 256
    text: text_encoder.Config = dataclasses.field(default_factory=text_encoder.Config)

    def mlp_parameters_per_unit(self) -> float:
        """See `backbone.Config`: every layer has two MLPs, the last layer one."""
        layers = len(self.schedule())
        return super().mlp_parameters_per_unit() * (2 * layers - 1) / layers


def check(config: Config) -> None:
    """Raise UserError where settings do not fit one another."""
    denoiser.check(
        config,
        ("positions_step", "positive", lambda v: v > 0),
        ("caption_dropout", "in [0, 1)", lambda v: 0 <= v < 1),
    )
    if config.zero_centered_norm and not config.qk_norm:
        raise UserError(
            "config.model.zero_centered_norm: the norms of an mmdit have no scales "
            "without qk_norm; got true. Set it to false."
        )
    image_sizes.check_positions(config)
    if config.positions_step != 1 and config.positions != "sincos":
        raise UserError(
            "config.model.positions_step: is of sincos positions; got "
            f"positions_step={config.positions_step:g}, positions={config.positions}. "
            "Leave it at 1."
        )


def check_choices(config: Config, choices: dict[str, mixer_choice.Choice]) -> None:
    """Raise UserError for mechanisms that two streams cannot share."""
    del config
    mixer_choice.check_on_grid(choices, 2, extra_tokens=0)
    for choice in choices.values():
        joint.check(choice)


def resolve(given: dict) -> dict:
    """Fill and check `config.model`; see `backbone.resolve`."""
    return backbone.resolve(Config, given, check=check, check_choices=check_choices)


class PooledEmbedding(nnx.Module):
    """Vectors [B, W] -> [B, C]: two linear maps with SiLU between."""

    def __init__(self, width: int, dim: int, **stored):
        self.hidden = nn.Linear(width, dim, use_bias=True, **stored)
        self.out = nn.Linear(dim, dim, use_bias=True, **stored)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, W] -> [B, C] in the compute dtype."""
        return self.out(jax.nn.silu(self.hidden(x)))


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, model: "MMDiT", *, rngs: nnx.Rngs):
        c = model.config
        dim, width = c.embed_dim, c.text.embed_dim
        stored = dict(dtype=model.dtype, param_dtype=dtype_of(c.param_dtype), rngs=rngs)
        self.text_encoder = text_encoder.TextEncoder(
            c.text,
            dtype=jnp.dtype(model.dtype).name,
            param_dtype=c.param_dtype,
            kernel=c.kernel,
            target=model.dims.target,
            rngs=rngs,
        )
        self.context = nn.Linear(
            width, dim, use_bias=True, std=denoiser.xavier(width, dim), **stored
        )
        self.pooled = PooledEmbedding(width, dim, std=0.02, **stored)
        self.patches = denoiser.patch_embedding(model, **stored)
        self.time = nn.TimeEmbedding(dim, features=c.time_features, **stored)
        self.final_norm = denoiser.final_norm(c, rngs=rngs)
        self.final_modulation = nn.Modulation(dim, 2, **stored)
        self.head = denoiser.head(model, **stored)


class MMDiT(backbone.Backbone):
    """A denoiser of images that reads captions: static description plus pure functions
    of its arrays.

    Params beside "layers": "text_encoder", "context" and "pooled" (of its features and
    pooled vector), "patches", "time", "final_modulation", "head". A layer has two
    streams, "text" and "image"; the last one's text has no output, MLP or gate.

    Args:
        config: `config.model`, resolved.
        image_size: side of the images (or latents), pixels.
        channels: of the images.
        out_channels: of what it predicts.
        platform: where it will run; decides "auto" dtypes.
        target: a `kernels.Target` for kernel dispatch, or None.

    Attributes:
        grid: rows and columns of patches.
        num_text: M, tokens of a caption.
        num_patches: N.
        num_tokens: M + N.
        null_label: the caption that says nothing, M ids, or None without dropout.
        told, told_shape, dropout_option: as in `dit.DiT`.
    """

    told: ClassVar[str] = "caption"
    dropout_option: ClassVar[str] = "caption_dropout"

    def __init__(
        self,
        config: Config,
        *,
        image_size: int,
        channels: int,
        out_channels: int,
        platform: str = "cpu",
        target=None,
    ):
        check(config)
        image_sizes.check_images(config, image_size, channels, num_classes=1)
        like = partial(
            MMDiT,
            image_size=image_size,
            channels=channels,
            out_channels=out_channels,
            platform=platform,
            target=target,
        )
        super().__init__(config, platform=platform, like=like)
        c = self.config
        check_choices(c, self.choices)
        self.image_size, self.channels = image_size, channels
        self.out_channels = out_channels
        self.grid = (image_size // c.patch_size,) * 2
        self.positions_grid = (c.positions_grid or self.grid[0],) * 2
        if self.positions_grid[0] < self.grid[0]:
            raise UserError(
                "config.model.positions_grid: must hold the patches of an image; got "
                f"{c.positions_grid}, {self.grid[0]} along each side. Use none, or "
                f"{self.grid[0]} at least."
            )
        self.num_text = c.text.max_len
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_tokens = self.num_text + self.num_patches
        self.told_shape = (self.num_text,)
        nothing = text_encoder.empty(self.num_text)
        self.null_label = nothing if c.caption_dropout else None
        self._make_stacks(target)

    def _make_stacks(self, target) -> None:
        """The layers; the last one, whose text ends there, is a stack of its own."""
        c = self.config
        rope = c.rope if c.positions == "rope" else None
        layout = Layout.of_stages([self.names[:-1], self.names[-1:]])
        count = len(layout.groups)
        self._build(
            layout=layout,
            groups=range(count - 1),
            max_len=self.num_tokens,
            prefix_tokens=0,
            grid=self.grid,
            rope=nn.rope_on_grid(rope, self.grid, self.num_text),
            target=target,
        )
        self.last = Stack(
            layout,
            partial(self._make_block, is_last=True),
            remat=c.remat,
            unroll=c.unroll,
            groups=range(count - 1, count),
        )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """See `Backbone`."""
        return (self.stack, self.last)

    def _make_block(
        self, name: str, *, rngs: nnx.Rngs, is_last: bool = False
    ) -> JointBlock:
        choice = self.choices[name]
        return JointBlock(
            lambda *, rngs: choice.make(self.dims, rngs=rngs),
            self.block_dims,
            is_last=is_last,
            rngs=rngs,
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
        """The surroundings of `batch` images and their captions.

        Args:
            batch: B.
            prng_key: for dropout; needed where `train` and it is on.
            train: whether it is.
            rows: how arrays [B, ...] lie on the devices, or None on one.
        """
        ctx = image_sizes.context(
            self, batch=batch, prng_key=prng_key, train=train, rows=rows
        )
        return ctx.replace(extra_tokens=self.num_text)

    def drop_labels(self, captions: jax.Array, prng_key: jax.Array) -> jax.Array:
        """Captions [B, M] of which a share of caption_dropout is `null_label`."""
        rate = self.config.caption_dropout
        return denoiser.dropped(captions, self.null_label, rate, prng_key)

    def encode(
        self, params: dict, captions: jax.Array, *, rows=None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the text encoder says of captions [B, M]; see `TextEncoder`.

        Raises:
            UserError: for captions of another length.
        """
        if captions.ndim != 2 or captions.shape[1] != self.num_text:
            raise UserError(
                "mmdit: captions must be [B, M] with M = config.model.text.max_len; "
                f"got shape {tuple(captions.shape)}, max_len={self.num_text}."
            )
        return self._merge(params).text_encoder(captions, rows=rows)

    def embed(self, params: dict, images: jax.Array) -> jax.Array:
        """Images [B, H, W, Ch] -> patches [B, N, C] with added positions.

        Raises:
            UserError: for images of another size or number of channels.
        """
        image_sizes.check_batch(self, images, resamples=False)
        x = self._merge(params).patches(images)
        if self.config.positions != "sincos":
            return x
        side = self.grid[0]
        first = (self.positions_grid[0] - side) // 2
        along = (first + np.arange(side)) * self.config.positions_step
        places = nn.sincos_at(along, along, self.config.embed_dim, reaches_end=False)
        return x + jnp.asarray(places, x.dtype)

    def _stream(self, params, start, length: int) -> jax.Array:
        return image_sizes.stream(self, start, length)

    def denoise(
        self,
        params: dict,
        buffers: dict,
        images: jax.Array,
        times: jax.Array,
        text: tuple[jax.Array, jax.Array, jax.Array | None],
        ctx: Context,
    ) -> tuple[jax.Array, StackOut]:
        """`predict` with the text as an encoder gives it: samplers encode it once.

        Args:
            text: features [B, M, W], a pooled vector [B, W], and which tokens are no
                padding, bool [B, M]; None: all.
        """
        image_sizes.check_whole_rows(ctx)
        features, pooled, is_token = text
        ends = self._merge(params)
        condition = ends.time(times) + ends.pooled(pooled)
        ctx = ctx.replace(condition=condition)
        if is_token is not None:
            ids = is_token.astype(jnp.int32)
            ones = jnp.ones((len(ids), self.num_patches), jnp.int32)
            ctx = ctx.replace(segment_ids=jnp.concatenate([ids, ones], axis=1))
        patches = self.embed(params, images)
        x = jnp.concatenate([ends.context(features), patches], axis=1)
        x, out = self.run(params, buffers, x, ctx)
        x = x[:, self.num_text :]
        return denoiser.predicted(self, ends, x, condition, ctx), out

    def predict(
        self,
        params: dict,
        buffers: dict,
        images: jax.Array,
        times: jax.Array,
        captions: jax.Array,
        ctx: Context,
    ) -> tuple[jax.Array, StackOut]:
        """What the network says of noisy images.

        Args:
            params, buffers: as from `init`.
            images: [B, H, W, Ch].
            times: float [B], as the process embeds them.
            captions: int32 [B, M] as `TextEncoder` reads them; rows of `null_label` for
                none.
            ctx: as from `context`.

        Returns:
            float32 (or wider) [B, H, W, out_channels].
        """
        text = self.encode(params, captions, rows=ctx.rows)
        return self.denoise(params, buffers, images, times, text, ctx)

    # ---- counting

    def flops(self) -> float:
        """Forward FLOPs (2 a multiply-add) of one image with its caption."""
        c, b = self.config, self.block_dims
        dim, depth, width = c.embed_dim, len(self.names), c.text.embed_dim
        pixels = c.patch_size**2 * (self.channels + self.out_channels)
        total = 2.0 * self.num_patches * pixels * dim
        total += 2.0 * self.num_text * width * dim
        # Of both streams, the last one's text less; and at the end.
        vectors = 2 * (6 if b.mlp_dim else 3) * depth - (4 if b.mlp_dim else 1) + 2
        total += 2.0 * dim * (vectors * dim + c.time_features + dim + width + dim)
        maps = 3 if nn.ACTIVATIONS[b.activation][1] else 2
        out = self.dims.num_heads * self.dims.head_dim
        unused = 2.0 * self.num_text * dim * (maps * b.mlp_dim + out)
        total += self.layer_flops(self.num_tokens) - unused
        return total + text_encoder.flops(c.text)
