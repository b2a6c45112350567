"""Complex attention: queries and keys in polar form, angles adapted head by head.

Entries (i, i + D/2) of a head are one complex number rho exp(i theta). The score of
query m and key n is the sum over i of
rho^q rho^k cos(alpha (theta^q - theta^k) + beta + gamma (m - n) omega_i) / sqrt(D)
with omega the rotary frequencies: the dot product of
rho^q exp(i (alpha theta^q + beta + gamma omega m)) and
rho^k exp(i (alpha theta^k + gamma omega n)), which the fused kernel computes.

Source: Shao et al., "ComplexFormer", arXiv 2505.10222 v1, withdrawn by its first author
in v2. The abstract gives the score; what alpha, beta, gamma and the polar form are made
of is not stated there and is a choice of this file.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.requests import check_memory, check_request
from attnjax.mixers.slots import sizes
from attnjax.mixers.slots.base import Call, Heads


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer.

    Attributes:
        euler: where modulus and angle come from: "cartesian": of each pair of entries,
            so that rotary attention is a special case; "polar": softplus of the first
            half is the modulus, the second half the angle itself, without the jump of
            an adapted angle at pi.
        adapt: alpha (from 1), beta (from 0) and gamma (from 1) are learned for each
            key/value head ("head"), once for all ("shared"), or stay ("none").
        num_heads, num_kv_heads, head_dim: as in `attention`.
        positions: "rope", "none", or "inherit": the model's rotary frequencies if it
            has them; without them there is no gamma.
        rope: rotary settings of this layer (none: the model's).
        qk_norm, soft_cap, weight_map, window, sinks, output: as in `attention`.
    """

    euler: Literal["cartesian", "polar"] = "cartesian"
    adapt: Literal["head", "shared", "none"] = "head"
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    rope: nn.Rope | None = None
    qk_norm: bool | None = None
    soft_cap: float | None = None
    weight_map: Literal["softmax", "sink_logit", "off_by_one"] = "softmax"
    window: int | None = None
    sinks: int = 0
    output: tuple[dict[str, Any], ...] = ()


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` that the transformed queries and keys are given to."""
    shared = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("euler", "adapt")
    }
    return attention.Config(**shared)


def polar(x: jax.Array, euler: str) -> tuple[jax.Array, jax.Array]:
    """Modulus and angle [..., D/2] of [..., D], float32 or wider.

    The angle of 0 is 0, and has the gradient 0.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    if euler == "polar":
        return jax.nn.softplus(first), second
    square = first * first + second * second
    # Beside the origin's own gradient, which is undefined, not a number would come in.
    is_zero = square < jnp.finfo(wide).tiny
    modulus = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
    angle = jnp.arctan2(jnp.where(is_zero, 0, second), jnp.where(is_zero, 1, first))
    return modulus, angle


def cartesian(modulus: jax.Array, angle: jax.Array) -> jax.Array:
    """[..., D/2] twice -> [..., D]."""
    parts = [modulus * jnp.cos(angle), modulus * jnp.sin(angle)]
    return jnp.concatenate(parts, axis=-1)


def reference(query, key, distance, frequency, *, alpha, beta, gamma) -> jax.Array:
    """Scores by angles, every pair and channel written out.

    Args:
        query: (modulus, angle), each [B, T, H, D/2].
        key: (modulus, angle), each [B, S, H, D/2].
        distance: m - n, [B, T, S].
        frequency: omega, [D/2].
        alpha, beta: [H, D/2].
        gamma: [H].

    Returns:
        [B, H, T, S], scaled by 1 / sqrt(D).
    """
    between = query[1][:, :, None] - key[1][:, None]
    turned = gamma[:, None] * frequency * distance[..., None, None]
    cosine = jnp.cos(alpha * between + beta + turned)
    scores = jnp.sum(query[0][:, :, None] * key[0][:, None] * cosine, axis=-1)
    return jnp.moveaxis(scores, -1, 1) / math.sqrt(2 * query[0].shape[-1])


class Mixer(attention.Mixer):
    """One layer.

    Parameters: those of `attention`, and alpha and beta [K, D/2] and gamma [K], K being
    1 with adapt=shared.
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        self.config = config
        super().__init__(layer_config(config), dims, rngs=rngs)
        if self.shape.head_dim % 2:
            raise UserError(
                "complexformer: head_dim must be even, as its entries are complex "
                f"numbers; got head_dim={self.shape.head_dim}. Change it."
            )
        if self.rope is not None and self.rope.fraction != 1.0:
            raise UserError(
                "complexformer: every pair of entries is turned; got "
                f"rope.fraction={self.rope.fraction}. Set it to 1."
            )
        width = self.shape.head_dim
        if self.rope is not None and self.rope.rotated_dim(width) != width:
            raise UserError(
                "complexformer: every pair of entries is turned, an equal share of "
                f"them by each axis of grid={dims.grid}; got head_dim={width}. Make it "
                f"a multiple of {2 * len(dims.grid)}, or use other positions."
            )

    def _make_maps(self, config: attention.Config, after: Heads, rngs) -> None:
        super()._make_maps(config, after, rngs)
        self.alpha = self.beta = self.gamma = None
        if self.config.adapt == "none":
            return
        heads = self.shape.num_kv_heads if self.config.adapt == "head" else 1
        shape = (heads, self.shape.head_dim // 2)
        stored = dtype_of(self.dims.param_dtype)
        ones, zeros = initializers.ones, initializers.zeros
        self.alpha = nnx.data(nn.param(rngs, shape, ones, dtype=stored))
        self.beta = nnx.data(nn.param(rngs, shape, zeros, dtype=stored))
        if self.rope is not None:
            gamma = nn.param(rngs, (heads,), ones, dtype=stored)
            self.gamma = nnx.data(gamma)

    def check(self, ctx: Context, *, is_step: bool) -> None:
        """Refuse what this layer does not do."""
        known = self.known_hooks()
        check_request(SPEC, ctx, step=is_step, mask=True, hooks=known)
        super().check(ctx, is_step=is_step)

    def make_query(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, C] -> [B, T, H, D]: rho exp(i (alpha theta + beta))."""
        return self._adapted(super().make_query(x, call), self.beta)

    def make_key_value(self, x: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
        """[B, S, C] -> [B, S, K, D]: rho exp(i alpha theta), and [B, S, K, E]."""
        key, value = super().make_key_value(x, call)
        return self._adapted(key, None), value

    def _adapted(self, x: jax.Array, shift) -> jax.Array:
        modulus, angle = polar(x, self.config.euler)
        if self.alpha is not None:
            angle = angle * self._spread(self.alpha, x)
        if shift is not None:
            angle = angle + self._spread(shift, x)
        return cartesian(modulus, angle).astype(x.dtype)

    def _spread(self, parameter, x: jax.Array) -> jax.Array:
        """[K, ...] or [1, ...] for the heads of x, in float32 or wider."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        values = parameter[...].astype(wide)
        groups = x.shape[2] // self.shape.num_kv_heads
        return jnp.repeat(values, groups, axis=0) if len(values) > 1 else values

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """exp(i gamma omega position) on [B, T, heads, D]."""
        if self.rope is None or self.gamma is None:
            return super().rotate(x, positions)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        angle, temperature = self.rope.angles(positions, x.shape[-1], wide)
        angle = angle[:, :, None] * self._spread(self.gamma, x)[:, None]
        first, second = jnp.split(x.astype(wide), 2, axis=-1)
        cos, sin = jnp.cos(angle) * temperature, jnp.sin(angle) * temperature
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)

    def init_state(self, batch: int, max_len: int, memory=None):
        """The cache of `attention`: adapted keys have the size of plain ones."""
        check_memory(SPEC, memory)
        return super().init_state(batch, max_len)


def _parameter_count(config: Config, dims: MixerDims) -> int:
    layer = layer_config(config)
    count = attention.SPEC.parameter_count(layer, dims)
    if config.adapt == "none":
        return count
    heads = sizes.heads_of(layer, dims)
    sets = heads.num_kv_heads if config.adapt == "head" else 1
    return count + sets * (heads.head_dim + (sizes.rope_of(layer, dims) is not None))


SPEC = MixerSpec(
    name="complexformer",
    title="Complex attention with adaptive angles",
    family="softmax",
    paper="ComplexFormer: Disruptively Advancing Transformer Inference Ability",
    source="arXiv 2505.10222v1",
    forms=("parallel", "step"),
    capabilities=Capabilities(bidirectional=True, prefix=True, sequence=True),
    decode=Decode(exact=True),
    parameter_count=_parameter_count,
    state_size=lambda config, dims, max_len: attention.SPEC.state_size(
        layer_config(config), dims, max_len
    ),
    flops=lambda config, dims, seq_len: attention.SPEC.flops(
        layer_config(config), dims, seq_len
    ),
    limits=(
        "The paper is withdrawn and its results cannot be checked.",
        "With euler=cartesian and alpha other than 1 a score jumps where an angle "
        "passes pi.",
        "Angles are adapted by a linear map; another one would need every pair and "
        "channel at once.",
    ),
    deviations=(
        "Only the form of the score is the paper's; the polar form and the adaptation "
        "are ours.",
        "alpha, beta and gamma belong to a key/value head, as queries that share a key "
        "must share how its angle is read.",
    ),
)

# Smooth everywhere, so that differences of a loss are its derivative.
CONFORMANCE = {"config": {"euler": "polar"}}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"euler": "cartesian", "head_dim": 6, "window": 4, "sinks": 1, "soft_cap": 5.0},
    {"euler": "cartesian", "adapt": "shared"},
    {
        "adapt": "none",
        "positions": "none",
        "qk_norm": True,
        "weight_map": "sink_logit",
        "output": ({"type": "gated_attention"},),
    },
)
