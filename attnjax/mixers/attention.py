"""Softmax attention in six slots: projections, positions, scores, weight map, mask,
output. Most mechanisms of the softmax side are a choice in one or two of them.

o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s, the keys s visible to t, per head.

Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, eq. 1 and
section 3.2.2. Shared key/value heads: Ainslie et al., arXiv 2305.13245. Soft-cap:
arXiv 2408.00118. Sink logits: gpt-oss, arXiv 2508.10925. Off-by-one softmax: Miller,
"Attention Is Off By One", 2023. QK-norm: Henry et al., arXiv 2010.04245.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Context, MixerOut
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError, unknown
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers.requests import check_request
from attnjax.mixers.slots import (
    across_devices,
    cache,
    explicit,
    fused_blends,
    options,
    probes,
    reach,
    sizes,
)
from attnjax.mixers.slots.base import Call, Heads


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one attention layer, slot by slot; none takes the model's value.

    Attributes:
        num_heads: H, query heads.
        num_kv_heads: K, key/value heads: H is multi-head, 1 multi-query attention.
        head_dim: D.
        value_head_dim: E (none: D).
        qkv_bias: biases of the query, key and value maps.
        out_bias: bias of the output map.
        cross: keys and values come from the memory instead of the sequence.
        positions: "rope", "alibi", "none", or "inherit": the model's rotary
            positions if it has them (cross-attention has none).
        rope: rotary settings of this layer (none: the model's).
        qk_norm: RMSNorm of each head's query and key.
        scale: factor on q.k (none: 1 / sqrt(D)).
        soft_cap: c in c tanh(score / c), or none.
        weight_map: "softmax"; "sink_logit": a learned logit a head joins each row's
            sum without a value; "off_by_one": the same with the constant logit 0.
        window: tokens that a query sees at and before its own (none: all).
        right_window: tokens after it where attention is not causal (none:
            window - 1).
        sinks: tokens at the start of the document that stay visible beyond the
            window.
        output: options of mechanisms in order, each {"type": NAME, option: value,
            ...}: gates, head mixing, norms.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    cross: bool = False
    positions: Literal["inherit", "rope", "alibi", "none"] = "inherit"
    rope: nn.Rope | None = None
    qk_norm: bool | None = None
    scale: float | None = None
    soft_cap: float | None = None
    weight_map: Literal["softmax", "sink_logit", "off_by_one"] = "softmax"
    window: int | None = None
    right_window: int | None = None
    sinks: int = 0
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        for name in ("num_heads", "num_kv_heads", "head_dim", "value_head_dim"):
            _at_least(name, getattr(self, name), 1)
        _at_least("window", self.window, 1)
        _at_least("right_window", self.right_window, 0)
        _at_least("sinks", self.sinks, 0)
        if self.window is None and (self.sinks or self.right_window is not None):
            raise ValueError(
                "sinks and right_window need a window; got window=none, "
                f"sinks={self.sinks}, right_window={self.right_window}. Set window."
            )
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(
                f"soft_cap must be positive; got {self.soft_cap}. Use none for no cap."
            )
        if self.rope is not None and self.positions in ("alibi", "none"):
            raise ValueError(
                f"rope goes with positions=rope or inherit; got {self.positions!r}. "
                "Remove rope."
            )
        if self.cross:
            self._check_cross()

    def _check_cross(self):
        if self.positions in ("rope", "alibi") or self.rope is not None:
            raise ValueError(
                "cross-attention has no common positions of queries and memory; got "
                f"positions={self.positions!r}. Use none or inherit."
            )
        if self.window is not None:
            raise ValueError(
                "cross-attention has no window over the memory; got "
                f"window={self.window}. Use window=none."
            )


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ValueError(f"{name} must be at least {low}; got {value}.")


def reference(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array
) -> jax.Array:
    """The definition, one line a step, for one layer's heads.

    Args:
        query: [B, T, H, D].
        key: [B, S, K, D], K divides H.
        value: [B, S, K, E].
        visible: bool, broadcastable to [B, H, T, S]; a row of False gives zeros.

    Returns:
        [B, T, H, E] in the dtype of `query`.
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(a, groups, axis=2) for a in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(scores, axis=-1, where=visible)
    weights = jnp.where(visible.any(-1, keepdims=True), weights, 0)
    return jnp.einsum("bhts,bshe->bthe", weights, value)


# Every layer has these probes beside those of its output options: x; query and key
# with their norm, before positions; value; scores and weights [B, H, T, S]; the heads
# [B, T, H, E] after the output options; y.
HOOKS = ("input", "query", "key", "value", "scores", "weights", "heads", "output")


class Mixer(nnx.Module):
    """One attention layer.

    Parameters: query [C, H D], key [C, K D], value [C, K E], out [H E, C], biases and
    the norms of query and key where asked for, `sink` [H] with sink_logit, and those
    of the output options under "slot_<type>".
    """

    # Learned tokens in front of a packed row are seen by all of its documents.
    shows_prefix = True

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        heads = sizes.heads_of(config, dims)
        chosen = options.resolve(config.output, heads)
        options.check_weight_maps(config.weight_map, chosen)
        after = options.heads_after(chosen, heads)
        if dims.kernel != "auto":
            _check_kernel(dims.kernel)
        self.dims, self.shape = dims, heads
        self.cross = config.cross
        self.rope = sizes.rope_of(config, dims)
        self.spec = _kernel_spec(config)
        self.reach = reach.Reach(
            config.window,
            config.right_window,
            config.sinks,
            config.positions == "alibi",
            dims.prefix_tokens,
        )
        self._make_maps(config, after, rngs)
        self.slot_names = tuple(option.name for option in chosen)
        for option in chosen:
            slot = option.slot(option.config, option.heads, dims, rngs=rngs)
            setattr(self, option.name, slot)

    def _make_maps(self, config: Config, after: Heads, rngs: nnx.Rngs) -> None:
        dims, heads = self.dims, self.shape
        stored = dtype_of(dims.param_dtype)
        make = partial(
            nn.Linear, dtype=dtype_of(dims.dtype), param_dtype=stored, rngs=rngs
        )
        into = partial(
            make,
            dims.embed_dim,
            use_bias=sizes.own(config.qkv_bias, dims.use_bias),
            std=dims.init_std,
        )
        self.query = into(heads.num_heads * heads.head_dim)
        self.key = into(heads.num_kv_heads * heads.head_dim)
        self.value = into(heads.num_kv_heads * heads.value_dim)
        self.out = make(
            after.num_heads * after.value_dim,
            dims.embed_dim,
            use_bias=sizes.own(config.out_bias, dims.use_bias),
            std=dims.out_init_std,
        )
        has_norm = sizes.own(config.qk_norm, dims.qk_norm)
        norm = partial(
            nn.RMSNorm,
            heads.head_dim,
            eps=dims.norm_eps,
            zero_centered=dims.zero_centered_norm,
            param_dtype=stored,
            rngs=rngs,
        )
        self.query_norm = norm() if has_norm else None
        self.key_norm = norm() if has_norm else None
        zeros = jax.nn.initializers.zeros
        self.sink = (
            nn.param(rngs, (heads.num_heads,), zeros, dtype=stored)
            if config.weight_map == "sink_logit"
            else None
        )

    # ---- the full pass

    def __call__(
        self, x: jax.Array, ctx: Context, *, norm=None
    ) -> tuple[jax.Array, MixerOut]:
        """[B, T, C] -> [B, T, C] in the compute dtype.

        Args:
            x: the normed input, or with `norm` that before it.
            ctx: the surroundings.
            norm: x -> x, for layers of `takes_norm`.
        """
        self.check(ctx, is_step=False)
        call = Call(ctx, reads=self._reads(ctx))
        for slot in self.slots():
            x = slot.enter(x, call)
        x = call.probe("input", x if norm is None else norm(x))
        query = self.make_query(x, call)
        if self.cross:
            key, value = self.make_key_value(self._memory(ctx.memory), call)
            mask, operands = reach.over_memory(
                ctx.segment_ids, ctx.memory_segment_ids, key.shape[:2]
            )
        else:
            key, value = self.make_key_value(x, call)
            query, key = (
                self.rotate(query, ctx.positions),
                self.rotate(key, ctx.positions),
            )
            mask, operands = reach.full_pass(ctx, self.reach)
        heads = self.attend(x, (query, key, value), mask, operands, call)
        y = self.finish(x, heads, call)
        y = nn.dropout(y, self.dims.dropout, prng_key=ctx.prng_key, train=ctx.train)
        return y, call.out()

    def check(self, ctx: Context, *, is_step: bool) -> None:
        """Refuse requests and hooks that this layer does not serve."""
        known = self.known_hooks()
        probes.check_hooks(ctx, known, owner=SPEC.name, is_step=is_step)
        check_request(SPEC, ctx, step=is_step, mask=not self.cross, hooks=known)
        if ctx.sequence_form is not None:
            self._check_sequence()

    def _check_sequence(self) -> None:
        """Refuse shared tokens where they meet outside of the kernel."""
        reasons = [f"the output option {slot!r}" for slot in self._unshared()]
        if self.cross:
            reasons.append("cross=true")
        if reasons:
            raise UserError(
                f"attention: {reasons[0]} needs whole rows on each device; got "
                "config.mesh.sequence > 1. Choose another, or set it to 1."
            )

    def _unshared(self) -> list[str]:
        return [_mechanism(slot) for slot in self.slots() if not slot.sequence]

    def known_hooks(self) -> tuple[str, ...]:
        """Every `Hook.what` of this layer."""
        return HOOKS + tuple(hook for slot in self.slots() for hook in slot.hooks)

    def _memory(self, memory: jax.Array | None) -> jax.Array:
        if memory is None:
            raise UserError(
                "attention: cross=true needs a memory; got memory=None. Give the model "
                "one, or set cross=false."
            )
        return memory

    @property
    def takes_norm(self) -> bool:
        """Whether the layer reads its input before the block's norm."""
        return any(slot.enters for slot in self.slots())

    def _reads(self, ctx: Context) -> tuple[str, ...]:
        """The hooks that output options read in this call."""
        found: dict[str, None] = {}
        for slot in self.slots():
            for what in slot.reads(ctx):
                if what not in self.known_hooks():
                    raise UserError(
                        f"attention: an option of output reads the layer's {what}; got "
                        f"type={_mechanism(slot)!r} in a mixer without them. Leave it "
                        "out of this layer."
                    )
                found[what] = None
        return tuple(found)

    def gives_shares(self) -> bool:
        """Whether the hook "weights" has rows that are divided by their sum, or by
        more."""
        return all(slot.gives_shares for slot in self.slots())

    def slots(self) -> list:
        """The output options, in order."""
        return [getattr(self, name) for name in self.slot_names]

    def make_query(self, x: jax.Array, call: Call) -> jax.Array:
        """[B, T, C] -> [B, T, H, D], normed, without positions."""
        query = self.query(x).reshape(*x.shape[:2], -1, self.shape.head_dim)
        for slot in self.slots():
            query = slot.query(x, query, call)
        query = query if self.query_norm is None else self.query_norm(query)
        return call.probe("query", query, head_axis=2)

    def make_key_value(self, x: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
        """[B, S, C] -> [B, S, K, D], normed, without positions, and [B, S, K, E]."""
        key = self.key(x).reshape(*x.shape[:2], -1, self.shape.head_dim)
        value = self.value(x).reshape(*x.shape[:2], -1, self.shape.value_dim)
        for slot in self.slots():
            key, value = slot.key(x, key, call), slot.value(x, value, call)
        key = key if self.key_norm is None else self.key_norm(key)
        key = call.probe("key", key, head_axis=2)
        return key, call.probe("value", value, head_axis=2)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary positions on [B, T, H, D] where the layer has them."""
        return x if self.rope is None else nn.apply_rope(x, positions, self.rope)

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """Scores, weight map and mask on (query, key, value).

        Args:
            x: the layer's input, which output options may read.
            qkv: [B, T, H, D], [B, S, K, D], [B, S, K, E].
            mask, operands: which keys are seen.
            spec: the rest of the computation; None is the layer's own.

        Returns:
            [B, T, H, E], and the log-sums where `spec` asks for them.
        """
        spec = dataclasses.replace(spec or self.spec, mask=mask)
        operands = operands | self._constants(spec)
        for slot in self.slots():
            spec, operands = slot.attend(x, spec, operands, call)
        hooks = [h for h in call.ctx.hooks if h.what in ("scores", "weights")]
        if hooks and not fused_blends.fits(hooks, spec):
            return explicit.attention(*qkv, spec, operands, call)
        run = partial(
            across_devices.attention,
            rows=call.ctx.rows,
            implementation=self.dims.kernel,
            target=self.dims.target,
            form=call.ctx.sequence_form,
        )
        try:
            return fused_blends.attention(hooks, run, qkv, spec, operands, call.ctx)
        except NotImplementedError as error:
            kernel = self.dims.kernel
            raise UserError(f"config.model.kernel={kernel}: {error}") from error

    def _constants(self, spec: kernels.AttentionSpec) -> dict[str, jax.Array]:
        """The arrays of the layer itself that `spec` needs."""
        needed = {operand.name for operand in spec.operands}
        found = {}
        if "sink" in needed:
            found["sink"] = self.sink[...]
        if "alibi_slopes" in needed:
            found["alibi_slopes"] = jnp.asarray(nn.alibi_slopes(self.shape.num_heads))
        return found

    def finish(self, x: jax.Array, heads: jax.Array, call: Call) -> jax.Array:
        """The output slot: [B, T, H, E] -> [B, T, C]."""
        for slot in self.slots():
            heads = slot.heads(x, heads, call)
        heads = call.probe("heads", heads, head_axis=2)
        y = self.out(heads.reshape(*heads.shape[:2], -1))
        for slot in self.slots():
            y = slot.output(x, y, call)
        return call.probe("output", y)

    # ---- decoding

    def init_state(self, batch: int, max_len: int, memory=None):
        """The state before the first token: a cache of max_len places, or the keys
        and values of `memory` [B, S, C]."""
        if not self.cross:
            return cache.empty(batch, max_len, self.shape, dtype_of(self.dims.dtype))
        memory = self._memory(memory)
        call = Call(Context(positions=jnp.zeros(memory.shape[:2], jnp.int32)))
        return cache.Memory(*self.make_key_value(memory, call))

    def step(self, x: jax.Array, state, ctx: Context):
        """The next T >= 1 tokens [B, T, C] -> y [B, T, C] and the new state.

        A prefix (`ctx.prefix_len`) must lie within one step: tokens that come later
        are not there to be seen.
        """
        self.check(ctx, is_step=True)
        call = Call(ctx, is_step=True)
        x = call.probe("input", x)
        query = self.make_query(x, call)
        if self.cross:
            qkv = (query, state.key, state.value)
            mask, operands = reach.over_memory(
                ctx.segment_ids, ctx.memory_segment_ids, state.key.shape[:2]
            )
        else:
            key, value = self.make_key_value(x, call)
            query, key = (
                self.rotate(query, ctx.positions),
                self.rotate(key, ctx.positions),
            )
            qkv, mask, operands, state = self._extend((query, key, value), state, ctx)
        heads = self.attend(x, qkv, mask, operands, call)
        return self.finish(x, heads, call), state

    def _extend(self, qkv, state: cache.Cache, ctx: Context):
        """Append to the cache; what the new queries attend to, and how."""
        query, key, value = qkv
        ids = cache.document_ids(ctx.segment_ids, state.segment, query.shape[1])
        first = state.length
        state = cache.append(state, key, value, ids, ctx.positions)
        operands = {
            "q_segment_ids": ids,
            "k_segment_ids": reach.key_ids(state.segments, self.reach),
        }
        if ctx.prefix_len is not None:
            operands["prefix_len"] = ctx.prefix_len
        if reach.reads_positions(ctx, self.reach, is_step=True):
            operands["q_positions"] = ctx.positions
            operands["k_positions"] = state.positions
        else:
            operands["q_offset"] = first
        mask = reach.mask(ctx, self.reach, segments=True)
        return (query, state.key, state.value), mask, operands, state


def _mechanism(slot) -> str:
    """The catalog name of an output option."""
    return type(slot).__module__.rsplit(".", 1)[-1]


def _check_kernel(name: str) -> None:
    known = ["auto", *(module.NAME for module in kernels.IMPLEMENTATIONS)]
    if name not in known:
        raise unknown("config.model.kernel", "implementation", name, known)


def _kernel_spec(config: Config) -> kernels.AttentionSpec:
    """Scores and weight map of a layer; the mask comes with each call."""
    score = []
    if config.soft_cap is not None:
        score.append(kernels.SoftCap(config.soft_cap))
    if config.positions == "alibi":
        score.append(kernels.ALiBi())
    sink = {"softmax": None, "sink_logit": "logit"}.get(
        config.weight_map, config.weight_map
    )
    return kernels.AttentionSpec(
        scale=config.scale, score=tuple(score), weight_map=kernels.Softmax(sink=sink)
    )


SPEC = MixerSpec(
    name="attention",
    title="Softmax attention",
    family="softmax",
    paper="Attention Is All You Need",
    source="arXiv 1706.03762",
    forms=("parallel", "step"),
    capabilities=Capabilities(
        bidirectional=True, cross=True, prefix=True, sequence=True
    ),
    decode=Decode(exact=True),
    parameter_count=sizes.parameter_count,
    state_size=sizes.state_size,
    flops=sizes.flops,
    limits=(
        "Time grows with the square of the sequence, the decode state with its length.",
        "A window's keys stay in the decode state; streaming_llm forgets them.",
        "While decoding, a prefix must lie within one step.",
        "Tokens of one document must stand in order in a packed row. In the full pass "
        "windows and ALiBi count places of the row: padding inside a document, which "
        "no packer makes, counts as tokens there.",
    ),
    deviations=(
        "Key/value heads may be shared by groups of query heads.",
        "No dropout on the weights.",
    ),
)

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"num_kv_heads": 1, "value_head_dim": 6, "weight_map": "sink_logit"},
    {"window": 3, "sinks": 2, "soft_cap": 5.0},
    {"positions": "alibi", "qk_norm": True, "weight_map": "off_by_one"},
    {"output": ({"type": "gated_attention"},)},
)
