"""Dual attention: windows over the tokens, and groups over the channels.

Spatial: attention inside windows of P neighbours along each axis. Channel: the channels
of a head attend to one another, and a channel's vector over all N tokens is what is
compared. With the paper's names of the projections, for each head of D channels,

    A = softmax(D^-1/2 K^T V), [D, D], each row divided by its sum;  y_n = A q_n.

Source: Ding et al., "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645,
equations 2 and 3; the authors' released code, whose roles of the projections these are.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.spec import ON_GRID, SEES_BOTH_WAYS, MixerDims, MixerSpec, no_state
from attnjax.mixers import attention
from attnjax.mixers.slots import sizes, windowed
from attnjax.mixers.slots import windows as cuts
from attnjax.mixers.slots.base import Call

ORDERS = {
    "spatial_channel": ("spatial", "channel"),
    "channel_spatial": ("channel", "spatial"),
    "parallel": ("spatial", "channel"),
    "spatial": ("spatial",),
    "channel": ("channel",),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer.

    Attributes:
        order: "spatial_channel", "channel_spatial": one part behind the other, with a
            norm between; "parallel": side by side; "spatial", "channel": one alone.
        window: P, tokens of a window along each axis, one number for all or one for
            each; windows that reach over the end of an axis are filled up.
        mask_padding: whether what fills them up is left out. If not, it is tokens of
            zeros, which keys and values are made of, as in the authors' code.
        channel_scale: of the channels' products: "head_dim", 1 / sqrt(D); "tokens",
            1 / sqrt(N), so that they do not grow with the number of tokens.
        conv: positions by a convolution: the parts read x + conv(x), conv with one
            kernel of 3 places along each axis for each channel. Extra tokens are
            passed by.
        num_kv_heads: K (none: the model's); in the channels' part heads that share
            them share A.
        positions: of the spatial part: "inherit": the model's rotary positions if it
            has them; "rope"; "none".
        qk_norm: RMSNorm of each head's query and key (none: the model's).
        output: options of mechanisms in order, as in `attention`, of each part; none
            that changes how whole rows attend.
    """

    order: Literal[
        "spatial_channel", "channel_spatial", "parallel", "spatial", "channel"
    ] = "spatial_channel"
    window: int | tuple[int, ...] = 7
    mask_padding: bool = True
    channel_scale: Literal["head_dim", "tokens"] = "head_dim"
    conv: bool = False
    num_kv_heads: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    qk_norm: bool | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        cuts.check_numbers("window", self.window, 1)


def channel_map(key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """A [B, K, D, E] of key [B, T, K, D] and value [B, T, K, E], in float32 or wider:
    how the channels of a value are weighed for each channel of a key."""
    wide = jnp.promote_types(key.dtype, jnp.float32)
    products = jnp.einsum("btkd,btke->bkde", key, value, preferred_element_type=wide)
    return jax.nn.softmax(scale * products, axis=-1)


def reference(query, key, value, *, scale=None):
    """The definition of the channels' part for one layer's heads.

    Args:
        query: [B, T, H, D].
        key: [B, T, K, D], K divides H.
        value: [B, T, K, D].
        scale: of the products (None: 1 / sqrt(D)).

    Returns:
        [B, T, H, D].
    """
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], 2) for a in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = jax.nn.softmax(scale * jnp.einsum("bthd,bthe->bhde", key, value), axis=-1)
    return jnp.einsum("bhde,bthe->bthd", weights, query)


def windows_of(config: Config, grid: tuple[int, ...]) -> cuts.Windows:
    """How the spatial part cuts the grid. Where padding is left out a window is no
    longer than its axis."""
    size = cuts.per_axis(config.window, len(grid), owner="davit", name="window")
    if config.mask_padding:
        size = tuple(min(pair) for pair in zip(size, grid, strict=True))
    return cuts.Windows(grid, size)


class Spatial(windowed.Windowed):
    """Attention inside windows; parameters as in `attention`."""

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        grid = cuts.need_grid(dims, owner="davit")
        windows = windows_of(config, grid)
        self.cut = None if config.mask_padding else windows
        if self.cut is not None:
            windows = dataclasses.replace(windows, grid=windows.whole)
            dims = _on(windows.grid, dims)
        layer = layer_config(config)
        super().__init__(layer, dims, windows=windows, owner="davit", rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context):
        """[B, T, C] -> [B, T, C] in the compute dtype; where padding is not left out
        it is tokens like the others meanwhile."""
        if self.cut is None:
            return super().__call__(x, ctx)
        extra = ctx.extra_tokens
        filled = jnp.concatenate([x[:, :extra], self.cut.fill(x[:, extra:])], axis=1)
        places = jnp.arange(filled.shape[1], dtype=jnp.int32)
        within = ctx.replace(
            grid=self.cut.whole,
            positions=jnp.broadcast_to(places, filled.shape[:2]),
        )
        y, out = super().__call__(filled, within)
        grid = self.cut.crop(y[:, extra:])
        return jnp.concatenate([y[:, :extra], grid], axis=1), out


def _on(grid: tuple[int, ...], dims: MixerDims) -> MixerDims:
    """The same model on another grid."""
    rope = dims.rope
    if isinstance(rope, nn.AxialRope):
        rope = dataclasses.replace(rope, grid=grid)
    return dataclasses.replace(dims, grid=grid, rope=rope)


class Channel(attention.Mixer):
    """Attention of the channels of each head; parameters as in `attention`."""

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        layer = dataclasses.replace(layer_config(config), positions="none")
        super().__init__(layer, dims, rngs=rngs)
        self.by_tokens = config.channel_scale == "tokens"
        windowed.refuse_attend(self, "davit")

    def known_hooks(self) -> tuple[str, ...]:
        """Those of `attention` but scores and weights of tokens, and A,
        [B, K, D, D]."""
        known = super().known_hooks()
        of_tokens = windowed.LAID_OPEN
        return (*(what for what in known if what not in of_tokens), "channel_map")

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """(query [B, T, H, D], key and value [B, T, K, D]) to the heads
        [B, T, H, D]."""
        del x, mask, operands, spec
        query, key, value = qkv
        scale = (query.shape[1] if self.by_tokens else query.shape[3]) ** -0.5
        weights = channel_map(key, value, scale=scale)
        weights = call.probe("channel_map", weights, head_axis=1).astype(query.dtype)
        batch, length, _, dim = query.shape
        groups = query.reshape(batch, length, key.shape[2], -1, dim)
        return jnp.einsum("bkde,btkge->btkgd", weights, groups).reshape(query.shape)


class Mixer(windowed.Parts):
    """One layer: parameters under `spatial` and `channel`, `between`, and with conv
    `conv_kernel` [3^rank, C] and `conv_bias` [C]."""

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        kinds = {"spatial": Spatial, "channel": Channel}
        names = ORDERS[config.order]
        parts = {name: functools.partial(kinds[name], config, dims) for name in names}
        is_parallel, spec = config.order == "parallel", SPEC.of(config)
        super().__init__(spec, dims, parts, parallel=is_parallel, rngs=rngs)
        self.has_conv = config.conv
        if config.conv:
            rank = len(cuts.need_grid(dims, owner="davit"))
            shape = (3**rank, dims.embed_dim)
            normal = jax.nn.initializers.normal(dims.init_std)
            zeros = jax.nn.initializers.zeros
            stored = dtype_of(dims.param_dtype)
            self.conv_kernel = nn.param(rngs, shape, normal, dtype=stored)
            self.conv_bias = nn.param(rngs, shape[1:], zeros, dtype=stored)

    def enter(self, x: jax.Array, ctx: Context) -> jax.Array:
        """x + conv(x) on the grid's tokens."""
        if not self.has_conv:
            return x
        dtype = dtype_of(self.dims.dtype)
        kernel, bias = (
            a[...].astype(dtype) for a in (self.conv_kernel, self.conv_bias)
        )
        extra, x = ctx.extra_tokens, x.astype(dtype)
        moved = nn.depthwise(x[:, extra:], kernel, ctx.grid) + bias
        return x + jnp.pad(moved, ((0, 0), (extra, 0), (0, 0)))


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` that each part is."""
    return attention.Config(
        num_kv_heads=config.num_kv_heads,
        positions=config.positions,
        qk_norm=config.qk_norm,
        output=config.output,
    )


def _rank_of(config: Config, dims: MixerDims) -> int:
    return cuts.rank_of(config.window, grid=dims.grid)


def _parameter_count(config: Config, dims: MixerDims) -> int:
    names = ORDERS[config.order]
    count = len(names) * sizes.parameter_count(layer_config(config), dims)
    behind = len(names) > 1 and config.order != "parallel"
    conv = config.conv * dims.embed_dim * (3 ** _rank_of(config, dims) + 1)
    return count + behind * windowed.norm_parameters(dims) + conv


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """P^rank keys for each query; D channels for each channel of a token, twice."""
    layer, rank = layer_config(config), _rank_of(config, dims)
    heads, total = sizes.heads_of(layer, dims), 0.0
    if "spatial" in ORDERS[config.order]:
        size = cuts.per_axis(config.window, rank, owner="davit", name="window")
        seen = math.prod(size)
        if dims.grid is not None and config.mask_padding:
            seen = math.prod(np.minimum(size, dims.grid).tolist())
        total += sizes.flops(dataclasses.replace(layer, window=seen), dims, seq_len)
    if "channel" in ORDERS[config.order]:
        total += sizes.flops(dataclasses.replace(layer, window=1), dims, seq_len)
        # Instead of the one key of the line before.
        per_token = (
            2.0
            * heads.head_dim
            * (
                (heads.num_kv_heads + heads.num_heads) * heads.head_dim
                - 2 * heads.num_heads
            )
        )
        total += seq_len * per_token
    conv = config.conv * 2.0 * 3**rank * dims.embed_dim
    return total + seq_len * conv


def _lacks(config: Config) -> dict[str, str]:
    """Channels have no places."""
    if config.order == "channel" and not config.conv:
        return {"needs_grid": "order=channel"}
    return {}


SPEC = MixerSpec(
    name="davit",
    title="Dual attention: windows and channels",
    family="vision",
    paper="DaViT: Dual Attention Vision Transformers",
    source="arXiv 2204.03645",
    forms=("spatial_channel", "channel_spatial", "parallel", "spatial", "channel"),
    capabilities=ON_GRID,
    decode=SEES_BOTH_WAYS,
    parameter_count=_parameter_count,
    state_size=no_state,
    flops=_flops,
    lacks=_lacks,
    limits=(
        "The channels' products are sums over all tokens: with channel_scale=head_dim "
        "they grow with the number of tokens, and a model of one image size has "
        "sharper weights at a larger one.",
        "No causal form: the channels' part sees all tokens at once.",
        "With mask_padding=false hooks of the windows' part read and change the "
        "tokens that fill up the grid too.",
        "A layer keeps the grid as it is; the paper's stages and convolutional "
        "positions are those of config.model.name=pyramid (docs/pyramid.md).",
    ),
    deviations=(
        "The paper has a norm and an MLP of its own for each part. Here that is a "
        'schedule: layers="(spatial channel)*6" with mixers.spatial = {type: davit, '
        "order: spatial} and mixers.channel = {type: davit, order: channel}. With "
        "order=spatial_channel the second part reads norm(x + first(x)), x what the "
        "layer's norm gives, and both share the layer's MLP.",
        "What fills up a window is left out of it; mask_padding=false has it seen, as "
        "in the authors' code.",
        "The paper's convolutions stand in front of both norms of a layer, and what "
        "they add stays in the residual stream. Those of conv=true stand behind the "
        "first norm, their sum is read by the parts alone, and the MLP has none.",
        "Extra tokens (class token, registers), which the paper has none of, see all "
        "tokens and are seen in every window; channels are compared over them too.",
        "Biases and widths of the maps, and the number of heads, are the model's; the "
        "paper has biases and heads of 32.",
    ),
)

# Windows that reach over the end of an axis, on every rank of grid but one.
CONFORMANCE = {
    "config": {"window": 2},
    "dims": {"head_dim": 6, "num_kv_heads": 6},
    "length": 15,
    "grid": (3, 5),
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {
        "order": "parallel",
        "window": (2, 3),
        "mask_padding": False,
        "channel_scale": "tokens",
        "conv": True,
        "num_kv_heads": 2,
        "qk_norm": True,
        "positions": "none",
        "output": ({"type": "gated_attention"},),
    },
    {"order": "channel"},
)
