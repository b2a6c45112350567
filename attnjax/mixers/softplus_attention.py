"""Length-scaled softplus attention (LSSA), and the same re-weighted (LSSAR).

With unit queries and keys and N_i the number of keys that row i sees:
    s_ij = log(D) log(N_i) q_i . k_j,   a = softplus(s),   A = a / (sum a + eps)
    b = relu(A N_i - O_i)^p,            A' = b / (sum b + eps)
O_i is 1, and 0 in the first three rows. LSSA mixes the values with A, LSSAR with A',
which keeps what is above the mean weight. No 1 / sqrt(D), no learned parameter.

Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large
Language Models", arXiv 2501.13428.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.requests import check_request
from attnjax.mixers.slots import across_devices, options, sizes
from attnjax.mixers.slots.base import Call

UNIT_EPS = 1e-12  # Below this a query or key is divided by it, not by its length.
FIRST_ROWS = 3  # Rows with at most so many keys keep every weight: O_i = 0.


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer; none takes the model's value.

    Attributes:
        form: "lssar", or "lssa": without the second stage.
        power: p of the second stage, 15 for longer texts than those of training, 3
            for the length of training.
        phi: what takes the place of exp before the division by the sum: "softplus",
            "sigmoid", "relu", or "exp" (softmax on these scores).
        guard: "sum": eps = 1e-8 is added to the sum of b as it stands, which makes
            rows with nothing far above the mean vanish; "peak": rows are divided by
            their largest b first, so that eps has no say.
        num_heads: H, query heads.
        num_kv_heads: K, key/value heads.
        head_dim: D, at least 2: log(1) would make all scores 0.
        value_head_dim: E (none: D).
        cross: keys and values come from the memory instead of the sequence.
        positions: "rope", "none", or "inherit": the model's rotary positions if it
            has them.
        rope: rotary settings of this layer (none: the model's).
        window: tokens that a query sees at and before its own (none: all).
        right_window: tokens after it where attention is not causal.
        sinks: tokens at the start of the document that stay visible beyond the
            window.
        output: options of other mechanisms as in `attention`, none of which may
            change the scores or their weights.
    """

    form: Literal["lssar", "lssa"] = "lssar"
    power: int = 15
    phi: Literal["softplus", "sigmoid", "relu", "exp"] = "softplus"
    guard: Literal["sum", "peak"] = "sum"
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    cross: bool = False
    positions: Literal["inherit", "rope", "none"] = "inherit"
    rope: nn.Rope | None = None
    window: int | None = None
    right_window: int | None = None
    sinks: int = 0
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        if self.power < 1:
            raise ValueError(f"power must be at least 1; got {self.power}.")
        if self.form == "lssa" and (self.power != 15 or self.guard != "sum"):
            raise ValueError(
                "power and guard belong to the second stage, form=lssar; got "
                f"form=lssa, power={self.power}, guard={self.guard}. Remove them."
            )
        layer_config(self)


def layer_config(config: Config) -> attention.Config:
    """The layer of attention around these weights."""
    same = {field.name for field in dataclasses.fields(attention.Config)}
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in same
    }
    return attention.Config(qk_norm=False, **fields)


def reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    *,
    power: int | None = 15,
    eps: float = 1e-8,
) -> jax.Array:
    """The definition, one line a step.

    Args:
        query: [B, T, H, D].
        key: [B, S, H, D].
        value: [B, S, H, E].
        visible: bool [B, T, S].
        power: p, or None for LSSA.
        eps: of both divisions.

    Returns:
        [B, T, H, E].
    """
    query, key = unit(query), unit(key)
    count = visible.sum(-1)[:, None, :, None]  # N, [B, 1, T, 1]
    mask = visible[:, None]
    scale = math.log(query.shape[-1]) * jnp.log(jnp.maximum(count, 1))
    weights = jax.nn.softplus(scale * jnp.einsum("bthd,bshd->bhts", query, key)) * mask
    weights = weights / (weights.sum(-1, keepdims=True) + eps)
    if power is not None:
        offset = jnp.where(count > FIRST_ROWS, 1, 0)
        weights = jax.nn.relu(weights * count - offset) ** power
        weights = weights / (weights.sum(-1, keepdims=True) + eps)
    return jnp.einsum("bhts,bshe->bthe", weights, value)


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, in the dtype of x; 0 stays 0, with gradient 0."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, UNIT_EPS**2))).astype(x.dtype)


def visible_keys(
    mask: kernels.Mask,
    operands: dict,
    shape: tuple[int, int, int],
    heads: int,
    *,
    rows: jax.sharding.NamedSharding | None = None,
    target: kernels.Target | None = None,
) -> jax.Array:
    """How many keys each row sees, float32 [B, T, heads].

    The log of the sum of exp(0) over them, by the kernels themselves: every mask is
    counted as it is applied, and no array is T x S.

    Args:
        mask, operands: as for `kernels.attention`.
        shape: (B, T, S).
        heads: 1 where all heads see the same keys.
        rows: how arrays [B, ...] lie on the devices (`Context.rows`); None on one.
        target: the device that the call is compiled for.
    """
    batch, length, keys = shape
    zeros = jnp.zeros((batch, length, heads, 1), jnp.float32)
    key = jnp.zeros((batch, keys, heads, 1), jnp.float32)
    spec = kernels.AttentionSpec(mask=mask, return_lse=True)
    needed = {operand.name for operand in spec.operands}
    always = {"q_offset", "q_positions", "k_positions", "kv_mask"}
    own = {k: v for k, v in operands.items() if k in needed | always}
    how = {"rows": rows, "implementation": "auto", "target": target}
    _, lse = across_devices.attention(zeros, key, key, spec, own, **how)
    return jax.lax.stop_gradient(jnp.round(jnp.exp(lse)))


class Mixer(attention.Mixer):
    """One layer, with the parameters of `attention`."""

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        super().__init__(layer_config(config), dims, rngs=rngs)
        if self.shape.head_dim < 2:
            raise UserError(
                "softplus_attention: head_dim must be at least 2, for scores carry "
                f"log(head_dim); got head_dim={self.shape.head_dim}."
            )
        options.refuse_changes(
            self.slots(),
            ("attend",),
            self.shape,
            dims,
            owner=SPEC.name,
            why="scores and their weights are the mechanism",
        )
        # Rotation keeps lengths, so keys may enter the cache as units.
        self.query_norm = self.key_norm = unit
        self.sharpened = config.form == "lssar"
        self.spec = _kernel_spec(config, self.shape.head_dim)

    def check(self, ctx: Context, *, is_step: bool) -> None:
        """Refuse what this layer does not do."""
        check_request(
            SPEC, ctx, step=is_step, mask=not self.cross, hooks=self.known_hooks()
        )
        super().check(ctx, is_step=is_step)

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """(query [B, T, H, D], key [B, S, K, D], value [B, S, K, E]), queries and keys
        of length 1, to [B, T, H, E]."""
        query, key, value = qkv
        per_head = 1 if call.ctx.mask is None else query.shape[2]
        shape = (*query.shape[:2], key.shape[1])
        where = {"rows": call.ctx.rows, "target": self.dims.target}
        count = visible_keys(mask, operands, shape, per_head, **where)
        longer = jnp.log(jnp.maximum(count, 1))[..., None].astype(query.dtype)
        if self.sharpened:
            rows = jnp.swapaxes(count, 1, 2)
            offset = jnp.where(rows > FIRST_ROWS, 1.0, 0.0)
            operands = operands | {"visible_keys": rows, "sharpen_offset": offset}
        qkv = (query * longer, key, value)
        return super().attend(x, qkv, mask, operands, call, spec=spec)


def _kernel_spec(config: Config, head_dim: int) -> kernels.AttentionSpec:
    weight_map = {
        "softplus": kernels.SoftplusL1(),
        "sigmoid": kernels.Sigmoid(normalise=True),
        "relu": kernels.ReluPower(normalise=True),
        "exp": kernels.Softmax(),
    }[config.phi]
    again = None
    if config.form == "lssar":
        eps = 1e-8 if config.guard == "sum" else 0.0
        again = kernels.Sharpen(config.power, eps)
    return kernels.AttentionSpec(
        scale=math.log(head_dim), weight_map=weight_map, reweight=again
    )


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """The second stage takes the scores once more."""
    layer = layer_config(config)
    total = attention.SPEC.flops(layer, dims, seq_len)
    if config.form == "lssa":
        return total
    heads, seen = sizes.heads_of(layer, dims), seq_len
    if config.window is not None:
        seen = min(seq_len, config.window + config.sinks)
    return total + 2.0 * seq_len * seen * heads.num_heads * heads.head_dim


SPEC = MixerSpec(
    name="softplus_attention",
    title="Softplus attention with re-weighting",
    family="softmax",
    paper="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large "
    "Language Models",
    source="arXiv 2501.13428",
    forms=("lssa", "lssar"),
    capabilities=Capabilities(bidirectional=True, cross=True, prefix=True),
    decode=Decode(exact=True),
    parameter_count=lambda config, dims: attention.SPEC.parameter_count(
        layer_config(config), dims
    ),
    state_size=lambda config, dims, max_len: attention.SPEC.state_size(
        layer_config(config), dims, max_len
    ),
    flops=_flops,
    limits=(
        "LSSAR takes two passes over the keys.",
        "Each call counts the visible keys of its rows with one more pass of a single "
        "head of size 1.",
        "With guard=sum a row whose weights are all near the mean gives nearly 0.",
        "Where the weights of a row are all equal and it sees more than three keys, "
        "LSSAR gives 0.",
        "While decoding, a prefix must lie within one step.",
    ),
    deviations=(
        "The first three rows are those that see at most three keys: the same under a "
        "causal mask, and defined under any other.",
        "eps is that of re-implementations, 1e-8; the authors' value is not known.",
        "A model's QK-norm has no part in it: queries and keys are units.",
    ),
)

# Higher powers are too steep for differences of float32 losses; the mechanism's own
# tests compare their gradients with the definition's.
CONFORMANCE = {"config": {"power": 2}}
# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"form": "lssa", "power": 15, "positions": "none"},
    {"phi": "sigmoid", "num_kv_heads": 6, "guard": "peak"},
    {"phi": "exp", "window": 4, "sinks": 1, "output": ({"type": "gated_attention"},)},
)
