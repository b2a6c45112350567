"""Neighbourhood attention: each token of a grid attends to the window around it.

Along an axis of length L query i sees w keys from start = clip(l - w // 2, 0, L - w):
the window is moved inward at a border, never cut. l, the leader, is i itself, or the
middle of its group where `stride` queries in a row share a window. A causal axis sees
the keys from l - w + 1, l the last of the group, up to the query. Dilation d splits an
axis into d interleaved ones. On a grid of several axes all of them must agree.

Source: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143; Hassani
and Shi (dilation), arXiv 2209.15001; Hassani et al., "Faster Neighborhood Attention",
arXiv 2403.04690, and "Generalized Neighborhood Attention" (stride), arXiv 2504.16922.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.requests import check_memory, check_request
from attnjax.mixers.slots import cache, neighborhoods, rolling, sizes
from attnjax.mixers.slots.base import Call


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer. One number serves all axes of the grid; a tuple has one
    for each.

    Attributes:
        window: w, places that a query sees along an axis; at least 2. Even windows
            have one place more before the query than behind it.
        stride: queries in a row that share a window, from 1 (each its own) to window
            (blocks).
        dilation: d, distance of the places of a window; window * dilation is at most
            the length of the axis.
        causal: whether a query sees no place behind its own along the axis. With all
            axes causal the layer is causal, reads plain sequences too, and decodes.
        relative_bias: a learned bias for each head and offset in the window, as in
            NAT and DiNAT.
        num_kv_heads: K (none: the model's).
        positions: "inherit": the model's rotary positions if it has them, each axis
            of a grid turning its share of a head; "rope"; "none".
        qk_norm: RMSNorm of each head's query and key (none: the model's).
        scale: factor on q.k (none: 1 / sqrt(D)).
        output: options of mechanisms in order, as in `attention`.
    """

    window: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    relative_bias: bool = False
    num_kv_heads: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    qk_norm: bool | None = None
    scale: float | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        told = [getattr(self, name) for name in AXIS_SETTINGS]
        ranks = {len(value) for value in told if isinstance(value, tuple)}
        if len(ranks) > 1 or not ranks <= {1, 2, 3}:
            raise ValueError(
                "window, stride, dilation and causal must be one value, or one for "
                f"each of 1 to 3 axes; got {_words(self)}."
            )
        axes = axes_of(self, max(ranks, default=1))
        for w, s, d in zip(axes.window, axes.stride, axes.dilation, strict=True):
            if w < 2 or not 1 <= s <= w or d < 1:
                raise ValueError(
                    "must have window >= 2, 1 <= stride <= window and dilation >= 1 "
                    f"on each axis; got {_words(self)}."
                )


AXIS_SETTINGS = ("window", "stride", "dilation", "causal")


def _words(config: Config) -> str:
    return ", ".join(f"{name}={getattr(config, name)}" for name in AXIS_SETTINGS)


class Axes(NamedTuple):
    """The settings of each axis, as tuples of one length."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]


def axes_of(config: Config, rank: int) -> Axes:
    """The settings on a grid of this rank.

    Raises:
        UserError: where a tuple has another length.
    """
    found = []
    for name in AXIS_SETTINGS:
        value = getattr(config, name)
        value = value if isinstance(value, tuple) else (value,) * rank
        if len(value) != rank:
            raise UserError(
                f"neighborhood_attention: {name} must have one value for each axis of "
                f"the grid; got {name}={value} for {rank} axes. Give one number for "
                "all, or as many as there are axes."
            )
        found.append(value)
    return Axes(*found)


def is_causal(config: Config) -> bool:
    """Whether every axis is."""
    return config.causal is True or (
        isinstance(config.causal, tuple) and all(config.causal)
    )


def window_of(
    place: int, length: int, window: int, stride: int, causal: bool, *, endless=False
) -> tuple[int, int]:
    """The rule of one axis without dilation: the first key of a query and the place
    behind its last one.

    Args:
        place: of the query.
        length, window, stride, causal: of the axis.
        endless: a causal axis whose last group is as long as the others, so that
            nothing changes with the tokens that follow.
    """
    group = place // stride * stride
    leader = group + (stride - 1 if causal else stride // 2)
    if not endless:
        leader = min(leader, length - 1)
    if causal:
        return max(leader - window + 1, 0), place + 1
    start = min(max(leader - window // 2, 0), length - window)
    return start, start + window


def seen_along(
    length: int,
    window: int,
    stride: int = 1,
    dilation: int = 1,
    causal: bool = False,
    *,
    endless: bool = False,
) -> np.ndarray:
    """One axis, bool [queries, keys]: each `dilation`-th place is its own axis."""
    seen = np.zeros((length, length), bool)
    for own in range(dilation):
        places = np.arange(own, length, dilation)
        for place, query in enumerate(places):
            sides = (place, len(places), window, stride, causal)
            seen[query, places[slice(*window_of(*sides, endless=endless))]] = True
    return seen


def seen_on(grid: tuple[int, ...], axes: Axes, *, extra: int = 0) -> np.ndarray:
    """Which token sees which, bool [T, T] with T = extra + prod(grid): on every axis
    of the grid; extra tokens see all and are seen by all."""
    each = [seen_along(*one) for one in zip(grid, *axes, strict=True)]
    return np.pad(functools.reduce(np.kron, each), (extra, 0), constant_values=True)


def reference(query, key, value, *, grid, axes: Axes, extra: int = 0, bias=None):
    """The definition for one layer's heads.

    Args:
        query: [B, T, H, D], T = extra + prod(grid).
        key: [B, T, K, D], K divides H.
        value: [B, T, K, E].
        grid: sizes of the grid, in row-major order behind the extra tokens.
        axes: of the layer.
        extra: tokens before the grid.
        bias: [H, 2 w - 1, ...], one axis for each of the grid's, or None.

    Returns:
        [B, T, H, E].
    """
    seen = seen_on(grid, axes, extra=extra)
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], 2) for a in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        place = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)
        steps = (place[None] - place[:, None]) // np.array(axes.dilation)
        steps = np.where(
            seen[extra:, extra:, None], steps + np.array(axes.window) - 1, 0
        )
        table = bias[(slice(None), *np.moveaxis(steps, -1, 0))]
        scores = scores.at[:, :, extra:, extra:].add(table)
    weights = jax.nn.softmax(scores, axis=-1, where=seen)
    return jnp.einsum("bhts,bshe->bthe", weights, value)


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` that the window is laid over: along a sequence its
    sliding window, on a grid all tokens."""
    window = None
    if is_causal(config):
        axes = axes_of(config, _rank_of(config))
        window = (axes.window[0] - 1) * axes.dilation[0] + 1
    return attention.Config(
        num_kv_heads=config.num_kv_heads,
        positions=config.positions,
        qk_norm=config.qk_norm,
        scale=config.scale,
        output=config.output,
        window=window,
    )


def _rank_of(config: Config, grid: tuple[int, ...] | None = None) -> int:
    """Axes of the grid, or those that the settings are made for (1 where any)."""
    if grid is not None:
        return len(grid)
    told = [getattr(config, name) for name in AXIS_SETTINGS]
    return max((len(value) for value in told if isinstance(value, tuple)), default=1)


def check_grid(config: Config, grid: tuple[int, ...] | None) -> Axes:
    """The settings on the model's grid, or along a sequence.

    Raises:
        UserError: where a window is larger than its axis, or the settings are for
            another rank.
    """
    if grid is None:
        if not is_causal(config):
            raise UserError(
                "neighborhood_attention: needs the grid of the model's tokens; got a "
                f"plain sequence with causal={config.causal}. Set causal=true, or use "
                "a model of images."
            )
        return axes_of(config, 1)
    axes = axes_of(config, len(grid))
    whole = zip(axes.window, axes.dilation, grid, strict=True)
    for axis, (window, dilation, length) in enumerate(whole):
        if window * dilation > length:
            raise UserError(
                "neighborhood_attention: window * dilation must be at most the length "
                f"of each axis of the grid; got window={window}, dilation={dilation} "
                f"on axis {axis} of grid={tuple(grid)}. Use a window of at most "
                f"{length // dilation}, or smaller patches."
            )
    return axes


class Mixer(attention.Mixer):
    """One layer.

    Parameters: those of `attention`, and with relative_bias `neighborhood_bias`
    [H, prod(2 w - 1)], the offsets of the axes in row-major order.
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        self.config = config
        self.axes = check_grid(config, dims.grid)
        if dims.grid is None and dims.prefix_tokens:
            raise UserError(
                "neighborhood_attention: learned tokens in front of a text leave its "
                f"windows; got config.model.prefix of {dims.prefix_tokens} tokens. Set "
                "config.model.prefix.kind=none, or use streaming_llm."
            )
        layer = layer_config(config)
        if dims.grid is not None:
            layer = dataclasses.replace(layer, window=None)
        super().__init__(layer, dims, rngs=rngs)
        self.neighborhood_bias = (
            nn.param(
                rngs,
                (self.shape.num_heads, _offsets(self.axes)),
                jax.nn.initializers.truncated_normal(dims.init_std),
                dtype=dtype_of(dims.param_dtype),
            )
            if config.relative_bias
            else None
        )

    def __call__(self, x: jax.Array, ctx: Context, *, norm=None):
        """[B, T, C] -> [B, T, C] in the compute dtype; `norm` as in `attention`."""
        self.check(ctx, is_step=False)
        if ctx.grid is not None and x.shape[1] != self._num_tokens(ctx):
            raise UserError(
                "neighborhood_attention: tokens must be those of the grid, behind the "
                f"extra ones; got T={x.shape[1]}, grid={ctx.grid}, "
                f"extra_tokens={ctx.extra_tokens}."
            )
        return super().__call__(x, self._with_mask(ctx), norm=norm)

    def check(self, ctx: Context, *, is_step: bool) -> None:
        """Refuse what this layer does not do."""
        spec, known = SPEC.of(self.config), self.known_hooks()
        check_request(spec, ctx, step=is_step, mask=not is_step, hooks=known)
        if ctx.grid != self.dims.grid:
            raise UserError(
                "neighborhood_attention: the layer is made for one grid; got grid="
                f"{ctx.grid}, made for {self.dims.grid}. Build the model for it."
            )
        if ctx.grid is not None and (is_step or ctx.segment_ids is not None):
            what = "a decoding step" if is_step else "segment_ids"
            raise UserError(
                "neighborhood_attention: decoding, documents and padding are those of "
                f"sequences; got {what} on grid={ctx.grid}. Leave the grid out."
            )
        super().check(ctx, is_step=is_step)

    def _num_tokens(self, ctx: Context) -> int:
        return ctx.extra_tokens + math.prod(ctx.grid)

    def _with_mask(self, ctx: Context) -> Context:
        """The request with the neighbourhood in its mask."""
        mask = self._neighborhood(ctx)
        if mask is None:
            return ctx
        return ctx.replace(mask=mask if ctx.mask is None else mask & ctx.mask)

    def _neighborhood(self, ctx: Context) -> kernels.Mask | None:
        if ctx.grid is not None:
            return neighborhoods.mask_of(ctx.grid, *self.axes, extra=ctx.extra_tokens)
        ((window,), (stride,), (dilation,), _) = self.axes
        if stride == dilation == 1:
            return None  # The sliding window of the layer.
        return neighborhoods.CausalNeighborhood(window, stride, dilation)

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """As in `attention`, with the biases of the offsets."""
        if self.neighborhood_bias is not None:
            spec, ctx = spec or self.spec, call.ctx
            grid = ctx.grid or (0,)
            settings = (grid, self.axes.window, self.axes.dilation, ctx.extra_tokens)
            step = neighborhoods.NeighborhoodBias(*settings)
            spec = dataclasses.replace(spec, score=(*spec.score, step))
            table = {neighborhoods.BIAS: self.neighborhood_bias[...]}
            operands = operands | table
        return super().attend(x, qkv, mask, operands, call, spec=spec)

    # ---- decoding

    def init_state(self, batch: int, max_len: int, memory=None) -> rolling.Rolling:
        """The state before the first token: (w - 1) d + 1 places for any `max_len`."""
        del max_len
        check_memory(SPEC, memory)
        if self.dims.grid is not None:
            raise UserError(
                "neighborhood_attention: has no decode form on a grid; got grid="
                f"{self.dims.grid}."
            )
        dtype = dtype_of(self.dims.dtype)
        return rolling.empty(batch, self.reach.window, self.shape, dtype)

    def step(self, x: jax.Array, state: rolling.Rolling, ctx: Context):
        """The next T >= 1 tokens [B, T, C] -> y [B, T, C] and the new state."""
        self.check(ctx, is_step=True)
        call = Call(ctx, is_step=True)
        query = self.make_query(x, call)
        key, value = self.make_key_value(x, call)
        query, key = (self.rotate(a, ctx.positions) for a in (query, key))
        ids = cache.document_ids(ctx.segment_ids, state.segment, x.shape[1])
        new = rolling.Entries(key, value, rolling.number(ids, state), ids)
        after = rolling.write(state, new, sinks=0)
        # The place that a single token took was that of the one it no longer sees.
        single = x.shape[1] == 1
        seen = rolling.entries(after) if single else rolling.join(state, new)
        mask = kernels.SlidingWindow(self.reach.window - 1, 0)
        own = self._neighborhood(ctx)
        mask = (
            mask & kernels.Segments()
            if own is None
            else mask & own & kernels.Segments()
        )
        operands = {
            "q_segment_ids": ids,
            "k_segment_ids": seen.segments,
            "q_positions": new.index,
            "k_positions": seen.index,
        }
        heads = self.attend(x, (query, seen.key, seen.value), mask, operands, call)
        return self.finish(x, heads, call), after


def _offsets(axes: Axes) -> int:
    return math.prod(2 * window - 1 for window in axes.window)


def _parameter_count(config: Config, dims: MixerDims) -> int:
    layer = layer_config(config)
    count = sizes.parameter_count(layer, dims)
    if config.relative_bias:
        axes = axes_of(config, _rank_of(config, dims.grid))
        count += sizes.heads_of(layer, dims).num_heads * _offsets(axes)
    return count


def _state_size(config: Config, dims: MixerDims, max_len: int) -> int:
    """(w - 1) d + 1 keys and values with their numbers, the document, its length."""
    del max_len
    heads = sizes.heads_of(layer_config(config), dims)
    axes = axes_of(config, _rank_of(config, dims.grid))
    one = heads.num_kv_heads * (heads.head_dim + heads.value_dim) + 1
    return ((axes.window[0] - 1) * axes.dilation[0] + 1) * one + 2


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """prod(w) keys for each query."""
    axes = axes_of(config, _rank_of(config, dims.grid))
    seen = dataclasses.replace(layer_config(config), window=math.prod(axes.window))
    return sizes.flops(seen, dims, seq_len)


def _lacks(config: Config) -> dict[str, str]:
    """A causal layer needs no grid and sees one way; another has no sequences."""
    if is_causal(config):
        why = "causal=true"
        return {"bidirectional": why, "needs_grid": why}
    why = f"causal={config.causal}: set causal=true"
    return dict.fromkeys(("causal", "decode", "segments"), why)


SPEC = MixerSpec(
    name="neighborhood_attention",
    title="Neighbourhood attention",
    family="vision",
    paper="Generalized Neighborhood Attention",
    source="arXiv 2403.04690, 2504.16922",
    forms=("parallel", "step"),
    capabilities=Capabilities(
        bidirectional=True,
        grid=(1, 2, 3),
        needs_grid=True,
        extra_tokens=True,
        sequence=True,
    ),
    decode=Decode(exact=True),
    parameter_count=_parameter_count,
    state_size=_state_size,
    flops=_flops,
    lacks=_lacks,
    limits=(
        "A token sees its window alone; what is far away needs many layers, a larger "
        "dilation, or other layers between.",
        "Tokens lie in row-major order, not in tiles of the grid: a kernel visits more "
        "tiles than windows fill (attnjax.analysis.neighborhood_cost counts them).",
        "Several causal axes are an 'and' along each, not the order of the tokens.",
        "On a grid the last group of a strided causal axis sees more keys than it "
        "would on a longer axis.",
        "Plain sequences, documents, padding and decoding are for causal layers.",
    ),
    deviations=(
        "Along a sequence the last group of a strided causal layer is taken as whole, "
        "so that what a token sees does not change with the tokens that follow; on a "
        "grid the rule is the authors'.",
        "Tokens before the grid are their additional keys, which every token sees; "
        "here they are queries too, and see all.",
        "The biases of the offsets are those of the authors' older releases, for any "
        "window, and train.",
    ),
)

# Small enough for every rank of grid that holds twelve tokens.
CONFORMANCE = {
    "config": {"window": 2, "stride": 2},
    "dims": {"head_dim": 6},
    "length": 12,
    "grid": (3, 4),
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"causal": True, "window": 3, "stride": 2, "dilation": 2, "relative_bias": True},
    {
        "causal": True,
        "window": 4,
        "stride": 1,
        "num_kv_heads": 2,
        "qk_norm": True,
        "positions": "none",
        "output": ({"type": "gated_attention"},),
    },
    {
        "window": (3, 2),
        "stride": (2, 1),
        "causal": (True, False),
        "relative_bias": True,
        "scale": 0.7,
    },
)
