"""Halo attention: blocks of queries that share the keys of a block and its margin.

A grid is cut into blocks of b queries along each axis; all of a block see the same
window of m = b + 2 h keys around it, h the halo. So a query's field is not centred on
it: the query at i of a block sees from h + i places before it to b + h - 1 - i behind.

    score = q.k / sqrt(D) + sum over the axes of q.R_axis[j - i + m - 1]

for a query at place i of its block and a key at place j of its window, R_axis learned,
[2 m - 1, D], shared by the heads. The paper's downsampling (queries at every s-th place
alone) is left out: a layer gives back as many tokens as it is given.

Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual
Backbones", arXiv 2103.12731, section 2; relative embeddings as in Ramachandran et al.,
arXiv 1906.05909, equation 3, on the query before its scale, as in timm (the authors
released no code).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import ON_GRID, SEES_BOTH_WAYS, MixerDims, MixerSpec, no_state
from attnjax.mixers import attention
from attnjax.mixers.slots import sizes, windowed
from attnjax.mixers.slots import windows as cuts
from attnjax.mixers.slots.base import Call


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer. One number serves all axes of the grid; a tuple has one
    for each.

    Attributes:
        block: b, queries of a block along an axis; it divides the axis (none: the
            largest divisor of at most 8 that is less than the axis).
        halo: h, further keys on each side of a block.
        relative: learned embeddings of the offset, times the query: "unscaled", the
            query as projected; "scaled", times the factor of q.k; "none".
        border: what of a window is off the grid: "mask", left out; "zero", keys and
            values of zeros, whose scores are those of the embeddings alone.
        num_kv_heads: K (none: the model's).
        value_head_dim: E (none: D).
        positions: of q.k, beside the embeddings: "inherit": the model's rotary
            positions if it has them; "rope"; "none".
        qk_norm: RMSNorm of each head's query and key (none: the model's).
        scale: factor on q.k (none: 1 / sqrt(D)).
        output: options of mechanisms in order, as in `attention`; none that changes
            how whole rows attend.
    """

    block: int | tuple[int, ...] | None = None
    halo: int | tuple[int, ...] = 3
    relative: Literal["unscaled", "scaled", "none"] = "unscaled"
    border: Literal["mask", "zero"] = "mask"
    num_kv_heads: int | None = None
    value_head_dim: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    qk_norm: bool | None = None
    scale: float | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        if self.block is not None:
            cuts.check_numbers("block", self.block, 1)
        cuts.check_numbers("halo", self.halo, 0)


def windows_of(config: Config, grid: tuple[int, ...]) -> cuts.Windows:
    """How a layer cuts the grid.

    Raises:
        UserError: where blocks do not divide it.
    """
    block, halo = _sizes(config, grid)
    cuts.check_divides(block, grid, owner="halonet", name="block")
    return cuts.Windows(grid, block, halo=halo, masked=config.border == "mask")


def _sizes(config: Config, axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """b and h on axes of these lengths (None: unknown)."""
    block = cuts.size_along(config.block, axes, owner="halonet", name="block")
    return block, cuts.per_axis(config.halo, len(axes), owner="halonet", name="halo")


def relative_rows(block: int, halo: int) -> np.ndarray:
    """The row of the embeddings for each query and key along an axis, int [b, m]; the
    first m - b rows of a table are never read."""
    seen = block + 2 * halo
    return np.arange(seen) - np.arange(block)[:, None] + seen - 1


def reference(query, key, value, *, windows: cuts.Windows, tables=()):
    """The definition for one layer's heads with the border left out, all pairs of
    tokens written out.

    Args:
        query: [B, T, H, D], T the places of the grid in row-major order.
        key: [B, T, K, D], K divides H.
        value: [B, T, K, E].
        windows: of the layer.
        tables: for each axis its embeddings [2 m - 1, D], on the unscaled query.

    Returns:
        [B, T, H, E].
    """
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], 2) for a in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    for axis, table in enumerate(tables):
        scores = scores + _of_pairs(query, table, windows, axis)
    weights = jax.nn.softmax(scores, axis=-1, where=windows.sees())
    return jnp.einsum("bhts,bshe->bthe", weights, value)


def _of_pairs(query, table: jax.Array, windows: cuts.Windows, axis: int) -> jax.Array:
    """Queries [B, T, H, D] times the embeddings of one axis for every two tokens,
    [B, H, T, T]; anything where they do not see one another."""
    at = np.unravel_index(np.arange(query.shape[1]), windows.grid)[axis]
    # j - i is the distance on the grid, and the halo.
    row = at - at[:, None] + windows.halo[axis] + windows.seen[axis] - 1
    row = np.where(windows.sees(), row, 0)
    return jnp.einsum("bthd,tsd->bhts", query, jnp.take(table, row, axis=0))


class Mixer(windowed.Windowed):
    """One layer.

    Parameters: those of `attention`, and `relative_<axis>` [2 m - 1, D].
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        grid = cuts.need_grid(dims, owner="halonet")
        windows, layer = windows_of(config, grid), layer_config(config)
        super().__init__(layer, dims, windows=windows, owner="halonet", rngs=rngs)
        self.config = config
        if config.relative != "none":
            dim = self.shape.head_dim
            start = jax.nn.initializers.truncated_normal(dim**-0.5)
            for axis, seen in enumerate(windows.seen):
                shape, stored = (2 * seen - 1, dim), dtype_of(dims.param_dtype)
                table = nn.param(rngs, shape, start, dtype=stored)
                setattr(self, f"relative_{axis}", table)

    def __call__(self, x: jax.Array, ctx: Context, *, norm=None):
        """[B, T, C] -> [B, T, C] in the compute dtype; `norm` as in `attention`."""
        hooks = self.known_hooks()
        cuts.check_request_on_grid(SPEC, self.dims, x, ctx, hooks=hooks)
        return super().__call__(x, ctx, norm=norm)

    def make_query(self, x: jax.Array, call: Call) -> jax.Array:
        """As in `attention`; the embeddings read it before its rotation."""
        query = super().make_query(x, call)
        call.notes[id(self)] = query
        return query

    def of_windows(self, spec: kernels.AttentionSpec, call: Call):
        """Scores with the embeddings, as a bias of rank sum(m): the query times the
        embedding of each of the m places of an axis, and which of them the key has."""
        if self.config.relative == "none":
            return spec, {}
        extra = call.ctx.extra_tokens
        rows = self.rows(self._embedded(call)[:, extra:])
        of_query = [self._along(axis, rows) for axis in range(len(self.windows.grid))]
        of_key = np.pad(_places(self.windows.seen), ((extra, 0), (0, 0)))
        spec = dataclasses.replace(spec, score=(kernels.LowRankBias(), *spec.score))
        return spec, {
            "bias_q": jnp.concatenate(of_query, -1),
            "bias_k": jnp.asarray(of_key[None, :, None], rows.dtype),
        }

    def bias_of_tokens(self, call: Call):
        """The embeddings' scores of all pairs, [B, H, T, T]."""
        if self.config.relative == "none":
            return None
        query = self._embedded(call)[:, call.ctx.extra_tokens :]
        return sum(
            _of_pairs(query, self._table(axis, query), self.windows, axis)
            for axis in range(len(self.windows.grid))
        )

    def _embedded(self, call: Call) -> jax.Array:
        """The query that the embeddings are times, [B, T, H, D]."""
        query = call.notes[id(self)]
        if self.config.relative == "unscaled":
            return query
        scale = self.config.scale
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return query * jnp.asarray(scale, query.dtype)

    def _table(self, axis: int, like: jax.Array) -> jax.Array:
        return getattr(self, f"relative_{axis}")[...].astype(like.dtype)

    def _along(self, axis: int, rows: jax.Array) -> jax.Array:
        """Queries [B N, L, H, D] times the embeddings of the m places of one axis,
        [B N, L, H, m]."""
        size, halo = self.windows.size, self.windows.halo
        table = self._table(axis, rows)
        table = jnp.take(table, relative_rows(size[axis], halo[axis]), axis=0)
        before, own = math.prod(size[:axis]), size[axis]
        split = rows.reshape(len(rows), before, own, -1, *rows.shape[2:])
        found = jnp.einsum("nxiyhd,imd->nxiyhm", split, table)
        return found.reshape(*rows.shape[:-1], -1)

    def init_state(self, batch: int, max_len: int, memory=None):
        """Refused, with what does it."""
        del batch, max_len, memory
        raise self._no_decode_form()

    def step(self, x: jax.Array, state, ctx: Context):
        """Refused as well."""
        del x, state, ctx
        raise self._no_decode_form()

    def _no_decode_form(self) -> UserError:
        b, h = self.windows.size[0], self.windows.halo[0]
        return UserError(
            f"halonet: has no decode form: it sees both ways; got block={b}, halo={h}. "
            "Along a sequence, blocks that look back alone are neighborhood_attention "
            f"with causal=true, stride={b}, window={b + h}."
        )


def _places(seen: tuple[int, ...]) -> np.ndarray:
    """Which place of each axis a key of a window has: ones in [prod(m), sum(m)]."""
    at = np.unravel_index(np.arange(math.prod(seen)), seen)
    return np.concatenate(
        [np.eye(m)[place] for m, place in zip(seen, at, strict=True)], 1
    )


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` that the windows are laid over."""
    return attention.Config(
        num_kv_heads=config.num_kv_heads,
        value_head_dim=config.value_head_dim,
        positions=config.positions,
        qk_norm=config.qk_norm,
        scale=config.scale,
        output=config.output,
    )


def _seen(config: Config, dims: MixerDims) -> list[int]:
    axes = cuts.axes_of(config.block, config.halo, grid=dims.grid)
    return [b + 2 * h for b, h in zip(*_sizes(config, axes), strict=True)]


def _parameter_count(config: Config, dims: MixerDims) -> int:
    layer = layer_config(config)
    count = sizes.parameter_count(layer, dims)
    if config.relative != "none":
        rows = sum(2 * m - 1 for m in _seen(config, dims))
        count += rows * sizes.heads_of(layer, dims).head_dim
    return count


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """prod(m) keys for each query, and sum(m) embeddings, which widen q and k."""
    layer, seen = layer_config(config), _seen(config, dims)
    heads, keys = sizes.heads_of(layer, dims), math.prod(seen)
    total = sizes.flops(layer, dims, 0) + _rows_flops(layer, dims, seq_len, keys)
    if config.relative != "none":
        total += 2.0 * seq_len * heads.num_heads * sum(seen) * (heads.head_dim + keys)
    return total


def _rows_flops(layer: attention.Config, dims: MixerDims, seq_len, keys) -> float:
    """Every window is computed whole, those at a border too."""
    heads = sizes.heads_of(layer, dims)
    maps = sizes.flops(dataclasses.replace(layer, window=1), dims, seq_len)
    pair = 2.0 * heads.num_heads * (heads.head_dim + heads.value_dim)
    return maps + seq_len * pair * (keys - 1)


SPEC = MixerSpec(
    name="halonet",
    title="Halo attention",
    family="vision",
    paper="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    source="arXiv 2103.12731",
    forms=("parallel",),
    capabilities=ON_GRID,
    decode=SEES_BOTH_WAYS,
    parameter_count=_parameter_count,
    state_size=no_state,
    flops=_flops,
    limits=(
        "Blocks must divide the grid.",
        "Keys and values of every window are laid out, (m / b)^rank times those of "
        "the grid: 3.1 times with block=8, halo=3 on a plane.",
        "A shift of the image by b places shifts the output, away from borders; a "
        "shift by one does not.",
        "No causal form. Along a sequence, blocks that look back alone are "
        "neighborhood_attention with causal=true, stride=b, window=b + h.",
        "With border=zero what a query sees are not tokens alone: there are no hooks "
        "on scores and weights.",
        "Downsampling by attention (queries at every s-th place) is left out, as are "
        "the paper's bottleneck blocks: a layer keeps the grid as it is; stages are "
        "those of config.model.name=pyramid (docs/pyramid.md).",
    ),
    deviations=(
        "What is off the grid is left out by default; border=zero has the paper's "
        "zeros, put in behind the projections.",
        "Extra tokens (class token, registers), which the paper has none of, see all "
        "tokens and are seen in every window, without embeddings.",
        "Biases and first values of the maps are the model's; timm has no biases.",
    ),
)

CONFORMANCE = {
    "config": {"block": 2, "halo": 1},
    "dims": {"head_dim": 6},
    "length": 16,
    "grid": (2, 8),
    "extra_tokens": 8,
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {
        "block": (1, 4),
        "halo": (1, 2),
        "relative": "scaled",
        "border": "zero",
        "num_kv_heads": 2,
        "value_head_dim": 5,
        "qk_norm": True,
        "positions": "none",
        "scale": 0.7,
        "output": ({"type": "gated_attention"},),
    },
)
