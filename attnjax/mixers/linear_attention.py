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

from attnjax import nn
from attnjax.core.context import Context, MixerOut
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers.requests import check_memory, check_request
from attnjax.mixers.slots.base import Call
from attnjax.mixers.slots.probes import check_hooks


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one linear attention layer.

    Attributes:
        form: how the full pass is computed: "chunked" (time linear in T),
            "parallel" (quadratic, the definition) or "recurrent" (token by token;
            causal only). All give the same numbers.
        chunk_size: tokens a chunk of the chunked form.
        rotary: rotate the features of the numerator by the model's rotary
            positions; the normaliser stays unrotated, hence positive.
    """

    form: Literal["chunked", "parallel", "recurrent"] = "chunked"
    chunk_size: int = 64
    rotary: bool = False

    def __post_init__(self):
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {self.chunk_size}.")


class State(NamedTuple):
    """All that the past leaves behind: float32 (or float64), whatever its length.

    Attributes:
        memory: S, sum of phi(k) v^T over the current document, [B, K, D, E].
        normaliser: z, sum of phi(k), [B, K, D].
        segment: int32 [B], id of the current document, 0 before the first token.
    """

    memory: jax.Array
    normaliser: jax.Array
    segment: jax.Array


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


class _Parts(NamedTuple):
    """Inputs of the forms after the feature map, in the accumulation dtype.

    Queries are [B, T, K, G, D]; keys of padding are zero. `plain` is (query, key)
    without rotary positions where the others carry them, else None. `segments`
    [B, T] are the ids with padding filled by the id before it.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    plain: tuple[jax.Array, jax.Array] | None
    segments: jax.Array


def _prepare(query, key, value, segment_ids, state, rotary) -> tuple[_Parts, State]:
    wide = jnp.promote_types(value.dtype, jnp.float32)
    batch, length, kv_heads, dim = key.shape
    query = feature_map(query.astype(wide)).reshape(batch, length, kv_heads, -1, dim)
    key = feature_map(key.astype(wide))
    if state is None:
        state = empty_state(batch, kv_heads, dim, value.shape[-1], dtype=wide)
    if segment_ids is None:
        # The document that the state is in goes on; a fresh state is in none.
        segments = jnp.maximum(state.segment, 1)[:, None] * jnp.ones(
            (1, length), jnp.int32
        )
    else:
        valid = (segment_ids != 0)[:, :, None, None]
        key, value = jnp.where(valid, key, 0), jnp.where(valid, value, 0)
        segments = _fill_padding(segment_ids, state.segment)
    plain = None
    if rotary is not None:
        plain = query, key
        query = _rotate(query, rotary)
        key = _rotate(key, rotary)
    return _Parts(query, key, value.astype(wide), plain, segments), state


def _rotate(x: jax.Array, rotary: tuple) -> jax.Array:
    """Rotary positions on [B, T, ..., D]."""
    flat = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return nn.apply_rope(flat, *rotary).reshape(x.shape)


def _fill_padding(segment_ids: jax.Array, first: jax.Array) -> jax.Array:
    """Ids with each 0 replaced by the last other id before it (`first` if none)."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    last = jax.lax.cummax(jnp.where(segment_ids != 0, places, -1), axis=1)
    filled = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
    return jnp.where(last < 0, first[:, None], filled).astype(jnp.int32)


def _finish(numerator, mass, segment_ids, dtype) -> jax.Array:
    """Divide; rows that see nothing, and padding, are zero with zero gradients."""
    batch, length, kv_heads, groups, dim = numerator.shape
    seen = mass > 0
    if segment_ids is not None:
        seen = seen & (segment_ids != 0)[:, :, None, None]
    out = numerator / jnp.where(seen, mass, 1)[..., None]
    out = jnp.where(seen[..., None], out, 0)
    return out.reshape(batch, length, kv_heads * groups, dim).astype(dtype)


def _chunk(parts: _Parts, state: State, *, keep) -> tuple:
    """One chunk, all its tokens at once, after the tokens that `state` sums up.

    Args:
        parts: of L tokens.
        state: before them.
        keep: [L, L] bool, which tokens of the chunk a token may see.

    Returns:
        numerator [B, L, K, G, E], mass [B, L, K, G], the state after the chunk.
    """
    query, key, value, plain, segments = parts
    plain_query, plain_key = plain or (query, key)
    same = segments[:, :, None] == segments[:, None, :]
    seen = (same & keep)[:, None, None]
    scores = jnp.where(seen, jnp.einsum("blkgd,bskd->bkgls", query, key), 0)
    weights = scores
    if plain is not None:
        weights = jnp.einsum("blkgd,bskd->bkgls", plain_query, plain_key)
        weights = jnp.where(seen, weights, 0)
    carried = (segments == state.segment[:, None]).astype(value.dtype)
    numerator = jnp.einsum("bkgls,bske->blkge", scores, value)
    numerator += carried[:, :, None, None, None] * jnp.einsum(
        "blkgd,bkde->blkge", query, state.memory
    )
    mass = jnp.moveaxis(jnp.sum(weights, axis=-1), -1, 1)
    mass += carried[:, :, None, None] * jnp.einsum(
        "blkgd,bkd->blkg", plain_query, state.normaliser
    )
    last = segments[:, -1]
    stays = (last == state.segment).astype(value.dtype)[:, None, None]
    ends = (segments == last[:, None])[:, :, None, None]
    memory = jnp.einsum("blkd,blke->bkde", jnp.where(ends, key, 0), value)
    normaliser = jnp.sum(jnp.where(ends, plain_key, 0), axis=1)
    after = State(
        stays[..., None] * state.memory + memory,
        stays * state.normaliser + normaliser,
        last,
    )
    return numerator, mass, after


def parallel(
    query, key, value, segment_ids=None, state=None, rotary=None, *, causal=True
) -> tuple[jax.Array, State]:
    """All pairs at once, eq. 9: time and memory O(T^2).

    Args:
        query, key, value, segment_ids, causal: as in `reference`. Here the ids of
            one document must be contiguous, padding inside it aside.
        state: what earlier tokens left, or None; causal only.
        rotary: (positions int [B, T], nn.Rope) or None.

    Returns:
        [B, T, H, E] in the dtype of `value`, accumulated in float32 or wider, and
        the state after the last token.
    """
    _check_state(state, causal)
    parts, before = _prepare(query, key, value, segment_ids, state, rotary)
    keep = jnp.ones((query.shape[1],) * 2, bool)
    if causal:
        keep = jnp.tril(keep)
    numerator, mass, after = _chunk(parts, before, keep=keep)
    return _finish(numerator, mass, segment_ids, value.dtype), after


def chunked(
    query,
    key,
    value,
    segment_ids=None,
    state=None,
    rotary=None,
    *,
    causal=True,
    chunk_size=64,
) -> tuple[jax.Array, State]:
    """Pairs inside chunks of L tokens, the state between them.

    Arguments and results are those of `parallel`. Without `causal` the sums over
    later tokens come from a second pass over the reversed sequence.

    Cost: time O(T (L + D) E), memory of the backward pass O(T D E / L): it keeps
    the state before each chunk and computes the rest again.
    """
    _check_state(state, causal)
    parts, before = _prepare(query, key, value, segment_ids, state, rotary)
    if not causal and segment_ids is None:
        numerator, mass, after = _read_all(parts)
        return _finish(numerator, mass, segment_ids, value.dtype), after
    numerator, mass, after = _scan_chunks(parts, before, chunk_size, strict=False)
    if not causal:
        back = jax.tree.map(lambda a: jnp.flip(a, axis=1), parts)
        more, more_mass, _ = _scan_chunks(back, before, chunk_size, strict=True)
        numerator += jnp.flip(more, axis=1)
        mass += jnp.flip(more_mass, axis=1)
    return _finish(numerator, mass, segment_ids, value.dtype), after


def _read_all(parts: _Parts) -> tuple:
    """Without causality and documents every token reads the same sums, eq. 6."""
    query, key, value, plain, segments = parts
    plain_query, plain_key = plain or (query, key)
    memory = jnp.einsum("bskd,bske->bkde", key, value)
    normaliser = jnp.sum(plain_key, axis=1)
    numerator = jnp.einsum("blkgd,bkde->blkge", query, memory)
    mass = jnp.einsum("blkgd,bkd->blkg", plain_query, normaliser)
    return numerator, mass, State(memory, normaliser, segments[:, -1])


def _scan_chunks(parts: _Parts, state: State, chunk_size: int, *, strict: bool):
    length = parts.value.shape[1]
    size = min(chunk_size, length)
    keep = jnp.tril(jnp.ones((size, size), bool), k=-1 if strict else 0)
    if size == length:
        return _chunk(parts, state, keep=keep)

    def split(a, mode="constant"):
        pad = [(0, 0), (0, -length % size)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, pad, mode=mode)
        return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

    # Zero keys add nothing; the last id goes on, so that the state is the last one.
    chunks = jax.tree.map(split, parts)._replace(
        segments=split(parts.segments, mode="edge")
    )

    def body(state, chunk):
        numerator, mass, state = _chunk(chunk, state, keep=keep)
        return state, (numerator, mass)

    body = jax.checkpoint(body, prevent_cse=False)
    state, out = jax.lax.scan(body, state, chunks)

    def join(a):
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])

    numerator, mass = (join(a)[:, :length] for a in out)
    return numerator, mass, state


def recurrent(
    query, key, value, segment_ids=None, state=None, rotary=None, *, causal=True
) -> tuple[jax.Array, State]:
    """Token by token, eq. 16-20: S_t = S_{t-1} + phi(k_t) v_t^T.

    Arguments and results are those of `parallel`.

    Raises:
        NotImplementedError: without `causal`: the recurrence has only a past.
    """
    if not causal:
        raise NotImplementedError(
            "linear_attention: the recurrent form is causal; got causal=False. "
            'Set form="chunked" or "parallel".'
        )
    parts, state = _prepare(query, key, value, segment_ids, state, rotary)

    def token(state, part):
        stays = (part.segments == state.segment).astype(value.dtype)[:, None, None]
        plain_query, plain_key = part.plain or (part.query, part.key)
        outer = part.key[..., None] * part.value[..., None, :]
        state = State(
            stays[..., None] * state.memory + outer,
            stays * state.normaliser + plain_key,
            part.segments,
        )
        numerator = jnp.einsum("bkgd,bkde->bkge", part.query, state.memory)
        mass = jnp.einsum("bkgd,bkd->bkg", plain_query, state.normaliser)
        return state, (numerator, mass)

    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), parts)
    state, out = jax.lax.scan(token, state, tokens)
    numerator, mass = (jnp.moveaxis(a, 0, 1) for a in out)
    return _finish(numerator, mass, segment_ids, value.dtype), state


def weights(query, key, segment_ids=None, rotary=None, *, causal=True) -> jax.Array:
    """The weight of every key in every output, [B, H, T, T]: for probes, O(T^2).

    Rows sum to 1, without `rotary` all weights are positive; padding has none.
    """
    parts, _ = _prepare(query, key, key, segment_ids, None, rotary)
    same = parts.segments[:, :, None] == parts.segments[:, None, :]
    seen = jnp.tril(same) if causal else same
    if segment_ids is not None:
        valid = segment_ids != 0
        seen = seen & valid[:, :, None] & valid[:, None, :]
    seen = seen[:, None, None]

    def scores(query, key):
        return jnp.where(seen, jnp.einsum("btkgd,bskd->bkgts", query, key), 0)

    mass = jnp.sum(scores(*(parts.plain or parts[:2])), axis=-1, keepdims=True)
    found = jnp.where(mass > 0, scores(*parts[:2]) / jnp.where(mass > 0, mass, 1), 0)
    return found.reshape(found.shape[0], -1, *found.shape[3:])


def empty_state(batch, kv_heads, key_dim, value_dim, *, dtype=jnp.float32) -> State:
    """The state before the first token."""
    return State(
        jnp.zeros((batch, kv_heads, key_dim, value_dim), dtype),
        jnp.zeros((batch, kv_heads, key_dim), dtype),
        jnp.zeros((batch,), jnp.int32),
    )


def _check_state(state, causal: bool) -> None:
    if state is not None and not causal:
        raise ValueError(
            "linear_attention: a state goes with causal attention; got causal=False. "
            "Leave state=None."
        )


# What a Hook may read or change; a decoding step has all but the weights.
HOOKS = ("input", "query", "key", "value", "heads", "output", "weights")
FORMS = {"parallel": parallel, "chunked": chunked, "recurrent": recurrent}


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
        form = FORMS[config.form]
        if config.form == "chunked":
            form = partial(form, chunk_size=config.chunk_size)
        if any(hook.what == "weights" for hook in ctx.hooks):
            form = partial(_by_weights, call)
        y, _ = self._mix(x, call, None, partial(form, causal=ctx.causal))
        return y, call.out()

    def init_state(self, batch: int, max_len: int, memory=None) -> State:
        """The state before the first token: its size does not depend on max_len."""
        del max_len
        check_memory(SPEC, memory)
        dims = self.dims
        wide = jnp.promote_types(dtype_of(dims.dtype), jnp.float32)
        return empty_state(
            batch, dims.num_kv_heads, dims.head_dim, dims.head_dim, dtype=wide
        )

    def step(self, x: jax.Array, state: State, ctx: Context):
        """The next T >= 1 tokens [B, T, C] -> y [B, T, C] and the new state."""
        check_hooks(ctx, HOOKS[:-1], owner=SPEC.name, is_step=True)
        check_request(SPEC, ctx, step=True, hooks=HOOKS)
        form = partial(chunked, chunk_size=self.config.chunk_size)
        return self._mix(x, Call(ctx, is_step=True), state, form)

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
    capabilities=Capabilities(bidirectional=True),
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
