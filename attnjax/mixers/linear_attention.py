"""Linear attention: the softmax replaced by a product of feature maps.

o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t) with S_t = sum_{s<=t} phi(k_s) v_s^T,
z_t = sum_{s<=t} phi(k_s) and phi(x) = elu(x) + 1.

Source: Katharopoulos, Vyas, Pappas and Fleuret, "Transformers are RNNs",
arXiv 2006.16236, eq. 7, 9-12 and 16-20. Rotary features: Su et al.,
arXiv 2104.09864, eq. 19.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import kernels, nn
from attnjax.core.context import Context, MixerOut
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers.requests import check_memory, check_request
from attnjax.mixers.slots import across_devices, cache
from attnjax.mixers.slots.base import Call
from attnjax.mixers.slots.probes import check_hooks


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one linear attention layer.

    Attributes:
        form: how the full pass is computed: "chunked" (time linear in T, by the
            fastest kernel), "parallel" (all pairs: one chunk) or "recurrent" (token
            by token; causal only). All give the same numbers.
        chunk_size: tokens a chunk of the chunked form; a power of 2.
        rotary: rotate the features of the numerator by the model's rotary
            positions; the normaliser stays unrotated, hence positive.
    """

    form: Literal["chunked", "parallel", "recurrent"] = "chunked"
    chunk_size: int = 64
    rotary: bool = False

    def __post_init__(self):
        size = self.chunk_size
        if size < 1 or size & (size - 1):
            raise ValueError(f"chunk_size must be a power of 2; got {size}. Use 64.")


class State(NamedTuple):
    """All that the past leaves behind: float32 (or float64), whatever its length.

    Attributes:
        sums: ([B, K, D, E + 1],): S, sum of phi(k) v^T over the current document,
            and z, sum of phi(k), as its last column. With rotary positions, which z
            has not, two: S [B, K, D, E] and z [B, K, D, 1].
        segment: int32 [B], id of the current document, 0 before the first token.
    """

    sums: tuple[jax.Array, ...]
    segment: jax.Array

    @property
    def memory(self) -> jax.Array:
        """S, [B, K, D, E]."""
        return self.sums[0] if len(self.sums) > 1 else self.sums[0][..., :-1]

    @property
    def normaliser(self) -> jax.Array:
        """z, [B, K, D]."""
        return self.sums[-1][..., -1]


def feature_map(x: jax.Array) -> jax.Array:
    """phi(x) = elu(x) + 1, eq. 7, as x + 1 or exp(x): without their cancellation."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    causal: bool = True,
) -> jax.Array:
    """The definition, eq. 7 and 9: every weight is written out.

    Args:
        query: [B, T, H, D].
        key: [B, T, K, D], K divides H.
        value: [B, T, K, E].
        segment_ids: int [B, T]; equal ids see one another, 0 sees nothing.
        causal: whether token t sees tokens s <= t only.

    Returns:
        [B, T, H, E] in the dtype of `value`; rows of padding are zero.
    """
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(a, groups, axis=2) for a in (key, value))
    weights = jnp.einsum("bthd,bshd->bhts", feature_map(query), feature_map(key))
    seen = jnp.ones((1, 1, length, length), bool)
    if causal:
        seen = jnp.tril(seen)
    if segment_ids is not None:
        own, other = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
        seen = seen & (own == other) & (own != 0)
    weights = jnp.where(seen, weights, 0)
    mass = jnp.sum(weights, axis=-1, keepdims=True)
    weights = jnp.where(mass > 0, weights / jnp.where(mass > 0, mass, 1), 0)
    return jnp.einsum("bhts,bshe->bthe", weights, value).astype(value.dtype)


@dataclasses.dataclass(frozen=True)
class Pass:
    """How the recurrence is computed over a row.

    Attributes:
        form: as in `Config`.
        chunk_size: as in `Config`.
        rows: how rows lie on the devices (`Context.rows`).
        target: the device that it is compiled for.
    """

    form: str = "chunked"
    chunk_size: int = 64
    rows: jax.sharding.NamedSharding | None = None
    target: kernels.Target | None = None

    def __call__(
        self, query, key, value, operands: dict, *, normalise=False
    ) -> tuple[jax.Array, jax.Array]:
        """Outputs [B, T, H, E] and the state after the last token.

        Args:
            query, key: features, [B, T, H, D] and [B, T, K, D].
            value: [B, T, K, E].
            operands: those of `kernels.linear_attention`.
            normalise: divide by the sum of the weights.
        """
        length, size = query.shape[1], self.chunk_size
        if self.form == "parallel":
            size = 1 << (length - 1).bit_length()
        spec = kernels.LinearSpec(
            normalise=normalise, chunk_size=size, return_state=True
        )
        given = query, key, value
        is_step = length == 1 and self.rows is None and "initial_state" in operands
        if is_step and self.form == "chunked":
            rest = dict(operands)
            before = rest.pop("initial_state")
            return kernels.linear_attention_step(*given, before, spec, rest)
        return across_devices.linear_attention(
            *given,
            spec,
            operands,
            rows=self.rows,
            implementation=IMPLEMENTATION[self.form],
            target=self.target,
        )


IMPLEMENTATION = {"chunked": "auto", "parallel": "blocked", "recurrent": "reference"}
PLAIN = Pass()


def mix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    state: State | None = None,
    rotary: tuple | None = None,
    *,
    causal: bool = True,
    how: Pass = PLAIN,
) -> tuple[jax.Array, State | None]:
    """Linear attention through `kernels.linear_attention`.

    Args:
        query, key, value, segment_ids, causal: as in `reference`. Here the ids of
            one document must be contiguous, padding inside it aside.
        state: what earlier tokens left, or None; causal only.
        rotary: (positions int [B, T], nn.Rope) or None.
        how: the form.

    Returns:
        [B, T, H, E] in the dtype of `value`, accumulated in float32 or wider, and
        the state after the last token (None without `causal`).

    Raises:
        NotImplementedError: the recurrent form without `causal`: it has only a past.
    """
    wide = jnp.promote_types(value.dtype, jnp.float32)
    query, key = (feature_map(x.astype(wide)) for x in (query, key))
    turned = None
    if rotary is not None:
        turned = tuple(nn.apply_rope(x, *rotary) for x in (query, key))
    pairs = (query, key), turned
    if causal:
        heads, state = _one_way(pairs, value.astype(wide), segment_ids, state, how)
        return heads.astype(value.dtype), state
    if state is not None:
        raise ValueError(
            "linear_attention: a state goes with causal attention; got causal=False. "
            "Leave state=None."
        )
    if how.form == "recurrent":
        raise NotImplementedError(
            "linear_attention: the recurrent form is causal; got causal=False. "
            'Set form="chunked" or "parallel".'
        )
    parts = _parts(pairs, value.astype(wide))
    outs = [_both_ways(part, segment_ids, how) for part in parts]
    heads = _divided(jnp.concatenate(outs, axis=-1))
    if segment_ids is not None:
        heads = jnp.where((segment_ids != 0)[:, :, None, None], heads, 0)
    return heads.astype(value.dtype), None


parallel = partial(mix, how=Pass(form="parallel"))
chunked = mix
recurrent = partial(mix, how=Pass(form="recurrent"))


def _parts(pairs, value: jax.Array) -> list[tuple]:
    """(query, key, value) of the sums whose outputs side by side are numerator and
    normaliser, the last column."""
    plain, turned = pairs
    ones = jnp.ones_like(value[..., :1])
    if turned is None:
        return [(*plain, jnp.concatenate([value, ones], axis=-1))]
    return [(*turned, value), (*plain, ones)]


def _divided(sums: jax.Array) -> jax.Array:
    """Numerator by normaliser; a row that sees nothing is 0, as is its gradient."""
    numerator, mass = sums[..., :-1], sums[..., -1:]
    seen = mass > 0
    return jnp.where(seen, numerator / jnp.where(seen, mass, 1), 0)


def _one_way(pairs, value, segment_ids, state: State | None, how: Pass):
    """The causal form: [B, T, H, E] and the state after the last token."""
    operands, segment = {}, None if state is None else state.segment
    if segment is None:
        segment = jnp.zeros(value.shape[:1], jnp.int32)
    if segment_ids is not None:
        operands["segment_ids"] = segment_ids
        if state is not None:
            operands["initial_segment"] = segment
    is_plain = pairs[1] is None
    parts = [(*pairs[0], value)] if is_plain else _parts(pairs, value)
    starts = [None] * len(parts) if state is None else state.sums
    outs, ends = [], []
    for part, start in zip(parts, starts, strict=True):
        first = {} if start is None else {"initial_state": start}
        out, end = how(*part, operands | first, normalise=is_plain)
        outs.append(out)
        ends.append(end)
    heads = outs[0] if is_plain else _divided(jnp.concatenate(outs, axis=-1))
    ids = cache.document_ids(segment_ids, segment, value.shape[1])
    return heads, State(tuple(ends), cache.last_document(ids, segment))


def _both_ways(part, segment_ids, how: Pass) -> jax.Array:
    """Sums over the whole document, eq. 6: those up to a token and those after it."""
    query, key, value = part
    if segment_ids is None:
        groups = query.shape[2] // key.shape[2]
        memory = jnp.einsum("bskd,bske->bkde", key, value)
        memory = jnp.repeat(memory, groups, axis=1)
        return jnp.einsum("bthd,bhde->bthe", query, memory)
    key = jnp.where((segment_ids != 0)[:, :, None, None], key, 0)
    ids = _fill_padding(segment_ids)
    past, _ = how(query, key, value, {"segment_ids": ids})
    query, key, value, ids = (jnp.flip(x, 1) for x in (query, key, value, ids))
    # One token late, so that no token is counted twice.
    same = (ids[:, 1:] == ids[:, :-1])[:, :, None, None]
    key = _one_later(jnp.where(same, key[:, :-1], 0))
    future, _ = how(query, key, _one_later(value[:, :-1]), {"segment_ids": ids})
    return past + jnp.flip(future, 1)


def _one_later(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))


def _fill_padding(segment_ids: jax.Array) -> jax.Array:
    """Ids with each 0 replaced by the last other id before it (0 if none)."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    last = jax.lax.cummax(jnp.where(segment_ids != 0, places, 0), axis=1)
    return jnp.take_along_axis(segment_ids, last, axis=1)


def weights(query, key, segment_ids=None, rotary=None, *, causal=True) -> jax.Array:
    """The weight of every key in every output, [B, H, T, T]: for probes, O(T^2).

    Rows sum to 1, without `rotary` all weights are positive; padding has none.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    groups, length = query.shape[2] // key.shape[2], query.shape[1]
    query, key = (feature_map(x.astype(wide)) for x in (query, key))
    seen = jnp.ones((1, length, length), bool)
    if causal:
        seen = jnp.tril(seen)
    if segment_ids is not None:
        own, other = segment_ids[:, :, None], segment_ids[:, None, :]
        seen = seen & (own == other) & (own != 0)

    def scores(query, key):
        found = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(key, groups, axis=2))
        return jnp.where(seen[:, None], found, 0)

    mass = jnp.sum(scores(query, key), axis=-1, keepdims=True)
    if rotary is not None:
        query, key = (nn.apply_rope(x, *rotary) for x in (query, key))
    found = scores(query, key)
    return jnp.where(mass > 0, found / jnp.where(mass > 0, mass, 1), 0)


# What a Hook may read or change; a decoding step has all but the weights.
HOOKS = ("input", "query", "key", "value", "heads", "output", "weights")


class Mixer(nnx.Module):
    """Multi-head linear attention with grouped key/value heads.

    Parameters: query [C, H D], key and value [C, K D], out [H D, C], biases and the
    norms of query and key where the model has them.
    """

    def __init__(self, config: Config, dims: MixerDims, *, rngs: nnx.Rngs):
        if config.rotary and dims.rope is None:
            raise UserError(
                "linear_attention: rotary=true needs the model's rotary positions; got "
                "none. Set config.model.positions=rope, or rotary=false."
            )
        self.config, self.dims = config, dims
        dtypes = dict(
            dtype=dtype_of(dims.dtype), param_dtype=dtype_of(dims.param_dtype)
        )
        make = partial(nn.Linear, use_bias=dims.use_bias, rngs=rngs, **dtypes)
        heads, shared = (
            dims.num_heads * dims.head_dim,
            dims.num_kv_heads * dims.head_dim,
        )
        self.query = make(dims.embed_dim, heads, std=dims.init_std)
        self.key = make(dims.embed_dim, shared, std=dims.init_std)
        self.value = make(dims.embed_dim, shared, std=dims.init_std)
        self.out = make(heads, dims.embed_dim, std=dims.out_init_std)
        norm = partial(
            nn.RMSNorm,
            dims.head_dim,
            eps=dims.norm_eps,
            param_dtype=dtypes["param_dtype"],
            rngs=rngs,
        )
        self.query_norm = norm() if dims.qk_norm else None
        self.key_norm = norm() if dims.qk_norm else None

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, MixerOut]:
        """[B, T, C] -> [B, T, C] in the compute dtype."""
        check_hooks(ctx, HOOKS, owner=SPEC.name, is_step=False)
        check_request(SPEC, ctx, hooks=HOOKS)
        config, call = self.config, Call(ctx)
        how = Pass(config.form, config.chunk_size, ctx.rows, self.dims.target)
        form = partial(mix, causal=ctx.causal, how=how)
        if any(hook.what == "weights" for hook in ctx.hooks):
            form = partial(_by_weights, call, causal=ctx.causal)
        y, _ = self._mix(x, call, None, form)
        return y, call.out()

    def init_state(self, batch: int, max_len: int, memory=None) -> State:
        """The state before the first token: its size does not depend on max_len."""
        del max_len
        check_memory(SPEC, memory)
        dims, dim = self.dims, self.dims.head_dim
        wide = jnp.promote_types(dtype_of(dims.dtype), jnp.float32)
        widths = (dim, 1) if self.config.rotary else (dim + 1,)
        shape = batch, dims.num_kv_heads, dim
        sums = tuple(jnp.zeros((*shape, width), wide) for width in widths)
        return State(sums, jnp.zeros((batch,), jnp.int32))

    def step(self, x: jax.Array, state: State, ctx: Context):
        """The next T >= 1 tokens [B, T, C] -> y [B, T, C] and the new state."""
        check_hooks(ctx, HOOKS[:-1], owner=SPEC.name, is_step=True)
        check_request(SPEC, ctx, step=True, hooks=HOOKS)
        how = Pass(chunk_size=self.config.chunk_size, target=self.dims.target)
        call = Call(ctx, is_step=True)
        return self._mix(x, call, state, partial(mix, how=how))

    def _mix(self, x, call: Call, state, form):
        ctx, dims = call.ctx, self.dims
        x = call.probe("input", x)
        query, key, value = (
            part(x).reshape(*x.shape[:2], -1, dims.head_dim)
            for part in (self.query, self.key, self.value)
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = call.probe("query", query, head_axis=2)
        key = call.probe("key", key, head_axis=2)
        value = call.probe("value", value, head_axis=2)
        rotary = (ctx.positions, dims.rope) if self.config.rotary else None
        heads, state = form(query, key, value, ctx.segment_ids, state, rotary)
        heads = call.probe("heads", heads, head_axis=2)
        y = call.probe("output", self.out(heads.reshape(*x.shape[:2], -1)))
        y = nn.dropout(y, dims.dropout, prng_key=ctx.prng_key, train=ctx.train)
        return y, state


def _by_weights(call: Call, query, key, value, segment_ids, state, rotary, *, causal):
    """The parallel form through its weights, which hooks read and change."""
    found = weights(query, key, segment_ids, rotary, causal=causal)
    found = call.probe("weights", found, head_axis=1)
    value_ = jnp.repeat(value, query.shape[2] // key.shape[2], axis=2)
    heads = jnp.einsum("bhts,bshe->bthe", found, value_.astype(found.dtype))
    return heads.astype(value.dtype), state


def _parameter_count(config: Config, dims: MixerDims) -> int:
    del config
    heads, shared = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    count = 2 * dims.embed_dim * (heads + shared)
    if dims.use_bias:
        count += heads + 2 * shared + dims.embed_dim
    return count + 2 * dims.head_dim * dims.qk_norm


def _state_size(config: Config, dims: MixerDims, max_len: int) -> int:
    """S, z and the document's id."""
    del config, max_len
    return dims.num_kv_heads * dims.head_dim * (dims.head_dim + 1) + 1


def _flops(config: Config, dims: MixerDims, seq_len: int) -> float:
    heads, shared = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    maps = 4.0 * dims.embed_dim * (heads + shared)
    pairs = {"parallel": seq_len, "chunked": min(config.chunk_size, seq_len)}
    inside = 4.0 * pairs.get(config.form, 0) * heads
    state = 0.0
    if config.form != "parallel":
        state = 2.0 * dims.head_dim * (heads + shared)
    return seq_len * (maps + inside + state)


SPEC = MixerSpec(
    name="linear_attention",
    title="Linear attention (elu + 1)",
    family="linear",
    paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear "
    "Attention",
    source="arXiv 2006.16236",
    forms=("parallel", "chunked", "recurrent"),
    capabilities=Capabilities(bidirectional=True, sequence_in_order=True),
    decode=Decode(exact=True),
    parameter_count=_parameter_count,
    state_size=_state_size,
    flops=_flops,
    limits=(
        "A state of D x E numbers a head stores about D associations: recall of many "
        "key-value pairs is worse than softmax attention's.",
        "Weights fall off slowly: no token can take nearly all of the weight.",
        "The tokens of one document must be contiguous in a packed row.",
    ),
    deviations=(
        "The authors add 1e-6 to the normaliser; here it is the plain sum, and a row "
        "that sees nothing is zero.",
        "Key/value heads may be shared by groups of query heads.",
    ),
)

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"form": "parallel"},
    {"form": "recurrent"},
    {"chunk_size": 64, "rotary": True},
)

# Short chunks, so that short test sequences have several.
CONFORMANCE = {"config": {"chunk_size": 4}}
