"""Windows and sub-sampled keys that begin at the grid's anchor, not at its corner.

A circular shift of an image by no whole window cuts other windows. Before a layer
cuts its grid into windows of p places, or takes keys and values from every p x p
places, the grid is turned so that its strongest polyphase component begins at place 0
(`nn.anchored`), and afterwards it is turned back: any shift of the input is then the
same shift of the output.

The parts are those of Twins (Chu et al., arXiv 2104.13840): "local", attention inside
windows; "global", every token attends to N / p^2 keys and values, each made of a cell
of p places along each axis by one linear map and a norm.

Source: Ding et al., "Reviving Shift Equivariance in Vision Transformers", arXiv
2306.07470; the authors' released code.
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

# The setting that is the stride of each part's anchor.
STRIDE_OF = {"local": "window", "global": "stride"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer. One number serves all axes of the grid; a tuple has one
    for each.

    Attributes:
        part: "local": attention inside windows; "global": attention to keys and values
            that are made of cells of the grid.
        anchor: whether windows and cells begin at the anchor. If not, the layer is the
            plain one that moves with shifts by whole windows or cells alone.
        window: places of a window of part=local along an axis; it divides the axis
            (none: the largest divisor of at most 8 that is less than the axis).
        stride: places of a cell of part=global along an axis; it divides the axis
            (none: the least divisor over 1). With 1 keys and values are the tokens'.
        num_kv_heads: K (none: the model's).
        positions: of part=local: "inherit": the model's rotary positions if it has
            them, by the places of the anchored grid; "rope"; "none". part=global has
            none: the distance between two places changes where the ends meet.
        qk_norm: RMSNorm of each head's query and key (none: the model's).
        scale: factor on q.k (none: 1 / sqrt(D)).
        output: options of mechanisms in order, as in `attention`; none that changes
            how whole rows attend.
    """

    part: Literal["local", "global"] = "local"
    anchor: bool = True
    window: int | tuple[int, ...] | None = None
    stride: int | tuple[int, ...] | None = None
    num_kv_heads: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    qk_norm: bool | None = None
    scale: float | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        for part, name in STRIDE_OF.items():
            value = getattr(self, name)
            if value is None:
                continue
            cuts.check_numbers(name, value, 1)
            if self.part != part:
                raise ValueError(
                    f"{name} is that of part={part}; got part={self.part}, "
                    f"{name}={value}. Leave it at none, or set "
                    f"{STRIDE_OF[self.part]}."
                )
        if self.part == "global" and self.positions == "rope":
            raise ValueError(
                "positions=rope is for part=local: keys made of cells have no place, "
                "and distances change where the ends of the grid meet; got "
                "part=global. Leave it at inherit."
            )


def stride_of(config: Config, axes) -> tuple[int, ...]:
    """Places of a window, or of a cell, on axes of these lengths (None: unknown)."""
    name = STRIDE_OF[config.part]
    value = getattr(config, name)
    if value is None and config.part == "global":
        return tuple(_least_divisor(length) for length in axes)
    return cuts.size_along(value, axes, owner="shift_equivariance", name=name)


def _least_divisor(length: int | None) -> int:
    """The least divisor over 1; 1 of 1, 2 for an unknown length."""
    if length is None:
        return 2
    return next((d for d in range(2, length + 1) if length % d == 0), 1)


def windows_of(config: Config, grid: tuple[int, ...]) -> cuts.Windows:
    """The windows, or the cells, of a grid.

    Raises:
        UserError: where they do not divide it.
    """
    stride = stride_of(config, grid)
    name = STRIDE_OF[config.part]
    cuts.check_divides(stride, grid, owner="shift_equivariance", name=name)
    return cuts.Windows(grid, stride)


def reference(x, told_by, mix, *, stride):
    """The definition, an image at a time.

    Args:
        x: [B, *grid, C].
        told_by: [B, *grid, C], whose norms say where the grid begins.
        mix: [1, *grid, C] -> [1, *grid, C], the layer without an anchor.
        stride: p of each axis.

    Returns:
        [B, *grid, C].
    """
    rows, axes = [], tuple(range(len(stride)))
    for image, other in zip(x, told_by, strict=True):
        components = {}
        for start in np.ndindex(*stride):
            pairs = zip(start, stride, strict=True)
            component = other[tuple(slice(a, None, p) for a, p in pairs)]
            components[start] = float(jnp.linalg.norm(component))
        start = max(components, key=components.get)
        turned = jnp.roll(image, [-a for a in start], axes)
        rows.append(jnp.roll(mix(turned[None])[0], start, axes))
    return jnp.stack(rows)


class Local(windowed.Windowed):
    """Attention inside windows; parameters as in `attention`."""

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        super().__init__(
            layer_config(config),
            dims,
            windows=windows_of(config, dims.grid),
            owner="shift_equivariance",
            rngs=rngs,
        )


class Global(attention.Mixer):
    """Attention to keys and values of cells.

    Parameters: those of `attention`, and with cells of more than one place `cell`
    [prod(stride) C, C], a convolution's kernel whose leading axes are one, and
    `cell_norm`.
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        super().__init__(layer_config(config), dims, rngs=rngs)
        windowed.refuse_attend(self, "shift_equivariance")
        self.cells = windows_of(config, dims.grid)
        places, stored = math.prod(self.cells.size), dtype_of(dims.param_dtype)
        self.cell = (
            nn.Linear(
                places * dims.embed_dim,
                dims.embed_dim,
                use_bias=dims.use_bias,
                std=dims.init_std,
                dtype=dtype_of(dims.dtype),
                param_dtype=stored,
                rngs=rngs,
            )
            if places > 1
            else None
        )
        self.cell_norm = (
            nn.make_norm(
                dims.norm,
                dims.embed_dim,
                eps=dims.norm_eps,
                use_bias=dims.use_bias,
                zero_centered=dims.zero_centered_norm,
                param_dtype=stored,
                rngs=rngs,
            )
            if places > 1
            else None
        )

    def make_key_value(self, x: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
        """[B, T, C] -> [B, S, K, D] and [B, S, K, E]: the extra tokens, then a key for
        each cell in row-major order."""
        if self.cell is not None:
            extra = call.ctx.extra_tokens
            cells = self.cells.fold(x[:, extra:])
            cells = cells.reshape(*cells.shape[:2], -1)
            cells = self.cell_norm(self.cell(cells)).astype(x.dtype)
            x = jnp.concatenate([x[:, :extra], cells], axis=1)
        return super().make_key_value(x, call)


class Mixer(windowed.Parts):
    """One layer: parameters under `local` or `global`."""

    # The stream in front of the layer's norm, which makes all norms alike.
    reads_residual = True

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        grid = cuts.need_grid(dims, owner="shift_equivariance")
        kind = {"local": Local, "global": Global}[config.part]
        parts = {config.part: functools.partial(kind, config, dims)}
        super().__init__(SPEC, dims, parts, parallel=False, rngs=rngs)
        self.stride = stride_of(config, grid) if config.anchor else None

    def __call__(self, x: jax.Array, ctx: Context):
        """[B, T, C] -> [B, T, C] in the compute dtype."""
        hooks = self.known_hooks()
        cuts.check_request_on_grid(SPEC, self.dims, x, ctx, hooks=hooks)
        part = getattr(self, self.part_names[0])
        if self.stride is None:
            return part(x, ctx)
        told_by = x if ctx.residual is None else ctx.residual
        start = nn.anchor_of(_grid_of(told_by, ctx), self.stride)
        y, out = part(_turned(x, start, ctx), ctx)
        return _turned(y, -start, ctx), out


def _grid_of(x: jax.Array, ctx: Context) -> jax.Array:
    """The tokens of the grid, [B, T, C] -> [B, *grid, C]."""
    return x[:, ctx.extra_tokens :].reshape(len(x), *ctx.grid, x.shape[-1])


def _turned(x: jax.Array, start: jax.Array, ctx: Context) -> jax.Array:
    """`nn.turned` of the tokens of the grid; those before it stay."""
    grid = nn.turned(_grid_of(x, ctx), start).reshape(len(x), -1, x.shape[-1])
    return jnp.concatenate([x[:, : ctx.extra_tokens], grid], axis=1)


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` that the part is."""
    return attention.Config(
        num_kv_heads=config.num_kv_heads,
        positions="none" if config.part == "global" else config.positions,
        qk_norm=config.qk_norm,
        scale=config.scale,
        output=config.output,
    )


def _places(config: Config, dims: MixerDims) -> int:
    """Those of a window or of a cell."""
    axes = cuts.axes_of(config.window, config.stride, grid=dims.grid)
    return math.prod(stride_of(config, axes))


def _parameter_count(config: Config, dims: MixerDims) -> int:
    count, places = sizes.parameter_count(layer_config(config), dims), 1
    if config.part == "global":
        places = _places(config, dims)
    if places == 1:
        return count
    cell = (places * dims.embed_dim + dims.use_bias) * dims.embed_dim
    return count + cell + windowed.norm_parameters(dims)


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """A window's keys, or one for each cell, for each query."""
    layer, places = layer_config(config), _places(config, dims)
    if config.part == "local":
        return sizes.flops(dataclasses.replace(layer, window=places), dims, seq_len)
    heads = sizes.heads_of(layer, dims)
    on_grid = seq_len - dims.prefix_tokens
    seen = dims.prefix_tokens + on_grid // places
    total = sizes.flops(dataclasses.replace(layer, window=seen), dims, seq_len)
    # Keys and values are made of cells, and these of the tokens.
    maps = heads.num_kv_heads * (heads.head_dim + heads.value_dim)
    total -= 2.0 * (seq_len - seen) * dims.embed_dim * maps
    return total + (places > 1) * 2.0 * on_grid * dims.embed_dim**2


SPEC = MixerSpec(
    name="shift_equivariance",
    title="Attention from an anchor",
    family="vision",
    paper="Reviving Shift Equivariance in Vision Transformers",
    source="arXiv 2306.07470",
    forms=("local", "global"),
    capabilities=ON_GRID,
    decode=SEES_BOTH_WAYS,
    parameter_count=_parameter_count,
    state_size=no_state,
    flops=_flops,
    limits=(
        "Shifts are circular: what a crop brings in at one side and takes away at the "
        "other changes the norms.",
        "A whole model keeps its logits under every shift with "
        "config.model.positions=anchored_conv (docs/vit.md). Learned or sincos "
        "positions and zeros around a convolution undo it, and so do rotary positions "
        "in layers of another mechanism, or with tokens before the grid.",
        "In a pyramid the stem, and the 2 x 2 places that are made one between stages, "
        "begin at the corner: logits keep under every shift with "
        "config.model.positions=anchored, else under shifts by all strides together.",
        "Two components whose norms differ by less than rounding may change places; "
        "where they are the same in all that lies around, as on a constant grid, the "
        "first counts.",
        "Windows and cells must divide the grid; nothing is padded.",
        "Hooks read and change tokens in the order of the anchored grid, which is "
        "another for each image.",
    ),
    deviations=(
        "The paper leaves tokens in the anchored order for the layers behind; here a "
        "layer adds to a residual stream and turns its output back, which costs a "
        "gather and gives the same up to the order of tokens. So layers of other "
        "mechanisms, windows and orders may stand between. The paper's pyramid needs "
        "each stage to end with a layer whose anchor the merging behind it divides; "
        "here the image is anchored once, for all strides together.",
        "Norms are of the residual stream in front of the layer's norm, as in the "
        "authors' code. A layer outside of a model takes those of its input.",
        "Equal norms are told apart by a hash of what lies around; the paper takes the "
        "first index, which moves with the shift.",
        "The released code turns square maps by sampling at the nearest place; here "
        "places are taken by whole numbers, on grids of 1 to 3 axes.",
        "Extra tokens (class token, registers) see all tokens and are seen in every "
        "window and beside the cells.",
        "Biases, norms, widths and the number of heads are the model's.",
    ),
)

# A grid that the sizes divide on every rank, behind extra tokens too.
CONFORMANCE = {
    "dims": {"head_dim": 6, "num_kv_heads": 6},
    "length": 16,
    "grid": (4, 4),
    "extra_tokens": 8,
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {
        "part": "global",
        "stride": (1, 2),
        "num_kv_heads": 2,
        "qk_norm": True,
        "scale": 0.7,
        "output": ({"type": "gated_attention"},),
    },
)
