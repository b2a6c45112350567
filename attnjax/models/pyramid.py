"""A classifier of images in stages: ever fewer places, ever wider layers.

A convolutional stem makes a grid of the image; each stage has a width, heads, depth,
grid and schedule of its own, and between two stages the sides of the grid are halved.
Any bidirectional mixer stands in any stage; those that read a grid get the stage's.

Source of the shape: Liu et al., "Swin Transformer", arXiv 2103.14030, section 3.1 (four
stages, widths doubled, 2 x 2 places made one). Stems, positions and heads: Ding et
al., "DaViT", arXiv 2204.03645, section 3.3 and the authors' code; Tu et al., "MaxViT",
arXiv 2204.01697, section 3.3.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core import schema
from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.models import (
    backbone,
    image_sizes,
    mixer_choice,
    pyramid_mbconv,
    pyramid_parts,
    schedule,
)
from attnjax.models.layout import Layout
from attnjax.models.pyramid_parts import Stage
from attnjax.models.stack import StackOut, joined

# name -> C and heads of the first stage, layers of each: those of DaViT (two of our
# layers for each of its pairs) and of L2ViT, arXiv 2501.16182.
SIZES = {
    "T": (96, 3, (2, 2, 6, 2)),
    "S": (96, 3, (2, 2, 18, 2)),
    "B": (128, 4, (2, 2, 18, 2)),
}
PLAIN = (32, 1, (2, 2, 2, 2))


@dataclasses.dataclass(frozen=True)
class Config(backbone.Config):
    """`config.model` of a pyramid; see also `backbone.Config`.

    Attributes:
        name: "pyramid".
        size: "T", "S" or "B": gives embed_dim, num_heads and depths, unless they are
            given themselves (none: they are, or have the values told there).
        layers: a schedule string that fills every stage, or a list with one for each.
        depths: layers of each stage (none: the size's, else 2, 2, 2, 2).
        num_layers: layers of all stages (none: the sum of depths, which it must be).
        embed_dim: C of the first stage (none: the first of widths, the size's, or 32).
        widths: C of each stage (none: twice that of the stage before).
        num_heads: query heads of the first stage (none: the first of heads, the
            size's, or 1).
        heads: of each stage (none: as many more as the stage is wider).
        head_dim: D in every stage (none: C / H of each).
        mlp_dim: MLP width of the first stage, as in every model; that of the others is
            to C what it is there.
        patch_size: pixels along the side of a place of the first stage's grid.
        stem: "patch": one convolution of patches beside one another; "overlap": of
            patches nearly twice as long, 7 pixels of patch_size=4 (DaViT); "conv":
            convolutions of 3 x 3 that halve the sides, with norm and activation
            between (L2ViT). A norm follows. "double": a convolution of 3 x 3 at a
            stride of 1 or 2, batch norm, activation, and another one (MaxViT).
        stem_dim: its channels, with downsampling=mbconv (none: embed_dim).
        downsampling: behind a norm, "patch": 2 x 2 places made one; "overlap": 3 x 3
            at every second; "merge": 2 x 2 made one without a bias, in front of the
            norm (SwinV2); "mbconv": an MBConv at every second place, in front of the
            first stage too, so that the stem has half of patch_size.
        mbconv: MBConvs in front of layers, see `nn.MBConvConfig`. With downsampling=
            mbconv the one that a stage begins with is its first layer's.
        cpe: conditional positions, x + a depthwise convolution of x, in front of each
            sub-layer.
        positions: "rope" (each axis of the stage's grid turns half of each head),
            "none"; "anchored": the image is turned to its anchor for all strides
            together (`nn.anchored`), and ends of grids meet for cpe, so that circular
            shifts of the image are shifts by whole places in every stage.
        pool: what the head reads: "mean_norm", the normed mean of the last stage's
            places; "norm_mean", the mean of the normed places.
        layer_scale, drop_path, head_hidden, head_std: as in `vit.Config`; drop_path
            grows over the layers of all stages.
    """

    name: Literal["pyramid"] = "pyramid"
    size: Literal["T", "S", "B"] | None = None
    depths: tuple[int, ...] | None = None
    num_layers: int | None = None
    embed_dim: int | None = None
    widths: tuple[int, ...] | None = None
    num_heads: int | None = None
    heads: tuple[int, ...] | None = None
    activation: str = "gelu"
    norm: Literal["rms", "layer"] = "layer"
    use_bias: bool = True
    scale_out_init: bool = False
    patch_size: int = 4
    stem: Literal["patch", "overlap", "conv", "double"] = "patch"
    stem_dim: int | None = None
    downsampling: Literal["patch", "overlap", "merge", "mbconv"] = "patch"
    mbconv: nn.MBConvConfig = dataclasses.field(default_factory=nn.MBConvConfig)
    cpe: bool = False
    positions: Literal["rope", "none", "anchored"] = "none"
    rope: nn.Rope = dataclasses.field(default_factory=lambda: nn.Rope(theta=100.0))
    pool: Literal["mean_norm", "norm_mean"] = "mean_norm"
    layer_scale: float | None = None
    drop_path: float = 0.0
    head_hidden: int | None = None
    head_std: float = 0.0

    @property
    def stage_heads(self) -> tuple[int, ...]:
        """H of each stage, of a config with its sizes filled in."""
        return self.heads or tuple(
            self.num_heads * width // self.embed_dim for width in self.widths
        )

    def stage_schedules(self) -> list[tuple[str, ...]]:
        """The instance names of the layers of each stage.

        Raises:
            UserError: where a schedule does not fill its stage.
        """
        layers = self.layers
        own = [layers] * len(self.depths) if isinstance(layers, str) else list(layers)
        if len(own) != len(self.depths):
            raise UserError(
                "config.model.layers: a list has one schedule for each stage; got "
                f"{len(own)} for the {len(self.depths)} of depths={list(self.depths)}. "
                "Give as many, or one schedule string for all."
            )
        found = []
        for i, (text, depth) in enumerate(zip(own, self.depths, strict=True)):
            names = schedule.parse(text)
            if depth % len(names):
                raise UserError(
                    f"config.model.depths: stage {i + 1} must hold its schedule a "
                    f"whole number of times; got depths={list(self.depths)}, a "
                    f"schedule of {len(names)} layers ({text!r}). Change one of them."
                )
            found.append(names * (depth // len(names)))
        return found

    def schedule(self) -> tuple[str, ...]:
        """The instance name of each layer, all stages."""
        return sum(self.stage_schedules(), ())

    def stacked_schedules(self) -> list[tuple[str, ...]]:
        """`stage_schedules` as the layout has them: layers with an MBConv marked."""
        return pyramid_mbconv.marked(
            self.stage_schedules(),
            every=self.mbconv.every,
            in_first=self.downsampling != "mbconv",
        )

    def mlp_parameters_per_unit(self) -> float:
        """See `backbone.Config`: a unit in the first stage is more in wider ones."""
        total = 0.0
        for depth, width in zip(self.depths, self.widths, strict=True):
            one = nn.mlp_parameters_per_unit(
                width, activation=self.activation, use_bias=self.use_bias
            )
            total += depth * one * width / self.embed_dim
        return total


def sized(config: Config) -> Config:
    """The config with the numbers of its size, and of each stage, filled in.

    Raises:
        UserError: for lists of different lengths, or that contradict other numbers.
    """
    own_dim, own_heads, own_depths = SIZES.get(config.size, PLAIN)
    backbone.check_ranges(
        config,
        ("embed_dim", "at least 1", lambda v: v >= 1),
        ("num_heads", "at least 1", lambda v: v >= 1),
    )
    depths = own_depths if config.depths is None else config.depths
    _check_lengths(config, len(depths))
    dim = config.embed_dim or (config.widths or (own_dim,))[0]
    heads = config.num_heads or (config.heads or (own_heads,))[0]
    widths = config.widths or tuple(dim * 2**i for i in range(len(depths)))
    total = sum(depths) if config.num_layers is None else config.num_layers
    for name, of, value, wanted in (
        ("embed_dim", "the first of widths", dim, widths[0]),
        ("num_heads", "the first of heads", heads, (config.heads or (heads,))[0]),
        ("num_layers", "the sum of depths", total, sum(depths)),
    ):
        if value != wanted:
            raise UserError(
                f"config.model.{name}: must be {of}; got {value}, {of} is {wanted}. "
                f"Leave {name} at none."
            )
    return dataclasses.replace(
        config,
        embed_dim=dim,
        num_heads=heads,
        num_layers=total,
        depths=depths,
        widths=widths,
    )


def _check_lengths(config: Config, stages: int) -> None:
    for name in ("depths", "widths", "heads"):
        values = getattr(config, name)
        if values is None:
            continue
        if len(values) != stages or not values:
            raise UserError(
                f"config.model.{name}: must have an entry for each of the {stages} "
                f"stages of depths; got {list(values)}. Give as many, or leave it at "
                "none."
            )
        if any(value < 1 for value in values):
            raise UserError(
                f"config.model.{name}: must be at least 1 each; got {list(values)}."
            )


def check(config: Config) -> None:
    """Raise UserError where settings, with their sizes filled in, do not fit."""
    backbone.check(config)
    backbone.check_ranges(
        config,
        ("patch_size", "at least 1", lambda v: v >= 1),
        ("head_hidden", "at least 1", lambda v: v >= 1),
        ("stem_dim", "at least 1", lambda v: v >= 1),
        ("drop_path", "in [0, 1)", lambda v: 0 <= v < 1),
        ("head_std", "at least 0", lambda v: v >= 0),
    )
    pyramid_mbconv.check(config)
    side, dim = pyramid_mbconv.stem_side(config), pyramid_mbconv.stem_dim(config)
    halvings = side.bit_length() - 1
    if config.stem == "conv" and (side < 2 or side != 2**halvings):
        raise UserError(
            "config.model.patch_size: must be 2, 4, 8, ... for stem=conv, which halves "
            f"the sides (4, 8, ... with downsampling=mbconv); got {config.patch_size}. "
            "Change it, or use stem=patch or overlap."
        )
    if config.stem == "conv" and dim % 2 ** (halvings - 1):
        raise UserError(
            f"config.model.embed_dim: must be a multiple of {2 ** (halvings - 1)} for "
            f"stem=conv with patch_size={side}, whose widths double; got "
            f"{dim}. Change it, or use stem=patch or overlap."
        )
    for name in ("stem", "downsampling"):
        is_beside = getattr(config, name) in ("patch", "merge")
        if config.positions == "anchored" and not is_beside:
            raise UserError(
                f"config.model.{name}: positions=anchored needs patches beside one "
                f"another, with no zeros around the image; got {name}="
                f"{getattr(config, name)}. Set it to patch, or use other positions."
            )
    for i in range(len(config.depths)):
        with _told(config, i):
            own = stage_config(config, i)
            backbone.check(own)
            if config.positions == "rope":
                image_sizes.check_rope(own)


def stage_config(config: Config, i: int) -> backbone.Config:
    """The settings of the layers of stage i, as those of a model of one width."""
    names = config.stage_schedules()[i]
    width = config.widths[i]
    mlp = backbone.mlp_width(config)
    common = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(backbone.Config)
    }
    return backbone.Config(
        **common
        | {
            "layers": names,
            "num_layers": None,
            "embed_dim": width,
            "num_heads": config.stage_heads[i],
            "mlp_dim": mlp and max(1, round(mlp * width / config.embed_dim)),
            "mixers": {k: v for k, v in config.mixers.items() if k in names},
        }
    )


@contextlib.contextmanager
def _told(config: Config, i: int) -> Iterator[None]:
    """What is refused here is refused of stage i, from 0."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"stage {i + 1} of {len(config.depths)} (width {config.widths[i]}): {error}"
        ) from error


def _check_streams(stage: Stage) -> None:
    """Raise UserError for a mixer with a residual stream beside that of the image, or
    one that hands on numbers of each token."""
    names = ", ".join(sorted(set(stage.names)))
    if stage.carried:
        raise UserError(
            "config.model.layers: tokens are merged between stages, so that numbers of "
            f"each token cannot be handed on; got {names}. Choose other mixers or "
            "settings, or config.model.name=vit."
        )
    if jax.eval_shape(stage._streams, jax.random.key(0)):
        raise UserError(
            "config.model.layers: an extra residual stream has one width from the "
            f"first layer to the last; got {names}. Choose other mixers or settings, "
            "or config.model.name=vit."
        )


def resolve(given: dict) -> dict:
    """Fill and check `config.model`: JSON in, JSON out. What `size` and the first stage
    give stays none, so that others can be laid over it."""
    filled = schema.resolve(Config, given, path="config.model")
    config = sized(schema.build(Config, filled, path="config.model"))
    names = config.schedule()
    filled["mixers"] = mixer_choice.resolve_mixers(names, filled["mixers"])
    made = mixer_choice.choices(filled["mixers"])
    mixer_choice.check_on_grid(made, 2, extra_tokens=0)
    check(config)
    return filled


class Pyramid(backbone.Backbone):
    """A classifier of images: static description plus pure functions of its arrays.

    Layers have absolute numbers through all stages: those of stage i follow those of
    stage i - 1, and no scanned group reaches over the end of a stage.

    Params beside "layers": "stem", "downsampling", "final_norm", "head_hidden", "head",
    each where the config has it.

    Args:
        config: `config.model`, resolved.
        image_size: side of the images, pixels.
        channels: of the images.
        num_classes: of the head.
        platform: where it will run; decides "auto" dtypes.
        target: a `kernels.Target` for kernel dispatch, or None.

    Attributes:
        stages: each a `Stage` with its grid, names and dims.
        dims, block_dims: of the layers of the first stage.
        num_tokens: places of the first stage.
    """

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
        _check_images(config, image_size, channels, num_classes)
        data = dict(image_size=image_size, channels=channels, num_classes=num_classes)
        like = partial(Pyramid, **data, platform=platform, target=target)
        super().__init__(config, platform=platform, like=like)
        mixer_choice.check_on_grid(self.choices, 2, extra_tokens=0)
        self.image_size, self.channels = image_size, channels
        self.num_classes = num_classes
        self.layout = Layout.of_stages(self.config.stacked_schedules())
        self.stages = self._make_stages(platform=platform, target=target)
        first = self.stages[0]
        self.dims, self.block_dims = first.dims, first.block_dims
        self.grid, self.num_tokens = first.grid, first.num_tokens
        ends = nnx.eval_shape(lambda: self._make_ends(nnx.Rngs(0)))
        self._ends_flops = ends.flops(image_size, [s.num_tokens for s in self.stages])
        self._ends, _, _ = nnx.split(ends, nnx.Param, nn.Buffer)

    def _make_stages(self, **where) -> list[Stage]:
        c, first = self.config, 0
        block = dict(
            layer_scale=c.layer_scale,
            drop_path=c.drop_path,
            conv_positions=c.cpe,
            circular=c.positions == "anchored",
        )
        stages = []
        for i, names in enumerate(c.stacked_schedules()):
            side = self.image_size // (c.patch_size * 2**i)
            groups = range(first, first + len(schedule.groups(names)))
            first = groups.stop
            rope = c.rope if c.positions == "rope" else None
            with _told(c, i):
                made = Stage(
                    stage_config(c, i),
                    grid=(side, side),
                    layout=self.layout,
                    groups=groups,
                    block=block,
                    mbconv=c.mbconv,
                    rope=nn.rope_on_grid(rope, (side, side), 0),
                    **where,
                )
                _check_streams(made)
            stages.append(made)
        return stages

    def _make_ends(self, rngs: nnx.Rngs) -> nnx.Module:
        return pyramid_parts.Ends(
            self.config,
            self.stages[-1],
            channels=self.channels,
            num_classes=self.num_classes,
            rngs=rngs,
        )

    def init(self, seed: int | jax.Array) -> tuple[dict, dict]:
        """(params, buffers) as of every model; see `Backbone.init`."""
        key = jax.random.key(seed)
        ends = self._make_ends(nnx.Rngs(params=key))
        params, state_of_ends = nn.materialize(ends, key), _buffers_of(ends)
        params["layers"], buffers = {}, {}
        for stage in self.stages:
            own, state = stage.stack.init(key)
            params["layers"] |= own
            buffers |= state
        return params, {"layers": buffers, "streams": {}, **state_of_ends}

    # ---- running

    def _merge(self, params: dict, buffers: dict) -> nnx.Module:
        """The ends with their arrays."""
        own = {key: value for key, value in params.items() if key != "layers"}
        return nnx.merge(self._ends, own, buffers.get("ends", {}))

    def context(
        self, *, batch: int, prng_key=None, train: bool = False, rows=None
    ) -> Context:
        """The surroundings of `batch` images, in the first stage.

        Args:
            batch: B.
            prng_key: for dropout and drop-path; needed where `train` and one is on.
            train: whether they are on.
            rows: how arrays [B, ...] lie on the devices, or None on one.
        """
        return image_sizes.context(
            self.stages[0], batch=batch, prng_key=prng_key, train=train, rows=rows
        )

    def hidden(
        self, params: dict, buffers: dict, images: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """The output of the last layer, [B, T, C] of the last stage in the compute
        dtype; normed with pool=norm_mean alone.

        Args:
            params, buffers: as from `init`.
            images: [B, H, W, Ch].
            ctx: as from `context`.

        Raises:
            UserError: for images of another size or number of channels.
        """
        image_sizes.check_batch(self, images)
        image_sizes.check_whole_rows(ctx)
        if self.config.positions == "anchored":
            images, _ = nn.anchored(images, (_stride(self.config),) * 2)
        ends = self._merge(params, buffers)
        image, parts = ends.stem(images, train=ctx.train), []
        for i, stage in enumerate(self.stages):
            image = ends.entered(image, i, ctx)
            x = ctx.spread(image.reshape(len(image), stage.num_tokens, -1))
            if self.config.dropout and ctx.train and not i:
                key = jax.random.fold_in(ctx.prng_key, 0x7FFFFFFF)
                x = nn.dropout(x, self.config.dropout, prng_key=key, train=True)
            places = jnp.arange(stage.num_tokens, dtype=jnp.int32)
            here = ctx.replace(
                positions=jnp.broadcast_to(places, x.shape[:2]),
                grid=stage.grid,
                embeddings=x,
            )
            x, part = stage.stack.part(params["layers"], buffers["layers"], x, here)
            parts.append(part)
            image = x.reshape(len(x), *stage.grid, -1)
        out = joined(parts)
        whole = buffers | {"layers": out.buffers} | _buffers_of(ends)
        out = dataclasses.replace(out, buffers=whole)
        x = ends.final_norm(x) if self.config.pool == "norm_mean" else x
        return ctx.spread(x), out

    def features(
        self, params: dict, buffers: dict, images: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """One vector an image, [B, C] in the compute dtype; arguments of `hidden`."""
        x, out = self.hidden(params, buffers, images, ctx)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        pooled = wide.mean(axis=1).astype(x.dtype)
        if self.config.pool == "mean_norm":
            pooled = self._merge(params, buffers).final_norm(pooled)
        return pooled, out

    def logits(
        self, params: dict, buffers: dict, images: jax.Array, ctx: Context
    ) -> tuple[jax.Array, StackOut]:
        """float32 (or wider) [B, classes]; arguments of `hidden`."""
        pooled, out = self.features(params, buffers, images, ctx)
        ends = self._merge(params, buffers)
        if ends.head_hidden is not None:
            pooled = jnp.tanh(ends.head_hidden(pooled))
        logits = ends.head(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), out

    # ---- counting

    def flops(self) -> float:
        """Forward FLOPs (2 a multiply-add) of one image."""
        c, total = self.config, self._ends_flops
        width = c.head_hidden or c.widths[-1]
        total += 2.0 * c.widths[-1] * (c.head_hidden or 0)
        total += 2.0 * width * self.num_classes
        return total + sum(stage.flops() for stage in self.stages)


def _buffers_of(ends: nnx.Module) -> dict:
    """The model's "ends" in its buffers, where they have any."""
    found = nnx.to_pure_dict(nnx.state(ends, nn.Buffer))
    return {"ends": found} if found else {}


def _stride(config: Config) -> int:
    """Pixels along the side of a place of the last stage's grid."""
    return config.patch_size * 2 ** (len(config.depths) - 1)


def _check_images(config: Config, image_size: int, channels: int, num_classes: int):
    stride = _stride(config)
    if image_size < 1 or image_size % stride:
        raise UserError(
            "config.data.image_size: must be a multiple of all strides together, "
            f"patch_size x 2^(stages - 1) = {config.patch_size} x "
            f"{stride // config.patch_size} = {stride}; got {image_size}. Change it, "
            "config.model.patch_size, or the number of stages (config.model.depths)."
        )
    image_sizes.check_counts(config, channels=channels, num_classes=num_classes)
