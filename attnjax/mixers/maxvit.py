"""Multi-axis attention: attention inside blocks of a grid, then over the whole of it.

A block is P neighbours along each axis. A lattice is G tokens along each axis at equal
distances, n / G on an axis of n: those with one place in their run of n / G. Tokens
attend inside their block, or lattice, alone. Each part has parameters of its own and
a learned bias for each head and offset of two places in a window.

Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697, section
3.2 and equation 4; the authors' released code.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.dtypes import dtype_of
from attnjax.core.spec import ON_GRID, SEES_BOTH_WAYS, MixerDims, MixerSpec, no_state
from attnjax.mixers import attention
from attnjax.mixers.slots import sizes, windowed
from attnjax.mixers.slots import windows as cuts

PARTS = {
    "block_grid": ("block", "grid"),
    "grid_block": ("grid", "block"),
    "parallel": ("block", "grid"),
    "block": ("block",),
    "grid": ("grid",),
}
KINDS = {"block": "blocks", "grid": "lattice"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer. One number serves all axes of the grid; a tuple has one
    for each.

    Attributes:
        parts: "block_grid", "grid_block": one part behind the other, with a norm
            between; "parallel": side by side; "block", "grid": one alone.
        window: P, tokens of a block along an axis; it divides the axis (none: the
            largest divisor of at most 8 that is less than the axis, 7 of 14 or 28).
        grid_size: G, tokens of a lattice along an axis; it divides the axis (none:
            window).
        relative_bias: whether there are biases of the offsets in a window.
        bias_window: the window that the tables of biases are made for (none: the
            part's own); a table of another is resized, linearly along each axis.
        num_kv_heads: K (none: the model's).
        positions: "inherit": the model's rotary positions if it has them, each axis
            of a grid turning its share of a head; "rope"; "none".
        qk_norm: RMSNorm of each head's query and key (none: the model's).
        scale: factor on q.k (none: 1 / sqrt(D)).
        output: options of mechanisms in order, as in `attention`, of each part; none
            that changes how whole rows attend.
    """

    parts: Literal["block_grid", "grid_block", "parallel", "block", "grid"] = (
        "block_grid"
    )
    window: int | tuple[int, ...] | None = None
    grid_size: int | tuple[int, ...] | None = None
    relative_bias: bool = True
    bias_window: int | tuple[int, ...] | None = None
    num_kv_heads: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    qk_norm: bool | None = None
    scale: float | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        for name in ("window", "grid_size", "bias_window"):
            value = getattr(self, name)
            if value is not None:
                cuts.check_numbers(name, value, 1)
        if self.bias_window is not None and not self.relative_bias:
            raise ValueError(
                "bias_window is that of relative_bias; got relative_bias=false, "
                f"bias_window={self.bias_window}. Leave it at none."
            )
        if self.grid_size is not None and self.parts == "block":
            raise ValueError(
                f"grid_size is that of parts with a grid; got grid_size="
                f"{self.grid_size}, parts=block. Leave it at none."
            )


def size_of(config: Config, part: str, axes) -> tuple[int, ...]:
    """P of the part "block", G of "grid", on axes of these lengths (None: unknown)."""
    name = _size_name(config, part)
    value = getattr(config, name)
    return cuts.size_along(value, axes, owner="maxvit", name=name)


def _size_name(config: Config, part: str) -> str:
    of_grid = part == "grid" and config.grid_size is not None
    return "grid_size" if of_grid else "window"


def bias_size_of(config: Config, part: str, axes) -> tuple[int, ...]:
    """The window that the tables of a part are made for."""
    value = config.bias_window
    if value is None:
        return size_of(config, part, axes)
    return cuts.per_axis(value, len(axes), owner="maxvit", name="bias_window")


def windows_of(config: Config, part: str, grid: tuple[int, ...]) -> cuts.Windows:
    """How a part cuts the grid.

    Raises:
        UserError: where its windows do not divide the grid.
    """
    size, name = size_of(config, part, grid), _size_name(config, part)
    cuts.check_divides(size, grid, owner="maxvit", name=name)
    return cuts.Windows(grid, size, KINDS[part])


def resized(
    table: jax.Array, source: tuple[int, ...], size: tuple[int, ...]
) -> jax.Array:
    """A table [H, prod(2 w - 1)] of windows `source` for windows `size`."""
    if source == size:
        return table
    wide = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    heads, lengths = len(table), [2 * w - 1 for w in size]
    image = wide.reshape(heads, *(2 * w - 1 for w in source))
    image = jax.image.resize(image, (heads, *lengths), method="linear", antialias=False)
    return image.reshape(heads, -1).astype(table.dtype)


def reference(query, key, value, *, windows: cuts.Windows, bias=None):
    """The definition for the heads of one part, all pairs of tokens written out.

    Args:
        query: [B, T, H, D], T the places of the grid in row-major order.
        key: [B, T, K, D], K divides H.
        value: [B, T, K, E].
        windows: of the part.
        bias: [H, prod(2 w - 1)], or None.

    Returns:
        [B, T, H, E].
    """
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], 2) for a in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + _of_pairs(bias, windows)
    weights = jax.nn.softmax(scores, axis=-1, where=windows.sees())
    return jnp.einsum("bhts,bshe->bthe", weights, value)


def _of_pairs(table: jax.Array, windows: cuts.Windows) -> jax.Array:
    """The bias of every two tokens by their places in their windows, [H, T, T]."""
    _, place = windows.token_windows()
    return jnp.take(table, cuts.offsets(windows.size)[place[:, None], place], axis=1)


class Part(windowed.Windowed):
    """Attention inside blocks, or lattices.

    Parameters: those of `attention`, and `window_bias` [H, prod(2 w - 1)], the offsets
    of the axes in row-major order.
    """

    def __init__(self, config: Config, dims: MixerDims, *, part: str, rngs: nnx.Rngs):
        grid = cuts.need_grid(dims, owner="maxvit")
        windows = windows_of(config, part, grid)
        layer = layer_config(config)
        super().__init__(layer, dims, windows=windows, owner="maxvit", rngs=rngs)
        self.bias_size = bias_size_of(config, part, grid)
        self.window_bias = (
            nn.param(
                rngs,
                (self.shape.num_heads, _offset_count(self.bias_size)),
                jax.nn.initializers.normal(dims.init_std),
                dtype=dtype_of(dims.param_dtype),
            )
            if config.relative_bias
            else None
        )

    def of_windows(self, spec, call):
        """Scores with the biases of the offsets; extra tokens have none."""
        if self.window_bias is None:
            return spec, {}
        size = self.windows.size
        table = resized(self.window_bias[...], self.bias_size, size)
        table = jnp.take(table, cuts.offsets(size), axis=1)
        return windowed.with_bias(spec, table, call.ctx.extra_tokens)

    def bias_of_tokens(self, call):
        """The biases of the offsets, [1, H, T, T]."""
        del call
        if self.window_bias is None:
            return None
        size = self.windows.size
        table = resized(self.window_bias[...], self.bias_size, size)
        return _of_pairs(table, self.windows)[None]


class Mixer(windowed.Parts):
    """One layer: parameters under `block` and `grid`, and `between`."""

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        names = PARTS[config.parts]
        parts = {
            name: functools.partial(Part, config, dims, part=name) for name in names
        }
        is_parallel = config.parts == "parallel"
        super().__init__(SPEC, dims, parts, parallel=is_parallel, rngs=rngs)


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` that each part is."""
    return attention.Config(
        num_kv_heads=config.num_kv_heads,
        positions=config.positions,
        qk_norm=config.qk_norm,
        scale=config.scale,
        output=config.output,
    )


def _offset_count(size: tuple[int, ...]) -> int:
    return math.prod(2 * w - 1 for w in size)


def _axes(config: Config, dims: MixerDims) -> tuple[int | None, ...]:
    told = (config.window, config.grid_size, config.bias_window)
    return cuts.axes_of(*told, grid=dims.grid)


def _parameter_count(config: Config, dims: MixerDims) -> int:
    layer, axes = layer_config(config), _axes(config, dims)
    names = PARTS[config.parts]
    count = len(names) * sizes.parameter_count(layer, dims)
    if config.relative_bias:
        tables = [_offset_count(bias_size_of(config, name, axes)) for name in names]
        count += sizes.heads_of(layer, dims).num_heads * sum(tables)
    behind = len(names) > 1 and config.parts != "parallel"
    return count + behind * windowed.norm_parameters(dims)


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """P^rank and G^rank keys for each query."""
    axes, total = _axes(config, dims), 0.0
    for name in PARTS[config.parts]:
        seen = math.prod(size_of(config, name, axes))
        layer = dataclasses.replace(layer_config(config), window=seen)
        total += sizes.flops(layer, dims, seq_len)
    return total


SPEC = MixerSpec(
    name="maxvit",
    title="Multi-axis attention",
    family="vision",
    paper="MaxViT: Multi-Axis Vision Transformer",
    source="arXiv 2204.01697",
    forms=("block_grid", "grid_block", "parallel", "block", "grid"),
    capabilities=ON_GRID,
    decode=SEES_BOTH_WAYS,
    parameter_count=_parameter_count,
    state_size=no_state,
    flops=_flops,
    limits=(
        "Windows must divide the grid; nothing is padded.",
        "Blocks alone never pass anything on to another block. After blocks and "
        "lattices every token depends on every other where P * G is at least the "
        "length of each axis.",
        "A layer keeps the grid as it is; stages, and the MBConvs in front of a pair, "
        "are those of config.model.name=pyramid (docs/pyramid.md).",
    ),
    deviations=(
        "The paper has a norm and an MLP of its own for each part. Here that is a "
        'schedule: layers="(block grid)*6" with mixers.block = {type: maxvit, parts: '
        "block} and mixers.grid = {type: maxvit, parts: grid}. With parts=block_grid "
        "the second part reads norm(x + first(x)), x what the layer's norm gives, and "
        "both share the layer's MLP.",
        "Extra tokens (class token, registers), which the paper has none of, see all "
        "tokens and are seen in every window.",
        "Biases and widths of the maps, and the number of heads, are the model's; the "
        "paper has biases and heads of 32.",
    ),
)

# Windows that divide the grids of every rank, behind extra tokens too.
CONFORMANCE = {
    "config": {"window": 2},
    "dims": {"head_dim": 6, "num_kv_heads": 6},
    "length": 16,
    "grid": (2, 8),
    "extra_tokens": 8,
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {
        "parts": "parallel",
        "window": (2, 4),
        "grid_size": (1, 2),
        "bias_window": (2, 3),
        "num_kv_heads": 2,
        "qk_norm": True,
        "positions": "none",
        "scale": 0.7,
        "output": ({"type": "gated_attention"},),
    },
)
