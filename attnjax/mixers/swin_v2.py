"""Windows with cosine scores and a bias that is a function of the offset, shifted by
half a window in every second layer.

Within a window of P neighbours along each axis, for query i and key j of head h,

    score = exp(min(l_h, ln 100)) cos(q_i, k_j) + 16 sigmoid(G_h(d(i - j))),
    d(x) = sign(x) log2(1 + 8 |x| / (P - 1)) / 3 along each axis,

with a learned l_h and an MLP G of one hidden layer, which gives every head its bias.
Windows of a shifted layer begin P // 2 places later; those at the two ends of an axis
are parts of one that is wrapped around it, and do not see one another.

Source: Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", arXiv
2111.09883, section 3.2 and 3.3, equations 2 to 4; the authors' released code. Shifts:
Liu et al., "Swin Transformer", arXiv 2103.14030, section 3.2.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.spec import ON_GRID, SEES_BOTH_WAYS, MixerDims, MixerSpec, no_state
from attnjax.mixers import attention
from attnjax.mixers.slots import reach, sizes, windowed
from attnjax.mixers.slots import windows as cuts
from attnjax.mixers.slots.base import Call

# Of the factor on cosines: its first value, and the most that it may become.
FIRST_SCALE = 10.0
MOST_SCALE = 100.0
MOST_BIAS = 16.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer. One number serves all axes of the grid; a tuple has one
    for each.

    Attributes:
        window: P, tokens of a window along an axis; it divides the axis, and is the
            whole of a shorter one (none: the largest divisor of at most 8 that is less
            than the axis, 7 of 14 or 28).
        shifted: whether windows begin P // 2 places later, on axes that are longer
            than a window.
        bias_window: P in d, the window that offsets are measured by: that of the model
            whose parameters are read with other windows (none: window).
        bias_dim: hidden width of the biases' MLP.
        num_kv_heads: K (none: the model's).
        positions: "inherit": the model's rotary positions if it has them, each axis
            of a grid turning its share of a head; "rope"; "none".
        qk_norm: RMSNorm of each head's query and key, before their cosine (none: the
            model's).
        output: options of mechanisms in order, as in `attention`; none that changes
            how whole rows attend.
    """

    window: int | tuple[int, ...] | None = None
    shifted: bool = False
    bias_window: int | tuple[int, ...] | None = None
    bias_dim: int = 512
    num_kv_heads: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    qk_norm: bool | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        for name, least in (("window", 1), ("bias_window", 2)):
            value = getattr(self, name)
            if value is not None:
                cuts.check_numbers(name, value, least)
        if self.bias_dim < 1:
            raise ValueError(f"bias_dim must be at least 1; got {self.bias_dim}.")


@dataclasses.dataclass(frozen=True)
class Shifted(cuts.Windows):
    """Windows, which divide the grid, of a grid that is turned so that place `shift`
    of each axis comes first."""

    shift: tuple[int, ...] = ()

    def fill(self, x):
        """[B, prod(grid), ...] -> the same, turned."""
        return self._turned(x, [-s for s in self.shift])

    def crop(self, x):
        """Undoes `fill`."""
        return self._turned(x, self.shift)

    def _turned(self, x, steps):
        roll = np.roll if isinstance(x, np.ndarray) else jnp.roll
        image = x.reshape(len(x), *self.grid, *x.shape[2:])
        axes = tuple(range(1, 1 + len(self.grid)))
        return roll(image, tuple(steps), axes).reshape(x.shape)

    def parts(self) -> np.ndarray:
        """Which part of its window each token of the grid lies in, int [prod(grid)]:
        a number for which ends of the grid it was wrapped around to."""
        at = np.indices(self.grid).reshape(len(self.grid), -1)
        return sum(
            2**axis * (place < shift)
            for axis, (place, shift) in enumerate(zip(at, self.shift, strict=True))
        )

    def sees(self) -> np.ndarray:
        """Which token sees which, bool [prod(grid), prod(grid)]."""
        own, _ = self.token_windows()
        own = own * 2 ** len(self.grid) + self.parts()
        return own[:, None] == own


def size_of(config: Config, axes) -> tuple[int, ...]:
    """P on axes of these lengths (None: unknown)."""
    size = cuts.size_along(config.window, axes, owner="swin_v2", name="window")
    pairs = zip(size, axes, strict=True)
    return tuple(w if n is None else min(w, n) for w, n in pairs)


def windows_of(config: Config, grid: tuple[int, ...]) -> cuts.Windows:
    """How a layer cuts the grid.

    Raises:
        UserError: where its windows do not divide the grid.
    """
    size = size_of(config, grid)
    cuts.check_divides(size, grid, owner="swin_v2", name="window")
    pairs = zip(size, grid, strict=True)
    shift = tuple(w // 2 if w < n else 0 for w, n in pairs)
    if not config.shifted or not any(shift):
        return cuts.Windows(grid, size)
    return Shifted(grid, size, shift=shift)


@functools.lru_cache(maxsize=64)
def coordinates(size: tuple[int, ...], like: tuple[int, ...]) -> np.ndarray:
    """What the biases' MLP reads for each row of `cuts.offsets`: d(query - key) along
    each axis, float64 [prod(2 w - 1), axes].

    Args:
        size: P, the window.
        like: P of the window that its offsets are measured by.
    """
    lines = []
    for w, p in zip(size, like, strict=True):
        step = 8 * np.arange(w - 1, -w, -1) / max(p - 1, 1)
        lines.append(np.sign(step) * np.log2(1 + np.abs(step)) / 3)
    found = np.stack(np.meshgrid(*lines, indexing="ij"), -1)
    return found.reshape(-1, len(size))


def unit(x: jax.Array) -> jax.Array:
    """[..., D] at length one, in float32 or wider; zero stays zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def scale_of(logit_scale: jax.Array) -> jax.Array:
    """l [H] -> the factors on cosines [H], in float32 or wider."""
    wide = logit_scale.astype(jnp.promote_types(logit_scale.dtype, jnp.float32))
    return jnp.exp(jnp.minimum(wide, math.log(MOST_SCALE)))


def reference(query, key, value, *, windows: cuts.Windows, logit_scale, bias):
    """The definition for one layer's heads, all pairs of tokens written out.

    Args:
        query: [B, T, H, D], T the places of the grid in row-major order.
        key: [B, T, K, D], K divides H.
        value: [B, T, K, E].
        windows: of the layer.
        logit_scale: l, [H].
        bias: [H, prod(2 w - 1)], the rows of `cuts.offsets`.

    Returns:
        [B, T, H, E].
    """
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], 2) for a in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", unit(query), unit(key))
    scores = scores * scale_of(logit_scale)[:, None, None] + of_pairs(bias, windows)
    weights = jax.nn.softmax(scores, axis=-1, where=windows.sees())
    return jnp.einsum("bhts,bshe->bthe", weights, value)


def of_pairs(table: jax.Array, windows: cuts.Windows) -> jax.Array:
    """The bias of every two tokens by their places in their windows, [H, T, T]."""
    _, place = windows.token_windows()
    return jnp.take(table, cuts.offsets(windows.size)[place[:, None], place], axis=1)


class Mixer(windowed.Windowed):
    """One layer.

    Parameters: those of `attention`, where the key has no bias; `logit_scale` [H]; of
    the biases' MLP `bias_in` [axes, bias_dim], which has a bias, and `bias_out`
    [bias_dim, H].
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        grid = cuts.need_grid(dims, owner="swin_v2")
        windows, layer = windows_of(config, grid), layer_config(config)
        super().__init__(layer, dims, windows=windows, owner="swin_v2", rngs=rngs)
        told = config.bias_window
        self.bias_window = (
            windows.size
            if told is None
            else cuts.per_axis(told, len(grid), owner="swin_v2", name="bias_window")
        )
        heads, stored = self.shape, dtype_of(dims.param_dtype)
        make = functools.partial(
            nn.Linear, std=dims.init_std, param_dtype=stored, rngs=rngs
        )
        if self.key.bias is not None:
            width = heads.num_kv_heads * heads.head_dim
            self.key = make(dims.embed_dim, width, dtype=dtype_of(dims.dtype))
        start = jax.nn.initializers.constant(math.log(FIRST_SCALE))
        self.logit_scale = nn.param(rngs, (heads.num_heads,), start, dtype=stored)
        wide = jnp.promote_types(dtype_of(dims.dtype), jnp.float32)
        dim = config.bias_dim
        self.bias_in = make(len(grid), dim, use_bias=True, dtype=wide)
        self.bias_out = make(dim, heads.num_heads, dtype=wide)

    def __call__(self, x: jax.Array, ctx: Context, *, norm=None):
        """[B, T, C] -> [B, T, C] in the compute dtype; `norm` as in `attention`."""
        hooks = self.known_hooks()
        cuts.check_request_on_grid(SPEC, self.dims, x, ctx, hooks=hooks)
        return super().__call__(x, ctx, norm=norm)

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """(query [B, T, H, D], key [B, T, K, D], value [B, T, K, E]) to the heads
        [B, T, H, E]; products of what it hands on are the scaled cosines."""
        query, key, value = qkv
        scale = scale_of(self.logit_scale[...])[:, None]
        query = (unit(query) * scale).astype(query.dtype)
        key = unit(key).astype(key.dtype)
        return super().attend(x, (query, key, value), mask, operands, call, spec=spec)

    def mask_of_windows(self, mask: kernels.Mask, batch: int, extra: int):
        """In windows that are wrapped around the grid, each part for itself; extra
        tokens are seen in all."""
        windows = self.windows
        if not isinstance(windows, Shifted):
            return mask, {}
        parts = windows.fold(1 + windows.parts()[None])[0]
        ids = np.tile(parts, (batch, 1)).astype(np.int32)
        common = reach.COMMON if extra else None
        seen = np.pad(ids, ((0, 0), (extra, 0)), constant_values=reach.COMMON)
        segments = kernels.Segments(common)
        segments = segments if mask == kernels.Full() else mask & segments
        arrays = {"q_segment_ids": jnp.asarray(ids), "k_segment_ids": jnp.asarray(seen)}
        return segments, arrays

    def biases(self) -> jax.Array:
        """[H, prod(2 P - 1)], the rows of `cuts.offsets`, float32 or wider."""
        read = coordinates(self.windows.size, self.bias_window)
        hidden = jax.nn.relu(self.bias_in(jnp.asarray(read, self.bias_in.dtype)))
        return MOST_BIAS * jax.nn.sigmoid(self.bias_out(hidden)).T

    def of_windows(self, spec: kernels.AttentionSpec, call: Call):
        """Scores with the biases of the offsets; extra tokens have none."""
        table = jnp.take(self.biases(), cuts.offsets(self.windows.size), axis=1)
        return windowed.with_bias(spec, table, call.ctx.extra_tokens)

    def bias_of_tokens(self, call: Call) -> jax.Array:
        """The biases of the offsets, [1, H, T, T]."""
        del call
        return of_pairs(self.biases(), self.windows)[None]


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` that the windows are laid over."""
    return attention.Config(
        num_kv_heads=config.num_kv_heads,
        positions=config.positions,
        qk_norm=config.qk_norm,
        # Cosines have a factor of their own.
        scale=1.0,
        output=config.output,
    )


def _axes(config: Config, dims: MixerDims) -> tuple[int | None, ...]:
    return cuts.axes_of(config.window, config.bias_window, grid=dims.grid)


def _parameter_count(config: Config, dims: MixerDims) -> int:
    layer = layer_config(config)
    heads = sizes.heads_of(layer, dims)
    count = sizes.parameter_count(layer, dims) + heads.num_heads
    count -= heads.num_kv_heads * heads.head_dim * dims.use_bias
    return count + config.bias_dim * (len(_axes(config, dims)) + 1 + heads.num_heads)


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """P^axes keys for each query, and the biases of one image's windows."""
    axes = _axes(config, dims)
    size = size_of(config, axes)
    layer = dataclasses.replace(layer_config(config), window=math.prod(size))
    heads = sizes.heads_of(layer, dims).num_heads
    rows = math.prod(2 * w - 1 for w in size)
    biases = 2.0 * rows * config.bias_dim * (len(axes) + heads)
    return sizes.flops(layer, dims, seq_len) + biases


SPEC = MixerSpec(
    name="swin_v2",
    title="Shifted windows with cosine scores",
    family="vision",
    paper="Swin Transformer V2: Scaling Up Capacity and Resolution",
    source="arXiv 2111.09883",
    forms=("windows", "shifted"),
    capabilities=ON_GRID,
    decode=SEES_BOTH_WAYS,
    parameter_count=_parameter_count,
    state_size=no_state,
    flops=_flops,
    limits=(
        "Windows must divide the grid; nothing is padded.",
        "A layer is shifted or not by its settings; every second one is a schedule: "
        'layers="window shifted" with mixers.window = {type: swin_v2} and '
        "mixers.shifted = {type: swin_v2, shifted: true}.",
        "Norms behind the sub-layers, and merging of places in front of a norm, are "
        "those of the model: config.model.post_norm=only, and config.model.downsampling"
        "=merge of config.model.name=pyramid (docs/pyramid.md).",
    ),
    deviations=(
        "The biases' MLP reads offsets as the authors' code does: measured by the "
        "window, times 8, their logarithm to base 8. The paper's equation 4 has "
        "the logarithm of the offset alone.",
        "Extra tokens (class token, registers), which the paper has none of, see all "
        "tokens and are seen in every window, by cosines without a bias.",
        "Rotary positions, shared key/value heads and norms of query and key, which "
        "the paper has none of, are the model's where it has them.",
        "Biases of the query, value and output maps are the model's (use_bias); the "
        "paper has them. The key has none, as in the authors' code.",
    ),
)

# Windows that divide the grids of every rank, behind extra tokens too.
CONFORMANCE = {
    "config": {"window": 2, "bias_dim": 16},
    "dims": {"head_dim": 6, "num_kv_heads": 6},
    "length": 16,
    "grid": (2, 8),
    "extra_tokens": 8,
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {
        "window": (2, 4),
        "shifted": True,
        "bias_window": (3, 5),
        "num_kv_heads": 2,
        "qk_norm": True,
        "positions": "none",
        "output": ({"type": "gated_attention"},),
    },
)
