"""Sparsifiner: a small predictor says for each image which keys a query attends to.

A layer of N tokens, shared by its heads: W_cq, W_ck [D, D/c] with biases, P and R
[N, n]. For every query of a patch and all keys,

    coef = softmax over n of (q W_cq) ((k W_ck)^T P) / sqrt(H)        [N', n]
    A~ = coef R^T                                                     [N', N]

phase="reconstruct": attention stays dense, and A~ is drawn to it by a loss, the sum of
the squares of A~ - A. phase="masked": the largest 8 of coef and the entries of |R|
above 0.02 alone make A~ (a product of two sparse matrices), the ceil(0.25 N) largest
entries of each of its rows are the keys that the query attends to, and nothing of this
has a gradient. A class token attends to all keys.

Source: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for
Efficient Vision Transformers", arXiv 2303.13755, CVPR 2023; rules, scales and defaults
as in the authors' code.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from attnjax import kernels, nn
from attnjax.core.context import Context
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import ON_GRID, SEES_BOTH_WAYS, MixerDims, MixerSpec, no_state
from attnjax.mixers import attention
from attnjax.mixers.slots import options, sizes, windowed
from attnjax.mixers.slots import windows as cuts
from attnjax.mixers.slots.base import Call

KEEP = 0.25
# Standard deviation of P and R at the start, as the threshold of R is measured by.
BASIS_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one layer.

    Attributes:
        phase: "masked": a query attends to the predicted keys, and the predictor does
            not learn; "reconstruct": attention is dense, and the predictor learns it.
        keep: share of the keys that a query attends to, the number rounded up (none:
            a quarter, unless there is a threshold).
        threshold: in place of a share: keys whose estimate is above it. A query
            without any gives 0.
        rank: n, vectors of the basis (none: a sixth of the tokens, rounded down).
        reduce: c, by which queries and keys are narrowed, D // c.
        shared_basis: R is P.
        coefficients: the largest of the n coefficients that are kept in the masked
            phase; all where there are fewer.
        basis_threshold: entries of |R| up to it are 0 in the masked phase.
        predictor_scale: factor on the predictor's products: "heads", 1 / sqrt(H), as
            in the authors' code; "width", 1 / sqrt(D // c).
        loss_weight: of the squares of A~ - A in the training loss, their mean over the
            layers that report them.
        loss_over: "batch": the sum over images, heads, queries and keys, which grows
            with the (micro-)batch; "image": that sum's mean over the images.
        num_kv_heads: K (none: the model's).
        value_head_dim: E (none: D).
        positions: "inherit": the model's rotary positions if it has them; "rope";
            "none". The predictor reads queries and keys with them.
        qk_norm: RMSNorm of each head's query and key (none: the model's).
        scale: factor on q.k (none: 1 / sqrt(D)).
        output: options of mechanisms in order, as in `attention`; none that changes
            scores, weight map or mask.
    """

    phase: Literal["masked", "reconstruct"] = "masked"
    keep: float | None = None
    threshold: float | None = None
    rank: int | None = None
    reduce: int = 2
    shared_basis: bool = False
    coefficients: int = 8
    basis_threshold: float = 0.02
    predictor_scale: Literal["heads", "width"] = "heads"
    loss_weight: float = 0.01
    loss_over: Literal["batch", "image"] = "batch"
    num_kv_heads: int | None = None
    value_head_dim: int | None = None
    positions: Literal["inherit", "rope", "none"] = "inherit"
    qk_norm: bool | None = None
    scale: float | None = None
    output: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        if self.keep is not None and self.threshold is not None:
            raise ValueError(
                "keep and threshold are two rules for the same keys; got keep="
                f"{self.keep}, threshold={self.threshold}. Set one of them to none."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1]; got {self.keep}.")
        for name in ("rank", "reduce", "coefficients"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        for name in ("basis_threshold", "loss_weight"):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"{name} must be at least 0; got {value}.")


def tokens_of(dims: MixerDims) -> int:
    """N, the tokens that a layer is made for: those of the grid and before it. Where
    there is no grid, and a layer is counted but not built, the longest sequence."""
    if dims.grid is None:
        return dims.max_len
    return dims.prefix_tokens + math.prod(dims.grid)


def rank_of(config: Config, tokens: int) -> int:
    """n, at least 1."""
    return max(1, tokens // 6) if config.rank is None else config.rank


def budget(config: Config, tokens: int) -> int | None:
    """Keys of a query, ceil(keep N); None with a threshold."""
    if config.threshold is not None:
        return None
    return math.ceil((KEEP if config.keep is None else config.keep) * tokens)


class Weights(NamedTuple):
    """Arrays of a predictor, as `reference` reads them.

    Attributes:
        query, query_bias: W_cq, [D, D/c] and [D/c].
        key, key_bias: W_ck, of the same shapes.
        down: P, [N, n].
        up: R, [N, n].
    """

    query: jax.Array
    query_bias: jax.Array
    key: jax.Array
    key_bias: jax.Array
    down: jax.Array
    up: jax.Array


def reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weights: Weights,
    *,
    kept: int,
    coefficients: int = 8,
    basis_threshold: float = 0.02,
    extra: int = 1,
) -> jax.Array:
    """The masked phase for one layer's heads, one line a step.

    Args:
        query, key, value: [B, N, H, D].
        weights: of the predictor.
        kept: keys of a query.
        coefficients, basis_threshold: as in `Config`.
        extra: tokens in front (a class token) that attend to all keys.

    Returns:
        [B, N, H, D].
    """
    narrow_query = query[:, extra:] @ weights.query + weights.query_bias
    narrow_key = key @ weights.key + weights.key_bias
    few_keys = jnp.einsum("bshc,sn->bnhc", narrow_key, weights.down)
    cheap = jnp.einsum("bthc,bnhc->bhtn", narrow_query, few_keys)
    coef = jax.nn.softmax(cheap / query.shape[2] ** 0.5, axis=-1)
    coef = jnp.where(_place_by_size(coef) < coefficients, coef, 0)
    basis = jnp.where(jnp.abs(weights.up) > basis_threshold, jnp.abs(weights.up), 0)
    approx = jnp.einsum("bhtn,sn->bhts", coef, basis)
    mask = _place_by_size(approx) < kept
    mask = jnp.pad(mask, ((0, 0), (0, 0), (extra, 0), (0, 0)), constant_values=True)
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    found = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", found, value)


def _place_by_size(values: jax.Array) -> jax.Array:
    """0 for the largest of the last axis, 1 for the next; of equal ones the first."""
    return jnp.argsort(jnp.argsort(-values, axis=-1, stable=True), axis=-1)


def largest(values: jax.Array, count: int) -> jax.Array:
    """True at the `count` largest of the last axis; of equal ones the first are taken.

    Args:
        values: [..., N].
        count: exactly so many are true in every row; all where there are fewer.

    Returns:
        bool [..., N].
    """
    count = min(count, values.shape[-1])
    least = jax.lax.top_k(values, count)[0][..., -1:]
    above, level = values > least, values == least
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (level & (jnp.cumsum(level, axis=-1) <= room))


def kept_entry(b, h, q, k, kept) -> jax.Array:
    """The rule of a mask that is written out, for `kernels.MaskFn`; some kernels hold
    it in numbers."""
    del b, h, q, k
    return kept > 0


class Predictor(nnx.Module):
    """The estimate A~ of one layer's attention.

    Parameters: those of `Weights`, up unless the basis is shared.
    """

    def __init__(self, config: Config, dims: MixerDims, head_dim, *, rngs: nnx.Rngs):
        self.config = config
        tokens, width = tokens_of(dims), head_dim // config.reduce
        if not width:
            raise UserError(
                "sparsifiner: reduce must be at most head_dim; got reduce="
                f"{config.reduce}, head_dim={head_dim}. Lower it."
            )
        # Keys are chosen in float32: a rounded estimate would choose others.
        self.wide = jnp.promote_types(dtype_of(dims.dtype), jnp.float32)
        make = partial(nn.param, rngs, dtype=dtype_of(dims.param_dtype))
        # Names that weight decay passes by, which would shrink what has no gradient.
        normal, zeros = initializers.normal(dims.init_std), initializers.zeros
        self.query = make((head_dim, width), normal)
        self.query_bias = make((width,), zeros)
        self.key = make((head_dim, width), normal)
        self.key_bias = make((width,), zeros)
        basis = initializers.truncated_normal(BASIS_STD)
        shape = (tokens, rank_of(config, tokens))
        self.down = make(shape, basis)
        self.up = None if config.shared_basis else nnx.data(make(shape, basis))

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """A~ [B, H, T, N] of queries [B, T, H, D] and keys [B, N, K, D], float32 or
        wider."""
        config, heads = self.config, query.shape[2]
        down = self.down[...].astype(self.wide)
        few = jnp.einsum("bskc,sn->bnkc", self._narrow(key, "key"), down)
        few = jnp.repeat(few, heads // key.shape[2], axis=2)
        narrow = self._narrow(query, "query")
        of_heads = config.predictor_scale == "heads"
        scale = (heads if of_heads else narrow.shape[-1]) ** -0.5
        cheap = jnp.einsum("bthc,bnhc->bhtn", narrow, few) * scale
        coef = jax.nn.softmax(cheap, axis=-1)
        basis = down if self.up is None else self.up[...].astype(self.wide)
        if config.phase == "masked":
            coef = jnp.where(largest(coef, config.coefficients), coef, 0)
            basis = jnp.abs(basis)
            basis = jnp.where(basis > config.basis_threshold, basis, 0)
        return jnp.einsum("bhtn,sn->bhts", coef, basis)

    def _narrow(self, x: jax.Array, name: str) -> jax.Array:
        """[..., D] -> [..., D // c] by the map of that name."""
        matrix, bias = getattr(self, name)[...], getattr(self, f"{name}_bias")[...]
        matrix, bias = matrix.astype(self.wide), bias.astype(self.wide)
        return nn.linear.rows_times(x.astype(self.wide), matrix) + bias

    def kept(self, estimate: jax.Array, extra: int) -> jax.Array:
        """Which keys each query attends to, bool [B, H, N, N] without gradient, of the
        estimate [B, H, N - extra, N]: all of them for the tokens in front."""
        estimate = jax.lax.stop_gradient(estimate)
        count = budget(self.config, estimate.shape[-1])
        if count is None:
            found = estimate > self.config.threshold
        else:
            found = largest(estimate, count)
        front = ((0, 0), (0, 0), (extra, 0), (0, 0))
        return jnp.pad(found, front, constant_values=True)


class Mixer(attention.Mixer):
    """One layer.

    Parameters: those of `attention`, and those of `Predictor` under "predictor".
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        cuts.need_grid(dims, owner="sparsifiner")
        super().__init__(layer_config(config), dims, rngs=rngs)
        options.refuse_changes(
            self.slots(),
            ("attend",),
            self.shape,
            dims,
            owner="sparsifiner",
            why="scores and weight map are those that the predictor learns",
        )
        self.config = config
        self.predictor = Predictor(config, dims, self.shape.head_dim, rngs=rngs)

    def known_hooks(self) -> tuple[str, ...]:
        """Those of `attention`, and "estimate", A~ [B, H, N - extra, N]: what takes
        its place decides which keys are kept."""
        return (*super().known_hooks(), "estimate")

    def __call__(self, x: jax.Array, ctx: Context, *, norm=None):
        """[B, N, C] -> [B, N, C] in the compute dtype; `norm` as in `attention`."""
        hooks = self.known_hooks()
        cuts.check_request_on_grid(SPEC, self.dims, x, ctx, hooks=hooks)
        if ctx.extra_tokens != self.dims.prefix_tokens:
            raise UserError(
                "sparsifiner: the layer is made for a fixed number of tokens; got "
                f"extra_tokens={ctx.extra_tokens}, made for {self.dims.prefix_tokens}. "
                "Build the model for them."
            )
        return super().__call__(x, ctx, norm=norm)

    def attend(self, x, qkv, mask, operands: dict, call: Call, *, spec=None):
        """Dense attention and the loss, or attention to the kept keys."""
        query, key, _ = qkv
        extra = call.ctx.extra_tokens
        estimate = self.predictor(query[:, extra:], key)
        estimate = call.probe("estimate", estimate, head_axis=1)
        if self.config.phase == "reconstruct":
            self._compare(estimate, query[:, extra:], key, call)
            return super().attend(x, qkv, mask, operands, call, spec=spec)
        kept = self.predictor.kept(estimate, extra)
        share = jnp.mean(kept[:, :, extra:], dtype=estimate.dtype)
        call.metrics["sparsifiner_kept"] = share
        mask = mask & kernels.MaskFn(kept_entry, ("kept",), ("tile",))
        operands = operands | {"kept": kept}
        return super().attend(x, qkv, mask, operands, call, spec=spec)

    def _compare(self, estimate: jax.Array, query, key, call: Call) -> None:
        """The squares of A~ - A, and their share of those of A."""
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        scale = self.config.scale
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        wide = estimate.dtype
        scores = jnp.einsum("bthd,bshd->bhts", query.astype(wide), key.astype(wide))
        dense = jax.lax.stop_gradient(jax.nn.softmax(scale * scores, axis=-1))
        squares = jnp.sum(jnp.square(estimate - dense))
        error = jax.lax.stop_gradient(squares) / jnp.sum(jnp.square(dense))
        call.metrics["sparsifiner_error"] = error
        if self.config.loss_over == "image":
            squares = squares / len(query)
        call.losses["sparsifiner_loss"] = self.config.loss_weight * squares

    def init_state(self, batch: int, max_len: int, memory=None):
        """Refused: all tokens are there at once."""
        del batch, max_len, memory
        raise windowed.no_decode_form(SPEC.name, self.dims)

    def step(self, x: jax.Array, state, ctx: Context):
        """Refused as well."""
        del x, state, ctx
        raise windowed.no_decode_form(SPEC.name, self.dims)


def layer_config(config: Config) -> attention.Config:
    """The layer of `attention` whose keys are chosen."""
    return attention.Config(
        num_kv_heads=config.num_kv_heads,
        value_head_dim=config.value_head_dim,
        positions=config.positions,
        qk_norm=config.qk_norm,
        scale=config.scale,
        output=config.output,
    )


def predictor_parameters(config: Config, tokens: int, head_dim: int) -> int:
    """2 (D D/c + D/c) + 2 N n; N n with a shared basis."""
    width = head_dim // config.reduce
    basis = tokens * rank_of(config, tokens)
    return 2 * (head_dim + 1) * width + basis * (1 if config.shared_basis else 2)


def _parameter_count(config: Config, dims: MixerDims) -> int:
    layer = layer_config(config)
    dim = sizes.heads_of(layer, dims).head_dim
    own = predictor_parameters(config, tokens_of(dims), dim)
    return sizes.parameter_count(layer, dims) + own


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    """All pairs of tokens are computed, the estimate's too."""
    layer = layer_config(config)
    heads = sizes.heads_of(layer, dims)
    width, rank = heads.head_dim // config.reduce, rank_of(config, seq_len)
    maps = (heads.num_heads + heads.num_kv_heads) * heads.head_dim * width
    coef = (heads.num_heads + heads.num_kv_heads) * rank * width
    pairs = heads.num_heads * seq_len * rank
    if config.phase == "reconstruct":
        pairs += heads.num_heads * seq_len * heads.head_dim
    own = 2.0 * seq_len * (maps + coef + pairs)
    return sizes.flops(layer, dims, seq_len) + own


SPEC = MixerSpec(
    name="sparsifiner",
    title="Sparsifiner: predicted sparse attention",
    family="sparse",
    paper="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient "
    "Vision Transformers",
    source="arXiv 2303.13755",
    forms=("masked", "reconstruct"),
    capabilities=ON_GRID,
    decode=SEES_BOTH_WAYS,
    parameter_count=_parameter_count,
    state_size=no_state,
    flops=_flops,
    limits=(
        "P and R belong to a fixed number of tokens: images of another size need a "
        "predictor of their own.",
        "The predictor learns with phase=reconstruct alone. A run that starts with "
        "phase=masked keeps to the guesses of an untrained one.",
        "No time is saved: the estimate of all pairs and the mask [B, H, N, N] exist, "
        "and kernels compute every pair and hide what is not kept, as the authors' "
        "code does. FLOPs count what is computed.",
        "With loss_over=batch the loss is a sum over the images of a micro-batch, so "
        "its share of the training loss, and of the gradient that is clipped, grows "
        "with their number.",
        "Token pruning by the class token's attention is left out: tokens that are "
        "gone for all further layers are not a mixer's to remove.",
        "No causal form: P mixes all tokens.",
    ),
    deviations=(
        "The teacher of phase=reconstruct is the layer's own dense attention without "
        "gradient; the paper's is a frozen copy of the pre-trained model, the same at "
        "the first step.",
        "Knowledge distillation (of classes and of the last layer's tokens) is left "
        "out: phase=masked trains on the task's loss.",
        "Evaluation with phase=reconstruct is dense as training is; the authors' code "
        "evaluates with masks. Evaluate with phase=masked for those.",
        "All extra tokens (registers too) attend to all keys, as the class token does; "
        "without any, every row is estimated.",
        "The predictor reads queries and keys as their product does, normed and "
        "rotated where the model has that, and computes in float32.",
        "Weight decay passes the predictor by in both phases (config.optim."
        "decay_pattern does not match its names). In the authors' code the basis and "
        "the maps decay while they learn.",
        "Of equal estimates the first keys are kept; coefficients are kept by their "
        "number, not by a threshold.",
    ),
)


CONFORMANCE = {
    "config": {"keep": 0.5, "rank": 3, "coefficients": 2},
    "dims": {"head_dim": 6},
    "length": 16,
    "grid": (2, 8),
    "extra_tokens": 8,
    "no_gradient": {
        "predictor": "the choice of keys has no gradient; the predictor "
        "learns with phase=reconstruct"
    },
    "not_the_derivative": "the output jumps where a key is kept in place of another",
}

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {
        "phase": "reconstruct",
        "predictor_scale": "width",
        "reduce": 3,
        "num_kv_heads": 2,
        "value_head_dim": 5,
        "qk_norm": True,
        "positions": "none",
        "scale": 0.7,
        "output": ({"type": "gated_attention"},),
    },
    {"keep": None, "threshold": 0.05, "shared_basis": True},
)
