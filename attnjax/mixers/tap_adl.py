"""Token-aware average pooling (TAP), and a loss that parts attention's rows (ADL).

TAP: queries, keys and values are made of pooled tokens. With pool_0(x) = x and pool_i
the mean over 3 x 3 places at distance i, zeros outside of the image counted,
    s = softmax_i(conv3x3(BN(conv3x3(x)))),  x_tap = sum_{i<K} s_i pool_i(x);
the layer adds Attn(norm(x_tap)) to x as it was.

ADL: with M [T, N] the mean over heads of a layer's weights and m the mean of its rows,
both without entries of at most 2 / N (m is averaged before),
    L = mean_t cos(M_t, m);  the training loss gains lambda times L's mean over layers.

Source: Guo et al., "Robustifying Token Attention for Vision Transformers", arXiv
2303.11126, sections 3.1 and 3.2, and the authors' code.
"""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import nn
from attnjax.core import schema
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.requests import check_request
from attnjax.mixers.slots import base, sizes, windows
from attnjax.mixers.slots.base import Call, Heads


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer.

    Attributes:
        scales: K, pools of distance 0 to K - 1. 1 leaves TAP out: the layer then needs
            no grid, and may be causal.
        pooling: what weighs them: "learned" as above; "mean": all alike; "last": the
            widest alone (with scales=2 a plain 3 x 3 mean).
        diversity_weight: lambda; with 0 there is no ADL, and training takes the
            kernels of `attention`.
        threshold: entries of at most this over N count as 0.
        report: in training, report L of the layers where lambda is 0 too.
    """

    scales: int = 4
    pooling: Literal["learned", "mean", "last"] = "learned"
    diversity_weight: float = 1.0
    threshold: float = 2.0
    report: bool = False

    def __post_init__(self):
        if self.scales < 1:
            raise ValueError(f"scales must be at least 1; got {self.scales}.")
        if self.scales == 1 and self.pooling != "learned":
            raise ValueError(
                "pooling needs a pool besides the token itself; got scales=1, "
                f"pooling={self.pooling}. Raise scales, or leave pooling out."
            )
        for name in ("diversity_weight", "threshold"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must be at least 0; got {value}.")
        if self.threshold != 2 and not measures(self):
            raise ValueError(
                "threshold is that of the loss; got threshold="
                f"{self.threshold}, diversity_weight=0, report=false. Leave it out, or "
                "set report=true."
            )


def measures(config: Config) -> bool:
    """Whether training computes L."""
    return config.diversity_weight > 0 or config.report


# ---- token-aware average pooling


def reference(image: jax.Array, shares: jax.Array) -> jax.Array:
    """x_tap of an image and the shares of its pools, one neighbour at a time.

    Args:
        image: [B, H, W, C].
        shares: s, [B, H, W, K].

    Returns:
        [B, H, W, C].
    """
    total = shares[..., :1] * image
    height, width = image.shape[1:3]
    for i in range(1, shares.shape[-1]):
        wide = jnp.pad(image, ((0, 0), (i, i), (i, i), (0, 0)))
        for down, right in np.ndindex(3, 3):
            top, left = i * down, i * right
            moved = wide[:, top : top + height, left : left + width]
            total = total + shares[..., i : i + 1] * moved / 9
    return total


def pool(image: jax.Array, distance: int) -> jax.Array:
    """pool_i of [B, *grid, C]: the mean over 3 places along each axis, zeros outside of
    the grid counted; by moved images, one axis after the other."""
    if distance == 0:
        return image
    for axis in range(1, image.ndim - 1):
        length = image.shape[axis]
        sides = [(0, 0)] * image.ndim
        sides[axis] = (distance, distance)
        wide = jnp.pad(image, sides)
        before, after = (
            jax.lax.slice_in_dim(wide, start, start + length, axis=axis)
            for start in (0, 2 * distance)
        )
        image = before + image + after
    return image / 3 ** (image.ndim - 2)


def pooled(
    image: jax.Array,
    shares: jax.Array | None,
    *,
    scales: int,
    pooling: Literal["learned", "mean", "last"] = "learned",
) -> jax.Array:
    """x_tap of [B, *grid, C], in its dtype, added up in float32 or wider.

    Args:
        image: x.
        shares: s, [B, *grid, K], for pooling="learned".
        scales: K.
        pooling: as in `Config`.
    """
    wide = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    if pooling == "last":
        return pool(wide, scales - 1).astype(image.dtype)
    pools = (pool(wide, i) for i in range(scales))
    if pooling == "mean":
        return (sum(pools) / scales).astype(image.dtype)
    parts = (shares[..., i : i + 1] * one for i, one in enumerate(pools))
    return sum(parts).astype(image.dtype)


def convolved(image: jax.Array, linear: nn.Linear) -> jax.Array:
    """[B, *grid, I] -> [B, *grid, O]: a convolution of 3 places along each axis, zeros
    outside of the grid. Every place is multiplied with all matrices [I, 3^rank O], in
    row-major order of the places, and the products are moved."""
    grid = image.shape[1:-1]
    products = linear(image).reshape(*image.shape[:-1], 3 ** len(grid), -1)
    sides = ((0, 0), *((1, 1),) * len(grid), (0, 0), (0, 0))
    products, total = jnp.pad(products, sides), 0.0
    for place, move in enumerate(np.ndindex((3,) * len(grid))):
        here = tuple(slice(i, i + n) for i, n in zip(move, grid, strict=True))
        total = total + products[(slice(None), *here, place)]
    return total


class Predictor(nnx.Module):
    """The shares of the pools: conv3x3, batch norm, conv3x3, softmax.

    Parameters: `into` [C, 9 K] and `out` [K, 9 K], kernels without bias, the 9 places
    in row-major order in front of the K shares (3^rank on other grids); `norm_scale`
    and `norm_bias` [K]. Buffers: `norm_mean` and `norm_variance` [K], float32 or wider.
    """

    def __init__(self, scales: int, rank: int, dims: MixerDims, *, rngs: nnx.Rngs):
        places, stored = 3**rank, dtype_of(dims.param_dtype)
        self.wide = jnp.promote_types(dtype_of(dims.dtype), jnp.float32)
        make = partial(nn.Linear, param_dtype=stored, rngs=rngs)
        std = (places * dims.embed_dim) ** -0.5
        into = make(dims.embed_dim, places * scales, std=std, dtype=dims.dtype)
        std = (places * scales) ** -0.5
        out = make(scales, places * scales, std=std, dtype=self.wide)
        self.into, self.out = nnx.data(into), nnx.data(out)
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        self.norm_scale = nn.param(rngs, (scales,), ones, dtype=stored)
        self.norm_bias = nn.param(rngs, (scales,), zeros, dtype=stored)
        start = nn.batch_statistics(scales)
        self.norm_mean = nn.buffer(start["mean"].astype(self.wide))
        self.norm_variance = nn.buffer(start["variance"].astype(self.wide))

    def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
        """[B, *grid, C] -> s [B, *grid, K], float32 or wider; in training the buffers
        move on."""
        hidden = convolved(image, self.into).astype(self.wide)
        shape = hidden.shape
        running = {"mean": self.norm_mean[...], "variance": self.norm_variance[...]}
        flat, running = nn.batch_norm(
            hidden.reshape(-1, shape[-1]), running, train=train, eps=1e-5
        )
        if train:
            self.norm_mean[...] = running["mean"]
            self.norm_variance[...] = running["variance"]
        flat = flat * self.norm_scale[...].astype(self.wide)
        flat = flat + self.norm_bias[...].astype(self.wide)
        return jax.nn.softmax(convolved(flat.reshape(shape), self.out), axis=-1)


# ---- attention diversification


def likeness(weights: jax.Array, seen: jax.Array, *, threshold: float) -> jax.Array:
    """L of one layer, a scalar in [0, 1] where weights are not negative.

    Where keys are hidden, N is the number of keys that a query sees, m_s the mean over
    the queries that see key s, and queries that see nothing do not count.

    Args:
        weights: [B, H, T, N], 0 where hidden.
        seen: bool, [B or 1, H or 1, T, N].
        threshold: over N, what entries must exceed.
    """
    wide = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    rows = jnp.mean(wide, axis=1)
    seen = jnp.broadcast_to(jnp.any(seen, axis=1), rows.shape)
    queries = jnp.maximum(jnp.sum(seen, axis=1, keepdims=True), 1)
    mean = jnp.sum(rows, axis=1, keepdims=True) / queries
    keys = jnp.sum(seen, axis=2, keepdims=True)
    least = threshold / jnp.maximum(keys, 1)
    rows = jnp.where(rows > least, rows, 0)
    mean = jnp.where(seen & (mean > least), mean, 0)
    cosines = jnp.sum(rows * mean, axis=-1) / (_norm(rows) * _norm(mean))
    count = jnp.sum(keys > 0)
    return jnp.sum(cosines) / jnp.maximum(count, 1)


def _norm(rows: jax.Array) -> jax.Array:
    """The norm along the last axis, at least 1e-8, where it has no gradient."""
    squares = jnp.sum(jnp.square(rows), axis=-1)
    return jnp.sqrt(jnp.maximum(squares, 1e-16))


# ---- the options of a layer


class Slot(base.Slot):
    """Both parts in one layer. Parameters and buffers: `predictor`, with learned
    pools."""

    def __init__(
        self, config: Config, heads: Heads, dims: MixerDims, *, rngs: nnx.Rngs
    ):
        del heads
        self.config = config
        self.enters = config.scales > 1
        self.grid = self.predictor = None
        if self.enters:
            self.grid = windows.need_grid(dims, owner="tap_adl")
        if has_predictor(config):
            made = Predictor(config.scales, len(self.grid), dims, rngs=rngs)
            self.predictor = nnx.data(made)
            self.hooks = ("tap_shares",)
        if measures(config) and dims.kernel != "auto":
            raise UserError(
                "tap_adl: the loss reads the layer's weights, which no kernel returns; "
                f"got config.model.kernel={dims.kernel}. Set it to auto, or "
                "diversity_weight=0."
            )

    @staticmethod
    def parameter_count(config: Config, heads: Heads, dims: MixerDims) -> int:
        """9 K (C + K) + 2 K."""
        del heads
        factors = 2 * config.scales * has_predictor(config)
        return _weights(config, dims) + factors

    @staticmethod
    def flops(config: Config, heads: Heads, dims: MixerDims, seq_len: int) -> float:
        """The predictor's products."""
        del heads
        return 2.0 * seq_len * _weights(config, dims)

    def reads(self, ctx: Context) -> tuple[str, ...]:
        """Weights, and which of them are hidden, in training alone."""
        return ("weights", "scores") if ctx.train and measures(self.config) else ()

    def enter(self, x: jax.Array, call: Call) -> jax.Array:
        """Patches pooled; tokens in front of the grid as they are."""
        if not self.enters:
            return x
        ctx, config = call.ctx, self.config
        self._check(x, ctx)
        # What `heads` looks for: a layer that makes no use of `enter` has no TAP.
        call.notes[id(self)] = x
        extra = ctx.extra_tokens
        image = x[:, extra:].reshape(len(x), *ctx.grid, x.shape[-1])
        shares = None
        if self.predictor is not None:
            shares = self.predictor(image, train=ctx.train)
            shares = call.probe("tap_shares", shares)
        image = pooled(image, shares, scales=config.scales, pooling=config.pooling)
        return jnp.concatenate([x[:, :extra], image.reshape(x[:, extra:].shape)], 1)

    def _check(self, x: jax.Array, ctx: Context) -> None:
        hooks = {hook.what for hook in ctx.hooks}
        spec = SPEC.of(self.config)
        check_request(spec, ctx, mask=True, hooks=hooks)
        if len(ctx.grid) != len(self.grid):
            raise UserError(
                "tap_adl: the layer is made for grids of one rank; got grid="
                f"{ctx.grid}, made for {self.grid}. Build the model for it."
            )
        if x.shape[1] != ctx.extra_tokens + math.prod(ctx.grid):
            raise UserError(
                "tap_adl: tokens must be those of the grid, behind the extra ones; got "
                f"T={x.shape[1]}, grid={ctx.grid}, extra_tokens={ctx.extra_tokens}."
            )
        if ctx.streams:
            raise UserError(
                "tap_adl: pools the model's tokens alone; got the extra streams "
                f"{sorted(ctx.streams)}. Set scales=1, or use layers without streams."
            )

    def heads(self, x: jax.Array, heads: jax.Array, call: Call) -> jax.Array:
        """Leaves the loss; the heads stay as they are."""
        if self.enters and id(self) not in call.notes:
            check_request(SPEC.of(self.config), call.ctx, step=call.is_step, mask=True)
            raise UserError(
                "tap_adl: this mixer does not take its input from an option; got "
                f"scales={self.config.scales}. Set scales=1, or use attention."
            )
        if not call.is_step and self.reads(call.ctx):
            seen = call.read("scores") > -jnp.inf
            found = likeness(
                call.read("weights"), seen, threshold=self.config.threshold
            )
            call.metrics["adl"] = jax.lax.stop_gradient(found)
            if self.config.diversity_weight:
                call.losses["adl_loss"] = self.config.diversity_weight * found
        return heads


def has_predictor(config: Config) -> bool:
    """Whether the pools are weighed by what is learned."""
    return config.scales > 1 and config.pooling == "learned"


def _weights(config: Config, dims: MixerDims) -> int:
    if not has_predictor(config):
        return 0
    rank = windows.rank_of(grid=dims.grid)
    return 3**rank * config.scales * (dims.embed_dim + config.scales)


def preset(config: Config) -> attention.Config:
    """Softmax attention with these parts."""
    return attention.Config(output=({"type": "tap_adl", **schema.to_json(config)},))


def _lacks(config: Config) -> dict[str, str]:
    """Pools see both ways, on a grid; without them a layer needs none."""
    if config.scales == 1:
        return {"needs_grid": "scales=1"}
    why = f"scales={config.scales}: set scales=1"
    return dict.fromkeys(("causal", "decode", "segments", "prefix"), why)


SPEC = MixerSpec(
    name="tap_adl",
    title="Token-aware average pooling and attention diversification",
    family="objective",
    paper="Robustifying Token Attention for Vision Transformers",
    source="arXiv 2303.11126",
    forms=("parallel", "step"),
    capabilities=Capabilities(
        bidirectional=True,
        prefix=True,
        grid=(1, 2, 3),
        needs_grid=True,
        extra_tokens=True,
    ),
    decode=Decode(exact=True),
    lacks=_lacks,
    **sizes.counts_of(preset),
    limits=(
        "The loss reads the weights of all heads, which no fused kernel returns: with "
        "diversity_weight > 0 (or report) training computes them in plain JAX, "
        "O(B H T N) memory; the run's log calls it explicit. Evaluation, and pools "
        "without the loss, take the kernels of `attention`.",
        "The mean over heads hides what a single one looks at.",
        "The threshold falls with the number of keys, so L changes with the size of "
        "images.",
        "Statistics of the batch norm are those of a micro-batch, over all devices.",
        "In layers of parts (davit, maxvit, shift_equivariance) pools read what is "
        "normed already.",
        "For other options of attention name it in the `output` of an attention layer.",
    ),
    deviations=(
        "Tokens in front of the grid are not pooled, but count as queries and as keys "
        "in the loss; the authors' layers have none.",
        "On grids of one or three axes pools and convolutions take 3 places along each "
        "axis; the paper's are images.",
        "Where keys are hidden (causal layers, windows, documents) the mean and the "
        "threshold are over what is seen: not in the paper.",
        "The mean over L layers is divided by L, not by L + 1e-6.",
        "pooling=mean and pooling=last are ways to fix the pools, which the paper's "
        "row without learning leaves open.",
    ),
)

CONFORMANCE = {
    "dims": {"head_dim": 6},  # Three axes share a head's rotary pairs.
    "length": 15,
    "grid": (3, 5),
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"scales": 1, "threshold": 1.0},
    {"scales": 3, "pooling": "mean", "diversity_weight": 0.0},
)
