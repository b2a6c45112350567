"""The vision transformer: any bidirectional mixer on the patches of an image.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929, eq. 1-4.
DeiT's sizes Ti and S: arXiv 2012.12877, table 1. Registers: arXiv 2309.16588. Mean
pooling and fixed positions: arXiv 2205.01580. RoPE on the grid: arXiv 2403.13298.

Tokens are [class token, registers, patches in row-major order]. The mixers read that
row as it is; `Context.grid` and `Context.extra_tokens` say what of it is the grid.
Windows and ALiBi of mixers made for sequences count places of the row.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.models import backbone, image_sizes, mixer_choice
from attnjax.models.stack import StackOut

POOL_QUERIES = 32
CONVOLUTIONS = ("circular_conv", "anchored_conv")

# name -> C, layers, heads; the MLP is 4 C wide.
SIZES = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}


@dataclasses.dataclass(frozen=True)
class Config(backbone.Config):
    """`config.model` of a vision transformer; see also `backbone.Config`.

    Attributes:
        name: "vit".
        size: "Ti/16", "S/16", "B/16", "L/16" or with any other patch: gives
            embed_dim, num_layers, num_heads and patch_size, unless they are given
            themselves (none: they are, or have the values told there).
        patch_size: side of a patch, pixels (none: the size's, else 4).
        num_layers: depth; the schedule repeats to fill it (none: a schedule string
            fills the size's; without a size, or as a list of layers, it is taken as
            it is).
        embed_dim: C (none: the size's, else 128).
        num_heads: H query heads (none: the size's, else 4).
        positions: "learned" (added to class token and patches), "sincos" (fixed,
            added to patches), "rope" (each axis turns half of each head), "none";
            "circular_conv": x + a depthwise convolution of x behind the patches, on a
            grid whose ends meet; "anchored_conv": the same, the image turned to its
            anchor first; "anchored_learned": learned, the image turned to the one
            start that all its circular shifts have (`nn.anchored`).
        rope: rotary settings, of each axis. On larger images its angles go on; a
            scaling draws them together.
        positions_grid: patches along the side of the image that learned or sincos
            positions were trained on; other images see them resampled (none: those
            of this model's images).
        pool: what the head reads of the normed tokens: "class_token"; "mean" of the
            patches; "attentive", queries that attend to the patches
            (`nn.AttentivePool`).
        pool_queries: queries of pool=attentive; they divide embed_dim (none: 32).
        class_token: whether there is a class token (none: where the pool reads it).
        registers: learned tokens behind the class token that nothing reads.
        layer_scale: first value of learned factors on what each sub-layer adds
            (none: no factors).
        drop_path: rate in [0, 1) at which the last layer's sub-layers are left out
            for an image in training; it grows linearly from 0 at the first layer.
        head_norm: "batch": batch norm without factors of what is pooled, as probes of
            frozen layers have it; "none".
        head_hidden: width of a layer tanh(W x + b) between what is pooled and the head
            (none: no such layer).
        head_std: standard deviation of the head's weights at the start.
    """

    name: Literal["vit"] = "vit"
    size: str | None = None
    patch_size: int | None = None
    num_layers: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    activation: str = "gelu"
    norm: Literal["rms", "layer"] = "layer"
    use_bias: bool = True
    scale_out_init: bool = False
    positions: Literal[
        "learned",
        "sincos",
        "rope",
        "none",
        "circular_conv",
        "anchored_conv",
        "anchored_learned",
    ] = "learned"
    rope: nn.Rope = dataclasses.field(default_factory=lambda: nn.Rope(theta=100.0))
    positions_grid: int | None = None
    pool: Literal["class_token", "mean", "attentive"] = "class_token"
    pool_queries: int | None = None
    class_token: bool | None = None
    registers: int = 0
    layer_scale: float | None = None
    drop_path: float = 0.0
    head_norm: Literal["none", "batch"] = "none"
    head_hidden: int | None = None
    head_std: float = 0.0

    @property
    def num_pool_queries(self) -> int:
        """M of pool=attentive, with its default worked out."""
        return POOL_QUERIES if self.pool_queries is None else self.pool_queries

    @property
    def extra_tokens(self) -> int:
        """Tokens before the patches."""
        return self.has_class_token + self.registers

    @property
    def has_class_token(self) -> bool:
        """`class_token`, with its default worked out."""
        reads_it = self.pool == "class_token"
        return reads_it if self.class_token is None else self.class_token

    def without_learned_tokens(self) -> "Config":
        """The same without registers, as baselines of equal parameters are."""
        return dataclasses.replace(self, registers=0)


def sized(config: Config) -> Config:
    """The config with the numbers of its size filled in.

    Raises:
        UserError: for a size of another form.
    """
    return image_sizes.filled(config, SIZES, patch=4, example="S/16")


def check(config: Config) -> None:
    """Raise UserError where settings, with their sizes filled in, do not fit."""
    backbone.check(config)
    backbone.check_ranges(
        config,
        ("patch_size", "at least 1", lambda v: v >= 1),
        ("positions_grid", "at least 1", lambda v: v >= 1),
        ("pool_queries", "at least 1", lambda v: v >= 1),
        ("registers", "at least 0", lambda v: v >= 0),
        ("head_hidden", "at least 1", lambda v: v >= 1),
        ("drop_path", "in [0, 1)", lambda v: 0 <= v < 1),
        ("head_std", "at least 0", lambda v: v >= 0),
    )
    dim, queries = config.embed_dim, config.num_pool_queries
    if config.pool == "attentive" and dim % queries:
        divisors = [q for q in range(1, 65) if dim % q == 0]
        raise UserError(
            "config.model.pool_queries: must divide embed_dim; got pool_queries="
            f"{queries}, embed_dim={dim}. Use one of {divisors}."
        )
    if config.pool == "class_token" and not config.has_class_token:
        raise UserError(
            "config.model.class_token: pool=class_token reads it; got class_token="
            "false. Set it to none, or config.model.pool to mean or attentive."
        )
    if config.pool != "attentive" and config.pool_queries is not None:
        raise UserError(
            "config.model.pool_queries: belongs to pool=attentive; got pool="
            f"{config.pool}, pool_queries={queries}. Leave it at none."
        )
    image_sizes.check_positions(config)


def check_choices(config: Config, choices: dict[str, mixer_choice.Choice]) -> None:
    """Raise UserError for mechanisms that have no use for the model's tokens."""
    mixer_choice.check_on_grid(choices, 2, extra_tokens=config.extra_tokens)


def resolve(given: dict) -> dict:
    """Fill and check `config.model`; see `backbone.resolve`."""
    return backbone.resolve(
        Config, given, sized=sized, check=check, check_choices=check_choices
    )


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, model: "ViT", *, rngs: nnx.Rngs):
        c = model.config
        stored = dict(dtype=model.dtype, param_dtype=dtype_of(c.param_dtype), rngs=rngs)
        table = partial(nn.Embedding, dim=c.embed_dim, std=c.init_std, **stored)
        self.patches = nn.PatchEmbedding(
            c.patch_size, model.channels, c.embed_dim, use_bias=c.use_bias, **stored
        )
        has_class = c.has_class_token
        self.class_token = table(1) if has_class else None
        self.registers = table(c.registers) if c.registers else None
        places = model.positions_grid[0] * model.positions_grid[1]
        self.position_embedding = (
            table(has_class + places)
            if c.positions in ("learned", "anchored_learned")
            else None
        )
        self.conv_positions = (
            nn.DepthwiseConvolution(
                c.embed_dim, circular=True, use_bias=c.use_bias, **stored
            )
            if c.positions in CONVOLUTIONS
            else None
        )
        self.final_norm = backbone.final_norm(c, rngs=rngs)
        self.pool = (
            nn.AttentivePool(c.embed_dim, c.num_pool_queries, **stored)
            if c.pool == "attentive"
            else None
        )
        linear = partial(nn.Linear, use_bias=c.use_bias, **stored)
        self.head_hidden = (
            linear(c.embed_dim, c.head_hidden, std=c.embed_dim**-0.5)
            if c.head_hidden
            else None
        )
        self.head = linear(
            c.head_hidden or c.embed_dim,
            model.num_classes,
            std=c.head_std,
        )


class ViT(backbone.Backbone):
    """A classifier of images: static description plus pure functions of its arrays.

    Params beside "layers": "patches", "class_token", "registers",
    "position_embedding" (its first row is the class token's, where there is one),
    "conv_positions", "final_norm", "pool", "head_hidden", "head", each where the config
    has it. Buffers have "head_norm", the running statistics of head_norm=batch.

    Args:
        config: `config.model`, resolved.
        image_size: side of the images, pixels.
        channels: of the images.
        num_classes: of the head.
        platform: where it will run; decides "auto" dtypes.
        target: a `kernels.Target` for kernel dispatch, or None.

    Attributes:
        grid: rows and columns of patches.
        positions_grid: the same of the images that its positions were trained on.
        num_tokens: T, extra tokens and patches.
    """

    pools_tokens = True

    def __init__(
        self,
        config: Config,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        platform: str = "cpu",
        target=None,
    ):
        config = sized(config)
        check(config)
        image_sizes.check_images(config, image_size, channels, num_classes)
        data = dict(image_size=image_size, channels=channels, num_classes=num_classes)
        like = partial(ViT, **data, platform=platform, target=target)
        super().__init__(config, platform=platform, like=like)
        c = self.config
        self.image_size, self.channels = image_size, channels
        self.num_classes = num_classes
        self.grid = (image_size // c.patch_size,) * 2
        self.positions_grid = (c.positions_grid or self.grid[0],) * 2
        self.num_tokens = c.extra_tokens + self.grid[0] * self.grid[1]
        check_choices(c, self.choices)
        rope = c.rope if c.positions == "rope" else None
        self._build(
            max_len=self.num_tokens,
            prefix_tokens=c.extra_tokens,
            grid=self.grid,
            rope=nn.rope_on_grid(rope, self.grid, c.extra_tokens),
            target=target,
        )

    def _block_dims(self):
        c = self.config
        return dataclasses.replace(
            super()._block_dims(),
            layer_scale=c.layer_scale,
            drop_path=c.drop_path,
            num_layers=len(self.names),
        )

    def _make_ends(self, rngs: nnx.Rngs) -> Ends:
        return Ends(self, rngs=rngs)

    def init(self, seed: int | jax.Array) -> tuple[dict, dict]:
        """(params, buffers) as of every model; see there."""
        params, buffers = super().init(seed)
        if self.config.head_norm == "batch":
            buffers["head_norm"] = nn.batch_statistics(self.config.embed_dim)
        return params, buffers

    # ---- running

    def context(
        self, *, batch: int, prng_key=None, train: bool = False, rows=None
    ) -> Context:
        """The surroundings of `batch` images.

        Args:
            batch: B.
            prng_key: for dropout and drop-path; needed where `train` and one is on.
            train: whether they are on.
            rows: how arrays [B, ...] lie on the devices, or None on one.
        """
        return image_sizes.context(
            self, batch=batch, prng_key=prng_key, train=train, rows=rows
        )

    def embed(self, params: dict, images: jax.Array) -> jax.Array:
        """Images [B, H, W, Ch] -> tokens [B, T, C] with added positions.

        Raises:
            UserError: for images of another size or number of channels.
        """
        image_sizes.check_batch(self, images)
        ends = self._merge(params)
        x = ends.patches(self.from_anchor(images))
        if ends.conv_positions is not None:
            x = x + ends.conv_positions(x, self.grid)
        fixed, first = self._added_positions(ends)
        x = x if fixed is None else x + fixed.astype(x.dtype)
        extra = []
        if ends.class_token is not None:
            token = ends.class_token(jnp.arange(1))
            extra.append(token if first is None else token + first)
        if ends.registers is not None:
            extra.append(ends.registers(jnp.arange(self.config.registers)))
        rows = [jnp.broadcast_to(e, (len(x), *e.shape)) for e in extra]
        return jnp.concatenate([*rows, x], axis=1)

    def from_anchor(self, images: jax.Array) -> jax.Array:
        """[B, H, W, Ch] as the patches are cut from it."""
        positions, stride = self.config.positions, (self.config.patch_size,) * 2
        if positions not in ("anchored_conv", "anchored_learned"):
            return images
        # Learned positions know one place from another, convolutions do not.
        invariant = positions == "anchored_learned"
        return nn.anchored(images, stride, invariant=invariant)[0]

    def _added_positions(self, ends: Ends):
        """[P, C] for the patches, and [1, C] for the class token; None where none."""
        source, dim = self.positions_grid, self.config.embed_dim
        if self.config.positions == "sincos":
            return jnp.asarray(nn.sincos_2d(self.grid, dim, trained=source)), None
        if ends.position_embedding is None:
            return None, None
        skip = int(ends.class_token is not None)
        table = ends.position_embedding.table[...]
        places = nn.resample_table(table[skip:], source, self.grid).astype(self.dtype)
        return places, (table[:1].astype(self.dtype) if skip else None)

    def _stream(self, params, start, length: int) -> jax.Array:
        return image_sizes.stream(self, start, length)

    def hidden(
        self, params: dict, buffers: dict, images: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """The normed output of the last layer, [B, T, C] in the compute dtype; times
        what layers hand on to weigh it (`Carried.weighs`).

        Args:
            params, buffers: as from `init`.
            images: [B, H, W, Ch].
            ctx: as from `context`.
        """
        image_sizes.check_whole_rows(ctx)
        x, out = self.run(params, buffers, self.embed(params, images), ctx)
        x = self.weighed(x, out, "residual")
        x = self._merge(params).final_norm(x)
        return ctx.spread(self.weighed(x, out, "normed")), out

    def features(
        self, params: dict, buffers: dict, images: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """One vector an image, [B, C] in the compute dtype; arguments of `hidden`."""
        x, out = self.hidden(params, buffers, images, ctx)
        return self.pooled(params, x), out

    def pooled(self, params: dict, hidden: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, C] by `config.pool`."""
        pool = self.config.pool
        if pool == "class_token":
            return hidden[:, 0]
        places = hidden[:, self.config.extra_tokens :]
        if pool == "mean":
            wide = places.astype(jnp.promote_types(places.dtype, jnp.float32))
            return wide.mean(axis=1).astype(places.dtype)
        return self._merge(params).pool(places)

    def logits(
        self, params: dict, buffers: dict, images: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """float32 (or wider) [B, classes]; arguments of `hidden`."""
        pooled, out = self.features(params, buffers, images, ctx)
        if self.config.head_norm == "batch":
            pooled, now = nn.batch_norm(pooled, buffers["head_norm"], train=ctx.train)
            whole = out.buffers | {"head_norm": now}
            out = dataclasses.replace(out, buffers=whole)
        ends = self._merge(params)
        if ends.head_hidden is not None:
            pooled = jnp.tanh(ends.head_hidden(pooled))
        logits = ends.head(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), out

    # ---- counting

    def flops(self) -> float:
        """Forward FLOPs (2 a multiply-add) of one image."""
        c = self.config
        places = self.grid[0] * self.grid[1]
        total = 2.0 * places * c.patch_size**2 * self.channels * c.embed_dim
        if c.positions in CONVOLUTIONS:
            total += 2.0 * 9 * places * c.embed_dim
        if c.pool == "attentive":
            weights = c.num_pool_queries * c.embed_dim
            total += 2.0 * places * (weights + c.embed_dim**2 + c.embed_dim)
        width = c.head_hidden or c.embed_dim
        total += 2.0 * c.embed_dim * (c.head_hidden or 0)
        total += 2.0 * width * self.num_classes
        return total + self.layer_flops(self.num_tokens)
