"""Multi-head latent attention: keys and values of all heads from one small latent.

c_t = norm(x_t W_D), k_t,h = [c_t W_K,h | r_t], v_t,h = c_t W_V,h with r_t = rope(x_t
W_R) shared by the heads; only [c_t | r_t] is cached, R + dr numbers a token however
many heads. Decoding can stay in the latent space: q . (c W_K) = (q W_K^T) . c and
sum_s p_s (c_s W_V) = (sum_s p_s c_s) W_V (the absorbed form).

Source: DeepSeek-AI, "DeepSeek-V2", arXiv 2405.04434, section 2.1 and appendix C
(eq. 9-19, 37-47). YaRN's factor on the scale: DeepSeek-AI's released model code.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.requests import check_memory, check_request
from attnjax.mixers.slots import cache, options
from attnjax.mixers.slots import sizes as attention_sizes
from attnjax.mixers.slots.base import Call, Heads


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer; none takes the value that DeepSeek-V2 has in proportion.

    Attributes:
        num_heads: H (none: the model's).
        q_rank: width of the queries' latent (none: queries straight from x). V2 has
            12 D.
        kv_rank: R, width of the latent of keys and values (none: 4 D).
        nope_dim: entries of a head that carry no position (none: D).
        rope_dim: dr, entries that do, their key shared by all heads (none: D / 2, an
            even number); 0: none.
        value_head_dim: E (none: D).
        latent_norm: RMSNorm of both latents.
        positions: "rope", "none", or "inherit": the model's rotary positions if it
            has them. Without them the shared key is there, but not rotated.
        rope: rotary settings of this layer (none: the model's).
        yarn_mscale: a in the factor (0.1 a ln(factor) + 1)^2 on the scale where
            rope.scaling=yarn (V2 0.707, V3 1; 0: no factor).
        decode_form: "absorbed": scores and mixing in the latent space; "expanded":
            keys and values of the whole cache made again; "auto": whichever needs
            fewer FLOPs for the tokens of the step.
        soft_cap, weight_map, window, sinks: as in `attention`.
        output: options of mechanisms in order, as in `attention`; those that change
            keys or values have no place here.
    """

    num_heads: int | None = None
    q_rank: int | None = None
    kv_rank: int | None = None
    nope_dim: int | None = None
    rope_dim: int | None = None
    value_head_dim: int | None = None
    latent_norm: bool = True
    positions: Literal["inherit", "rope", "none"] = "inherit"
    rope: nn.Rope | None = None
    yarn_mscale: float = 1.0
    decode_form: Literal["auto", "absorbed", "expanded"] = "auto"
    soft_cap: float | None = None
    weight_map: Literal["softmax", "sink_logit", "off_by_one"] = "softmax"
    window: int | None = None
    sinks: int = 0
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        for name in ("q_rank", "kv_rank", "nope_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if self.rope_dim is not None and (self.rope_dim < 0 or self.rope_dim % 2):
            raise ValueError(
                f"rope_dim must be even and at least 0; got {self.rope_dim}."
            )
        if self.rope is not None and (self.positions == "none" or self.rope_dim == 0):
            raise ValueError(
                "rope goes with positions=rope or inherit and a rope_dim; got "
                f"positions={self.positions}, rope_dim={self.rope_dim}. Remove rope."
            )
        if self.positions == "rope" and self.rope_dim == 0:
            raise ValueError(
                "positions=rope needs a rope_dim; got rope_dim=0. Use positions=none."
            )
        if self.yarn_mscale < 0:
            raise ValueError(f"yarn_mscale must be at least 0; got {self.yarn_mscale}.")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths of one layer: `Config` with every default worked out."""

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Entries of one query."""
        return self.nope_dim + self.rope_dim

    @property
    def cached(self) -> int:
        """Numbers in the cache for one token."""
        return self.kv_rank + self.rope_dim


def sizes_of(config: Config, dims: MixerDims) -> Sizes:
    """The widths of a layer in a model."""
    head = dims.head_dim
    own = attention_sizes.own
    return Sizes(
        num_heads=own(config.num_heads, dims.num_heads),
        q_rank=config.q_rank,
        kv_rank=own(config.kv_rank, 4 * head),
        nope_dim=own(config.nope_dim, head),
        rope_dim=own(config.rope_dim, 2 * max(1, head // 4)),
        value_dim=own(config.value_head_dim, head),
    )


def rope_of(config: Config, dims: MixerDims) -> nn.Rope | None:
    """The layer's rotary settings, or None."""
    if config.positions == "none" or sizes_of(config, dims).rope_dim == 0:
        return None
    own = config.rope or dims.rope
    if config.positions == "rope":
        own = own or nn.Rope()
    return nn.rope_on_grid(own, dims.grid, dims.prefix_tokens)


def layer_config(config: Config, dims: MixerDims) -> attention.Config:
    """The layer of `attention` that expanded keys and values are given to."""
    sizes, rope = sizes_of(config, dims), rope_of(config, dims)
    scale = sizes.head_dim**-0.5
    if rope is not None and rope.scaling == "yarn":
        scale *= (0.1 * config.yarn_mscale * math.log(rope.factor) + 1.0) ** 2
    return attention.Config(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        value_head_dim=sizes.value_dim,
        positions="none",
        scale=scale,
        soft_cap=config.soft_cap,
        weight_map=config.weight_map,
        window=config.window,
        sinks=config.sinks,
        output=config.output,
    )


def reference(
    query: jax.Array,
    latent: jax.Array,
    shared: jax.Array,
    key_up: jax.Array,
    value_up: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """The definition, eq. 10-18, after the projections of the token itself.

    Args:
        query: [B, T, H, dn + dr], its last dr entries rotated.
        latent: c, [B, S, R].
        shared: r, rotated, [B, S, dr].
        key_up: W_K, [R, H, dn].
        value_up: W_V, [R, H, E].
        visible: bool, broadcastable to [B, H, T, S].

    Returns:
        [B, T, H, E].
    """
    key = jnp.einsum("bsr,rhd->bshd", latent, key_up)
    shared = jnp.broadcast_to(shared[:, :, None], (*key.shape[:3], shared.shape[-1]))
    key = jnp.concatenate([key, shared], axis=-1)
    value = jnp.einsum("bsr,rhe->bshe", latent, value_up)
    return attention.reference(query, key, value, visible)


class Mixer(attention.Mixer):
    """One layer.

    Parameters: down [C, R + dr], latent_norm [R], key_up [R, H dn], value_up [R, H E],
    query [C, H (dn + dr)], or query_down [C, q_rank], query_latent_norm [q_rank] and
    query [q_rank, H (dn + dr)]; out [H E, C]; `sink` and output options as in
    `attention`. Biases, where the model has them, at query_down, down and out.
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        self.config, self.sizes = config, sizes_of(config, dims)
        super().__init__(layer_config(config, dims), dims, rngs=rngs)
        self.rope = rope_of(config, dims)
        options.refuse_changes(
            self.slots(),
            ("key", "value"),
            self.shape,
            dims,
            owner=SPEC.name,
            why="keys and values are made from the cached latent and stay as they are",
        )

    def _make_maps(self, config: attention.Config, after: Heads, rngs) -> None:
        dims, sizes = self.dims, self.sizes
        stored = dtype_of(dims.param_dtype)
        make = partial(
            nn.Linear, dtype=dtype_of(dims.dtype), param_dtype=stored, rngs=rngs
        )
        into = partial(make, std=dims.init_std)
        norm = partial(nn.RMSNorm, eps=dims.norm_eps, param_dtype=stored, rngs=rngs)
        queries = sizes.num_heads * sizes.head_dim
        self.query_down = self.query_latent_norm = self.latent_norm = self.sink = None
        if sizes.q_rank is not None:
            self.query_down = nnx.data(
                into(dims.embed_dim, sizes.q_rank, use_bias=dims.use_bias)
            )
            if self.config.latent_norm:
                self.query_latent_norm = nnx.data(norm(sizes.q_rank))
        self.query = into(sizes.q_rank or dims.embed_dim, queries)
        self.down = into(dims.embed_dim, sizes.cached, use_bias=dims.use_bias)
        if self.config.latent_norm:
            self.latent_norm = nnx.data(norm(sizes.kv_rank))
        self.key_up = into(sizes.kv_rank, sizes.num_heads * sizes.nope_dim)
        self.value_up = into(sizes.kv_rank, sizes.num_heads * sizes.value_dim)
        self.out = make(
            after.num_heads * after.value_dim,
            dims.embed_dim,
            use_bias=dims.use_bias,
            std=dims.out_init_std,
        )
        if config.weight_map == "sink_logit":
            zeros = jax.nn.initializers.zeros
            sink = nn.param(rngs, (sizes.num_heads,), zeros, dtype=stored)
            self.sink = nnx.data(sink)

    # ---- parts

    def check(self, ctx: Context, *, is_step: bool) -> None:
        """Refuse what this layer does not do."""
        known = self.known_hooks()
        check_request(SPEC, ctx, step=is_step, mask=True, hooks=known)
        expanded = [hook.what for hook in ctx.hooks if hook.what in ("key", "value")]
        if is_step and expanded:
            raise UserError(
                "mla: decoding keeps latents and no keys or values; got hooks on "
                f"{expanded} in a decoding step. Use the hook 'latent'."
            )
        super().check(ctx, is_step=is_step)

    def known_hooks(self) -> tuple[str, ...]:
        """Those of `attention`, and "latent": [B, S, R + dr], before positions."""
        return (*super().known_hooks(), "latent")

    def make_query(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, C] -> [B, T, H, dn + dr], without positions."""
        latent = x if self.query_down is None else self.query_down(x)
        if self.query_latent_norm is not None:
            latent = self.query_latent_norm(latent)
        query = self.query(latent).reshape(*x.shape[:2], -1, self.sizes.head_dim)
        for slot in self.slots():
            query = slot.query(x, query, call)
        return call.probe("query", query, head_axis=2)

    def make_latent(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, S, C] -> [c | r], [B, S, 1, R + dr], without positions."""
        latent, shared = jnp.split(self.down(x), [self.sizes.kv_rank], axis=-1)
        if self.latent_norm is not None:
            latent = self.latent_norm(latent)
        both = jnp.concatenate([latent, shared], axis=-1)
        return call.probe("latent", both)[:, :, None]

    def expand(self, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, 1, R + dr] -> keys [B, S, H, dn + dr] and values [B, S, H, E]."""
        sizes, latent = self.sizes, latent[:, :, 0]
        latent, shared = jnp.split(latent, [sizes.kv_rank], axis=-1)
        shape = (*latent.shape[:2], sizes.num_heads)
        key = self.key_up(latent).reshape(*shape, sizes.nope_dim)
        shared = jnp.broadcast_to(shared[:, :, None], (*shape, sizes.rope_dim))
        value = self.value_up(latent).reshape(*shape, sizes.value_dim)
        return jnp.concatenate([key, shared], axis=-1), value

    def make_key_value(self, x: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
        """[B, S, C] -> [B, S, H, dn + dr], without positions, and [B, S, H, E]."""
        key, value = self.expand(self.make_latent(x, call))
        key = call.probe("key", key, head_axis=2)
        return key, call.probe("value", value, head_axis=2)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary positions on the last dr entries of [B, T, heads, ...].

        YaRN's temperature is left to the scale, since it is one of the whole score.
        """
        if self.rope is None:
            return x
        plain, turned = jnp.split(x, [x.shape[-1] - self.sizes.rope_dim], axis=-1)
        turned = nn.apply_rope(turned, positions, self.rope)
        temperature = self.rope.temperature
        if temperature != 1.0:
            turned = turned / jnp.asarray(temperature, turned.dtype)
        return jnp.concatenate([plain, turned], axis=-1)

    # ---- decoding

    def init_state(self, batch: int, max_len: int, memory=None) -> cache.Cache:
        """An empty cache: `key` [B, L, 1, R + dr] holds [c | r], r rotated; `value` is
        empty, as the values are made of c."""
        check_memory(SPEC, memory)
        one = Heads(self.sizes.num_heads, 1, self.sizes.cached, 0)
        return cache.empty(batch, max_len, one, dtype_of(self.dims.dtype))

    def step(self, x: jax.Array, state: cache.Cache, ctx: Context):
        """The next T >= 1 tokens [B, T, C] -> y [B, T, C] and the new state."""
        self.check(ctx, is_step=True)
        call = Call(ctx, is_step=True)
        x = call.probe("input", x)
        query = self.rotate(self.make_query(x, call), ctx.positions)
        latent = self.rotate(self.make_latent(x, call), ctx.positions)
        new = (query, latent, latent[..., :0])
        (query, latent, _), mask, operands, state = self._extend(new, state, ctx)
        if is_absorbed(self.config, self.sizes, x.shape[1], latent.shape[1]):
            heads = self._absorbed(x, query, latent, mask, operands, call)
        else:
            qkv = (query, *self.expand(latent))
            heads = self.attend(x, qkv, mask, operands, call)
        return self.finish(x, heads, call), state

    def _absorbed(self, x, query, latent, mask, operands, call: Call) -> jax.Array:
        """Multi-query attention with keys [c | r] and values c."""
        sizes = self.sizes
        up = (sizes.kv_rank, sizes.num_heads, -1)
        key_up = self.key_up.kernel[...].astype(query.dtype).reshape(up)
        value_up = self.value_up.kernel[...].astype(query.dtype).reshape(up)
        plain, turned = jnp.split(query, [sizes.nope_dim], axis=-1)
        plain = jnp.einsum("bthd,rhd->bthr", plain, key_up)
        query = jnp.concatenate([plain, turned], axis=-1)
        qkv = (query, latent, latent[..., : sizes.kv_rank])
        mixed = self.attend(x, qkv, mask, operands, call)
        return jnp.einsum("bthr,rhe->bthe", mixed, value_up)


def is_absorbed(config: Config, sizes: Sizes, new: int, cached: int) -> bool:
    """Whether a step of `new` tokens over `cached` places uses the absorbed form."""
    if config.decode_form != "auto":
        return config.decode_form == "absorbed"
    up = sizes.kv_rank * (sizes.nope_dim + sizes.value_dim)
    absorbed = new * up + new * cached * (2 * sizes.kv_rank + sizes.rope_dim)
    expanded = cached * up + new * cached * (sizes.head_dim + sizes.value_dim)
    return absorbed < expanded


def _parameter_count(config: Config, dims: MixerDims) -> int:
    sizes, layer = sizes_of(config, dims), layer_config(config, dims)
    heads = attention_sizes.heads_of(layer, dims)
    chosen = options.resolve(config.output, heads)
    after = options.heads_after(chosen, heads)
    queries = sizes.num_heads * sizes.head_dim
    count = (sizes.q_rank or dims.embed_dim) * queries
    bias, norm = dims.use_bias, config.latent_norm
    if sizes.q_rank is not None:
        count += sizes.q_rank * (dims.embed_dim + bias + norm)
    count += (dims.embed_dim + bias) * sizes.cached + norm * sizes.kv_rank
    count += sizes.kv_rank * sizes.num_heads * (sizes.nope_dim + sizes.value_dim)
    count += (after.num_heads * after.value_dim + bias) * dims.embed_dim
    count += sizes.num_heads * (config.weight_map == "sink_logit")
    for option in chosen:
        count += option.slot.parameter_count(option.config, option.heads, dims)
    return count


def _state_size(config: Config, dims: MixerDims, max_len: int) -> int:
    """Latents, positions, ids and counters."""
    return max_len * (sizes_of(config, dims).cached + 2) + 2


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """The expanded form; pairs as in `attention`."""
    sizes, layer = sizes_of(config, dims), layer_config(config, dims)
    attending = attention.SPEC.flops(layer, dims, seq_len)
    # Instead of attention's query, key and value maps.
    queries = sizes.num_heads * sizes.head_dim
    values = sizes.num_heads * sizes.value_dim
    maps = -dims.embed_dim * (2 * queries + values)
    maps += (sizes.q_rank or dims.embed_dim) * queries
    maps += dims.embed_dim * (sizes.cached + (sizes.q_rank or 0))
    maps += sizes.kv_rank * (sizes.num_heads * sizes.nope_dim + values)
    return attending + 2.0 * seq_len * maps


SPEC = MixerSpec(
    name="mla",
    title="Multi-head latent attention",
    family="softmax",
    paper="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts "
    "Language Model",
    source="arXiv 2405.04434",
    forms=("expanded", "absorbed"),
    capabilities=Capabilities(bidirectional=True, prefix=True, sequence=True),
    decode=Decode(exact=True),
    parameter_count=_parameter_count,
    state_size=_state_size,
    flops=_flops,
    limits=(
        "The full pass expands keys and values for every head: it saves memory while "
        "decoding, not while training.",
        "Options that change keys or values have no place: decoding keeps latents.",
        "The model's qk_norm is not used: the norms of the latents stand in for it.",
        "A window's latents stay in the decode state.",
        "While decoding, a prefix must lie within one step.",
    ),
    deviations=(
        "Rotary pairs are (i, i + dr / 2); DeepSeek's released weights pair "
        "neighbours, which is a permutation of the rows of two maps.",
        "Widths that are left out follow the head size in V2's proportions.",
    ),
)

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"q_rank": 10, "rope_dim": 0, "decode_form": "expanded", "window": 4, "sinks": 1},
    {
        "latent_norm": False,
        "positions": "rope",
        "rope": {"scaling": "yarn", "factor": 4.0, "original_len": 64},
        "decode_form": "absorbed",
        "value_head_dim": 6,
        "weight_map": "sink_logit",
        "soft_cap": 5.0,
        "output": ({"type": "gated_attention"},),
    },
)
