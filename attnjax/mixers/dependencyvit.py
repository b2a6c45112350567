"""Reversed attention: tokens send messages to parents instead of gathering them.

Each token i, a child, spreads one unit over all tokens j, its possible parents, by an
ordinary softmax; then the map is turned over, so that parents receive:

    F[h, i, j] = softmax over j of q_i.k_j / sqrt(D)
    p[i, h]    = softmax over h of (x_i W_p) / tau          the head it speaks through
    m_i        = m_i of the layer before * sigmoid(MLP(x_i))    how much it says
    R[h, j, i] = F[h, i, j] p[i, h] m_i,    y_j = sum_i R[h, j, i] v_i of each head

m is 1 in front of the first layer and a running product: a token once silenced stays
so. The parent of i is the j with the largest sum_h R[h, j, i]: a dependency tree.

Source: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from
Reversed Attention", arXiv 2304.03282 (the authors released no code).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Carried, Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.geometric_attention import Evidence
from attnjax.mixers.requests import check_request
from attnjax.mixers.slots import blending, options, sizes
from attnjax.mixers.slots.base import Call

# What layers hand on: m, and for each token that is left (all tokens / those left).
MESSAGE, KEPT = "dependencyvit_message", "dependencyvit_kept"
# Shares below it count as this much where their logarithm is taken.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer; none takes the model's value.

    Attributes:
        selector: whether a token divides its message between the heads (p; else 1).
        temperature: tau of the selector.
        selector_bias: bias of W_p.
        controller: whether a token says how much it sends (m; else 1).
        controller_bias: biases of the controller's MLP.
        features: where m, of the last layer, weighs what a model pools: "normed"
            behind the final norm, "residual" in front of it, "none"; "auto" is normed
            in models that make one vector of all tokens, none in others.
        prune: layers, from 0, behind whose mixer the tokens that say least are left
            out for good: they neither send nor receive (none of them: ()).
        prune_rate: share of all tokens that is left out each time.
        prune_by: "sent": what a token sends, m; "received": what it gets, the sum of
            R over heads and senders.
        num_heads, num_kv_heads, head_dim, value_head_dim: as in `attention`.
        positions: "rope", "none", or "inherit": the model's rotary positions if it
            has them.
        rope, qk_norm, scale: as in `attention`.
        output: options of other mechanisms as in `attention`, none of which may
            change the scores or their weights.
    """

    selector: bool = True
    temperature: float = 0.1
    selector_bias: bool = False
    controller: bool = True
    controller_bias: bool = False
    features: Literal["auto", "normed", "residual", "none"] = "auto"
    prune: tuple[int, ...] = ()
    prune_rate: float = 0.16
    prune_by: Literal["sent", "received"] = "sent"
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    rope: nn.Rope | None = None
    qk_norm: bool | None = None
    scale: float | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}.")
        told = (
            ("selector", self.selector, ("temperature", "selector_bias")),
            ("controller", self.controller, ("controller_bias",)),
            ("prune", bool(self.prune), ("prune_rate", "prune_by")),
        )
        for owner, is_on, names in told:
            _check_unused(self, owner, is_on, names)
        if not (self.controller or self.prune) and self.features != "auto":
            raise ValueError(
                "features are weighed by the controller's m; got controller=false, "
                f"features={self.features}. Leave it at auto."
            )
        if self.prune:
            self._check_prune()
        layer_config(self)

    def _check_prune(self):
        if list(self.prune) != sorted(set(self.prune)) or self.prune[0] < 0:
            raise ValueError(
                f"prune must be rising numbers of layers, from 0; got {self.prune}."
            )
        if not (self.prune_rate > 0 and self.prune_rate * len(self.prune) < 1):
            raise ValueError(
                "prune_rate must be positive and leave tokens after every pruning; got "
                f"prune_rate={self.prune_rate}, {len(self.prune)} prunings."
            )
        if self.prune_by == "sent" and not self.controller:
            raise ValueError(
                "prune_by=sent goes by the controller's m; got controller=false. Use "
                "prune_by=received."
            )


def _check_unused(config: Config, owner: str, is_on: bool, names) -> None:
    """Raise ValueError where an option of a part that is off is set."""
    for name in names:
        value = getattr(config, name)
        if not is_on and value != getattr(Config, name):
            raise ValueError(
                f"{name} belongs to {owner}, which is off; got {name}={value}. Leave "
                "it at its default."
            )


def layer_config(config: Config) -> attention.Config:
    """The layer of attention whose maps are turned over."""
    same = {field.name for field in dataclasses.fields(attention.Config)}
    fields = dataclasses.fields(config)
    return attention.Config(
        **{f.name: getattr(config, f.name) for f in fields if f.name in same}
    )


def reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selector: jax.Array,
    message: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The definition, one line a step, for one layer's heads and whole rows.

    Args:
        query, key: [B, T, H, D].
        value: [B, T, H, E].
        selector: p, [B, T, H].
        message: m, [B, T].

    Returns:
        y [B, T, H, E], and R [B, H, T, T], parents in rows and children in columns.
    """
    scores = jnp.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
    forward = jax.nn.softmax(scores, axis=-1)
    sent = jnp.swapaxes(selector, 1, 2) * message[:, None]
    reversed_ = jnp.swapaxes(forward * sent[..., None], -1, -2)
    return jnp.einsum("bhji,bihe->bjhe", reversed_, value), reversed_


# ---- pruning


def counts(config: Config, tokens: int, num_layers: int) -> np.ndarray:
    """How many of `tokens` are left behind each layer, int32 [num_layers].

    Raises:
        UserError: where that is none, or a layer to prune is not there.
    """
    if config.prune and config.prune[-1] >= num_layers:
        raise UserError(
            f"dependencyvit: prune must name layers from 0 to {num_layers - 1}; got "
            f"{config.prune}."
        )
    done = np.searchsorted(config.prune, np.arange(num_layers), side="right")
    left = np.floor(tokens * (1 - config.prune_rate * done) + 0.5).astype(np.int32)
    if left[-1] < 1:
        raise UserError(
            f"dependencyvit: prune leaves none of {tokens} tokens; got prune="
            f"{config.prune}, prune_rate={config.prune_rate}. Lower one of them."
        )
    return left


def strongest(score: jax.Array, kept: jax.Array, count: jax.Array) -> jax.Array:
    """Bool [B, N]: the `count` tokens of `kept` with the highest scores [B, N]; of
    equal ones the first. `count` may be traced."""
    score = jax.lax.stop_gradient(jnp.where(kept, score, -jnp.inf))
    order = jnp.argsort(-score, axis=-1, stable=True)
    return kept & (jnp.argsort(order, axis=-1) < count)


# ---- the layer


class Controller(nnx.Module):
    """sigmoid(MLP(x)), C -> C // 2 -> 1, in float32 or wider.

    Parameters: inner [C, C // 2], outer [C // 2, 1], and biases where asked for.
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        width = _controller_width(dims)
        more = dict(use_bias=config.controller_bias, std=dims.init_std)
        stored = _stored(dims)
        self.inner = nn.Linear(dims.embed_dim, width, **more, **stored, rngs=rngs)
        self.outer = nn.Linear(width, 1, **more, **stored, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, T]."""
        gelu, _ = nn.ACTIVATIONS["gelu"]
        return jax.nn.sigmoid(self.outer(gelu(self.inner(x)))[..., 0])


class Mixer(attention.Mixer):
    """One layer.

    Parameters: those of `attention`, `selector` [C, H] and `controller`, each where
    the config has it.
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        super().__init__(layer_config(config), dims, rngs=rngs)
        options.refuse_changes(
            self.slots(),
            ("attend",),
            self.shape,
            dims,
            owner=SPEC.name,
            why="the map is turned over",
        )
        self.config, self.entry = config, SPEC.of(config)
        counts(config, dims.max_len, dims.num_layers)
        self.selector = (
            nn.Linear(
                dims.embed_dim,
                self.shape.num_heads,
                use_bias=config.selector_bias,
                std=dims.init_std,
                **_stored(dims),
                rngs=rngs,
            )
            if config.selector
            else None
        )
        self.controller = (
            Controller(config, dims, rngs=rngs) if config.controller else None
        )

    def check(self, ctx: Context, *, is_step: bool) -> None:
        """Refuse what this layer does not do."""
        check_request(self.entry, ctx, step=is_step, hooks=self.known_hooks())
        super().check(ctx, is_step=is_step)
        for hook in ctx.hooks:
            if hook.action in blending.ACTIONS:
                raise UserError(
                    f"dependencyvit: {hook.action} moves shares of what a token sees, "
                    "which a parent's weights are not; got hook "
                    f"{hook.name!r}. Leave out its layers."
                )
        if ctx.segment_ids is not None and self.dims.prefix_tokens:
            raise UserError(
                "dependencyvit: documents have no tokens in front in common; got "
                f"segment_ids with prefix_tokens={self.dims.prefix_tokens}. Leave one "
                "of them out."
            )
        missing = sorted(set(carried(self.config, self.dims)) - set(ctx.carried))
        if missing:
            raise UserError(
                f"dependencyvit: reads what layers hand on, {', '.join(missing)}; got "
                f"ctx.carried={sorted(ctx.carried)}. A model with this layer makes it."
            )

    def known_hooks(self) -> tuple[str, ...]:
        """Those of `attention` but scores, which are taken twice; "weights" are R.
        Further p [B, T, H], m [B, T], and which tokens are left, bool [B, T]."""
        known = tuple(name for name in super().known_hooks() if name != "scores")
        parts = {
            "selector": self.config.selector,
            "message": self.config.controller,
            "kept": bool(self.config.prune),
        }
        return known + tuple(name for name, is_on in parts.items() if is_on)

    def gives_shares(self) -> bool:
        """Columns of R have a sum, rows do not."""
        return False

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """Two passes: log-sums of what each child sends, then parents as queries that
        look at children, with a bias for each child.

        Args and result: as in `attention`.
        """
        del spec
        query, key, value = qkv
        share = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(a, share, axis=2) for a in (key, value))
        if self.config.prune:
            alive = (call.ctx.carried[KEPT] > 0).astype(jnp.int32)
            mask = kernels.Segments()
            operands = {"q_segment_ids": alive, "k_segment_ids": alive}
        turned, message = _transposed(operands), self._message(x, call)
        sent = self._log_sent(x, message, call)
        sent = sent - self._log_sums(query, key, mask, operands, call.ctx)
        spec = dataclasses.replace(
            self.spec, score=(kernels.Bias(),), weight_map=Evidence()
        )
        turned["bias"] = jnp.swapaxes(sent, 1, 2)[:, :, None]
        by_received = bool(self.config.prune) and self.config.prune_by == "received"
        if by_received:
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
        qkv = (key, query, value)
        heads = super().attend(x, qkv, mask, turned, call, spec=spec)
        score = message
        if by_received:
            heads, score = heads[..., :-1], jnp.sum(heads[..., -1], -1)
        if self.config.prune:
            self._prune(score, call)
        return heads

    def _message(self, x: jax.Array, call: Call) -> jax.Array | None:
        """m [B, T], handed on; None without a controller."""
        if self.controller is None:
            return None
        before = call.ctx.carried[MESSAGE]
        now = (before * self.controller(x)).astype(before.dtype)
        call.carried[MESSAGE] = now = call.probe("message", now)
        return now

    def _log_sent(self, x: jax.Array, message: jax.Array | None, call: Call):
        """log(p m), broadcastable to [B, T, H]."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        found = jnp.zeros((*x.shape[:2], 1), wide)
        if self.selector is not None:
            p = jax.nn.softmax(self.selector(x) / self.config.temperature)
            found = found + _log(call.probe("selector", p, head_axis=2))
        return found if message is None else found + _log(message)[..., None]

    def _log_sums(self, query, key, mask, operands: dict, ctx: Context) -> jax.Array:
        """log sum_j exp(s_ij), [B, T, H]; 0 where a child sees no parent."""
        spec = dataclasses.replace(self.spec, return_lse=True)
        qkv = (query, key, jnp.zeros((*key.shape[:3], 1), key.dtype))
        unseen = Call(ctx.replace(hooks=()))
        _, sums = super().attend(None, qkv, mask, operands, unseen, spec=spec)
        return jnp.where(sums > -jnp.inf, sums, 0)

    def _prune(self, score: jax.Array, call: Call) -> None:
        """Hand on which tokens are left behind this layer; those in front of the grid
        always are."""
        ctx = call.ctx
        first = ctx.extra_tokens
        before = ctx.carried[KEPT]
        total = before.shape[1] - first
        left = counts(self.config, total, self.dims.num_layers)
        left = jnp.asarray(left)[ctx.layer_index]
        chosen = strongest(score[:, first:], before[:, first:] > 0, left)
        factor = (total / left).astype(before.dtype)
        places = jnp.where(chosen, factor, 0)
        call.carried[KEPT] = jnp.concatenate([before[:, :first], places], axis=1)
        call.record("kept", call.carried[KEPT] > 0)

    def init_state(self, batch: int, max_len: int, memory=None):
        """Refused: senders spread their unit over tokens to come."""
        del batch, max_len, memory
        raise UserError(
            "dependencyvit: has no decode form: a token divides its message among all "
            "parents, those to come too. Choose another mixer for this layer."
        )


def _transposed(operands: dict) -> dict:
    """Operands of the mask for parents that look at children."""
    names = {"q_segment_ids": "k_segment_ids", "k_segment_ids": "q_segment_ids"}
    return {names[name]: array for name, array in operands.items()}


def _log(share: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(share, TINY))


def _stored(dims: MixerDims) -> dict:
    """dtypes of the selector and the controller."""
    wide = jnp.promote_types(dtype_of(dims.dtype), jnp.float32)
    return {"dtype": wide, "param_dtype": dtype_of(dims.param_dtype)}


def carried(config: Config, dims: MixerDims) -> dict[str, Carried]:
    """What layers hand on."""
    del dims
    one = Carried(start=1.0, weighs=config.features)
    is_on = {MESSAGE: config.controller, KEPT: bool(config.prune)}
    return {name: one for name, on in is_on.items() if on}


def _controller_width(dims: MixerDims) -> int:
    return max(1, dims.embed_dim // 2)


def _parameter_count(config: Config, dims: MixerDims) -> int:
    layer = layer_config(config)
    heads, width = sizes.heads_of(layer, dims).num_heads, _controller_width(dims)
    count = sizes.parameter_count(layer, dims)
    if config.selector:
        count += (dims.embed_dim + config.selector_bias) * heads
    if config.controller:
        count += (dims.embed_dim + 1) * width
        count += (width + 1) * config.controller_bias
    return count


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """The scores are taken twice; pruned tokens are computed too."""
    layer = layer_config(config)
    heads, width = sizes.heads_of(layer, dims), _controller_width(dims)
    total = sizes.flops(layer, dims, seq_len)
    total += 2.0 * seq_len**2 * heads.num_heads * (heads.head_dim + 1)
    if config.selector:
        total += 2.0 * seq_len * dims.embed_dim * heads.num_heads
    if config.controller:
        total += 2.0 * seq_len * (dims.embed_dim + 1) * width
    return total


def _lacks(config: Config) -> dict[str, str]:
    if not config.prune:
        return {}
    return {"segments": f"prune={config.prune}, which counts the tokens of a row"}


SPEC = MixerSpec(
    name="dependencyvit",
    title="Reversed attention",
    family="softmax",
    paper="Visual Dependency Transformers: Dependency Tree Emerges from Reversed "
    "Attention",
    source="arXiv 2304.03282",
    forms=("two_pass",),
    capabilities=Capabilities(causal=False, bidirectional=True, decode=False),
    decode=Decode(exact=False, reason="senders spread over tokens to come"),
    parameter_count=_parameter_count,
    state_size=lambda config, dims, max_len: 0,
    flops=_flops,
    lacks=_lacks,
    limits=(
        "No causal form: a child would divide its unit among parents to come.",
        "Fused kernels take both passes, scores twice: the log-sum of each child's "
        "row, then parents as queries with weights exp(s + bias) and the bias log(p m) "
        "- log-sum of each child; no array is T x T.",
        "Rows of a parent are not normalised.",
        "prune masks: tokens that are left out are still computed, so it saves no "
        "time. Other kinds of layers still read them, and pool=attentive sees them as "
        "zeros; pool=mean is the mean of those left. Tokens in front of the grid stay.",
        "prune needs rows without documents or padding.",
        "m starts near 1/2 to the power of the depth, and weighs features so.",
        "Not in pyramids, whose stages merge tokens, nor with extra residual streams.",
    ),
    deviations=(
        "No dropout on the weights, which the paper's re-implementation has in front "
        "of the transposition.",
        "LayerScale is config.model.layer_scale.",
        "Tokens left after t prunings are tokens * (1 - rate t), rounded; layers to "
        "prune are counted from 0 (2, 5, 8, 11 of 12 in the paper).",
        "With a class token or registers these send and receive like patches; the "
        "paper has none and pools the mean.",
    ),
)

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {
        "prune": (0,),
        "prune_rate": 0.3,
        "prune_by": "received",
        "selector_bias": True,
        "controller_bias": True,
        "num_kv_heads": 2,
        "value_head_dim": 6,
        "qk_norm": True,
        "positions": "none",
        "scale": 0.7,
        "output": ({"type": "gated_attention"},),
    },
)
