"""Few queries against a long cache on a TPU: the cache is read where it lies.

All T H query heads are the rows of one tile, and a block of the cache [keys, K, D] is
its columns as it lies in memory, key by key and head by head: a row's scores with the
other key/value heads are masked. The matrix unit makes those products while the next
block is copied; what is saved is the copy of the whole cache, heads first, that the
kernels for many queries start from.

The grid is (batch, part, step): blocks that the mask leaves are dealt out to the parts,
and no others are visited. A part gives its running rows, which are joined outside.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnjax.kernels import blocked, blocked_forward, epilogue, tile_math, tiles
from attnjax.kernels.compat import type_like
from attnjax.kernels.mosaic_tpu import decode_plan, steps
from attnjax.kernels.mosaic_tpu.decode_plan import DecodePlan
from attnjax.kernels.mosaic_tpu.forward import LAST_AXES, accumulate, dot
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]


def decode(
    request: Request, q, k, v, operands: Arrays, *, plan=None, interpret=False
) -> tuple[jax.Array, jax.Array | None]:
    """Output [B, T, H, E] in q's dtype, and log-sum-exp [B, T, H] if normalised.

    Gradients are those of `blocked`: a step of decoding is seldom trained.

    Args:
        plan: (block, parts) of `DecodePlan`; None chooses.
    """
    spec = request.spec
    bare = dataclasses.replace(
        request,
        spec=dataclasses.replace(spec, epilogue=()),
        operand_shapes=tuple(
            tiles.of_tiles(spec, dict(request.operand_shapes)).items()
        ),
    )
    plan = DecodePlan(bare, *plan) if plan else decode_plan.choose(bare)
    placed = tiles.place_queries(tiles.of_tiles(spec, operands), request.q_len)
    known = tiles.declarations(spec)
    trained = {n: x for n, x in placed.items() if known[n].trains}
    fixed = {n: x for n, x in placed.items() if not known[n].trains}
    out, lse = _decode(plan, interpret, q, k, v, trained, fixed)
    if spec.epilogue:
        out = epilogue.run_steps(spec.epilogue, out, operands)
    return out.astype(q.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(plan: DecodePlan, interpret, q, k, v, trained: Arrays, fixed: Arrays):
    operands = {**trained, **fixed}
    kinds = steps.tile_kinds(plan.blocks, operands, by_head=False)
    words = steps.list_steps(kinds)[:, 0]
    parts = _parts(plan, interpret, words, (q, k, v), operands)
    return _join(plan.request, parts, operands)


def _decode_fwd(plan: DecodePlan, interpret, *given):
    return _decode(plan, interpret, *given), given


def _decode_bwd(plan: DecodePlan, interpret, residuals, cotangents):
    del interpret
    *qkv, trained, fixed = residuals

    def again(q, k, v, trained):
        out, lse = blocked.run(plan.request, q, k, v, {**trained, **fixed})
        return out.astype(jnp.float32), lse

    return (*jax.vjp(again, *qkv, trained)[1](cotangents), None)


_decode.defvjp(_decode_fwd, _decode_bwd)


def _parts(plan: DecodePlan, interpret, words, qkv, operands: Arrays):
    """Each part's rows, float32: "acc" [B, P, T H, E] and, where the weight map has
    them, "top" and "total" [B, P, T H, 1]."""
    request, weight_map = plan.request, plan.request.spec.weight_map
    dtype = jnp.bfloat16 if set(request.dtypes) == {"bfloat16"} else jnp.float32
    # Rows by queries, then heads; columns by keys, then heads: views of the arrays.
    inputs = {
        name: x.astype(dtype).reshape(request.batch, -1, x.shape[3])
        for name, x in zip("qkv", qkv, strict=True)
    }
    inputs["operands"] = decode_plan.arrange(plan, operands)
    sizes = {"acc": request.value_dim}
    sizes |= {"top": 1} if weight_map.needs_max else {}
    sizes |= {"total": 1} if weight_map.needs_sum else {}
    place = functools.partial(_place, plan, words.shape)

    cache = {
        name: pl.BlockSpec(
            (None, plan.columns, inputs[name].shape[2]), lambda *at: (*place(*at), 0)
        )
        for name in "kv"
    }
    in_specs = {
        "q": pl.BlockSpec((None, *inputs["q"].shape[1:]), lambda b, *_: (b, 0, 0)),
        **cache,
        "operands": {
            name: _operand_spec(plan, x.shape, place)
            for name, x in inputs["operands"].items()
        },
    }
    shape = (request.batch, plan.parts, plan.rows)
    block = (None, None, plan.rows)
    return pl.pallas_call(
        functools.partial(_kernel, plan, words.shape),
        out_shape={
            name: type_like((*shape, size), jnp.float32, inputs["k"])
            for name, size in sizes.items()
        },
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*shape[:2], _num_steps(plan, words)),
            in_specs=[in_specs],
            out_specs={
                name: pl.BlockSpec((*block, size), lambda b, p, *_: (b, p, 0, 0))
                for name, size in sizes.items()
            },
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="attention_decode",
        interpret=interpret,
    )(jnp.reshape(jnp.asarray(words), -1), inputs)


def _operand_spec(plan: DecodePlan, shape, place) -> pl.BlockSpec:
    """How an arranged operand is cut."""
    is_row = shape[2] == 1

    def index(*at):
        b, j = place(*at)
        return (b if shape[0] > 1 else 0, 0, 0 if is_row else j)

    return pl.BlockSpec(
        (None, plan.rows, 1) if is_row else (None, 1, plan.columns), index
    )


def _num_steps(plan: DecodePlan, words: steps.Words):
    """As many steps as the longest row of the batch needs of a part."""
    if not isinstance(words, jax.Array):
        return -(-words.shape[1] // plan.parts)
    seen = (steps.kind_of(words) != steps.EMPTY).sum(axis=1, dtype=jnp.int32)
    return jnp.maximum(1, (seen.max() + (plan.parts - 1)) // plan.parts)


def _word(plan: DecodePlan, shape, words_ref, b, p, n):
    """The n-th word of a part, and whether there is one."""
    rows, count = shape
    place = n * plan.parts + p
    start = b * count if rows > 1 else 0
    return words_ref[start + jnp.minimum(place, count - 1)], place < count


def _place(plan: DecodePlan, shape, b, p, n, words_ref):
    """Batch row and block of keys of a step."""
    return b, steps.column_of(_word(plan, shape, words_ref, b, p, n)[0])


def _kernel(plan: DecodePlan, shape, words_ref, refs, rows) -> None:
    b, p, n = (pl.program_id(axis) for axis in range(3))
    word, exists = _word(plan, shape, words_ref, b, p, n)

    @pl.when(n == 0)
    def _():
        least = tile_math.start_of_max(plan.request.spec.weight_map)
        for name, ref in rows.items():
            ref[...] = jnp.full(ref.shape, least if name == "top" else 0.0, ref.dtype)

    for wanted in (steps.FULL, steps.PARTIAL):

        @pl.when(exists & (steps.kind_of(word) == wanted))
        def _(masked=wanted == steps.PARTIAL):
            _absorb(plan, b, steps.column_of(word), refs, rows, masked)


def _absorb(plan: DecodePlan, b, j, refs, rows, masked: bool) -> None:
    """Add a block of the cache to the rows."""
    request, spec = plan.request, plan.request.spec
    tile, own, exists = decode_plan.read_tile(plan, refs["operands"], b, j)
    k, v = refs["k"][...], refs["v"][...]
    conditions = [own]
    if masked:
        conditions.append(tiles.visible(spec, tile))
        if request.kv_len % plan.block:
            conditions.append(exists)
            k, v = (_without_rest(plan, x, j) for x in (k, v))
    mask = None
    for condition in (x for x in conditions if x is not None):
        mask = condition if mask is None else mask & condition
    raw = dot(refs["q"][...], k, LAST_AXES) * request.scale
    if mask is not None:
        mask = jnp.broadcast_to(mask, raw.shape)
    s = tile_math.masked_scores(spec, raw, tile, mask)
    accumulate(spec, s, mask, v, rows)


def _without_rest(plan: DecodePlan, x: jax.Array, j) -> jax.Array:
    """Zeros for what the last block holds beyond the cache: that may be anything."""
    row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0) + j * x.shape[0]
    inside = row < plan.request.kv_len * plan.request.num_kv_heads
    return jnp.where(inside, x.astype(jnp.float32), 0).astype(x.dtype)


def _join(request: Request, parts: Arrays, operands: Arrays):
    """Output [B, T, H, E], float32, and log-sum [B, T, H] or None, of all parts."""
    parts = dict(parts)
    top = parts.get("top")
    high = None if top is None else top.max(axis=1)
    if high is not None:
        fade = jnp.exp(parts.pop("top") - high[:, None])
        parts = {name: x * fade for name, x in parts.items()}
    sums = {name: x.sum(axis=1) for name, x in parts.items()}

    def heads_first(x):
        if x is None:
            return None
        shape = (request.batch, request.q_len, request.num_heads, x.shape[-1])
        return tiles.heads_first(x.reshape(shape))

    carry = [heads_first(x) for x in (sums["acc"], high, sums.get("total"))]
    out, lse = blocked_forward.finish(request.spec, carry, operands)
    out = tiles.heads_first(out)
    return out, None if lse is None else tiles.heads_first(lse)[..., 0]
