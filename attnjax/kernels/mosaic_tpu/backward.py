"""The backward kernels: weights are computed again from the rows' log-sums.

One kernel walks over keys and gathers dq, one walks over queries and gathers dk and dv;
a third runs only for score operands that vary over both (a bias). Gradients of the
other operands are sums over rows or columns of what the first two compute anyway.
Nothing is added across grid steps but in VMEM, in a fixed order: results repeat bit
for bit.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attnjax.kernels import look_ups, tile_math
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.mosaic_tpu import again, layout, tables
from attnjax.kernels.mosaic_tpu.call import Walk, call, quotient, remainder
from attnjax.kernels.mosaic_tpu.forward import LAST_AXES, PRODUCT, dot, tile_scores

Arrays = Mapping[str, jax.Array]


def trained_names(plan: BlockPlan, *forms: str) -> list[str]:
    """Score operands of some forms: each has a gradient."""
    known = layout.operand_forms(plan)
    return [o.name for o in plan.request.spec.score_operands if known[o.name] in forms]


def query_gradients(walk: Walk, inputs: Arrays):
    """dq [B, H, T, D] float32 and, by name, [B, H, 1, T] of row and scalar operands and
    [B, H, R, L] of diagonals.

    Args:
        inputs: q, k, v and d_out, padded; [B, H, 1, T] shift and d_sum where the
            weight map has a sum, and peak, unit and delta where `reweight` needs
            them; and the arranged operands.
    """
    plan = walk.plan
    b, h, t, d = inputs["q"].shape
    names = trained_names(plan, "row", "scalar")
    known = inputs["operands"]
    lines = {n: known[n].shape[2:] for n in trained_names(plan, "diagonals")}
    outputs = {"q": jax.ShapeDtypeStruct((b, h, t, d), jnp.float32)}
    outputs |= {n: jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32) for n in names}
    out_specs = {"q": walk.spec((plan.block_q, d), "q")}
    out_specs |= {name: walk.spec((1, plan.block_q), "t") for name in names}
    for name, size in lines.items():
        outputs[name] = jax.ShapeDtypeStruct((b, h, *size), jnp.float32)
        out_specs[name] = pl.BlockSpec((None, None, *size), _of_head)
    scratch = {"q": (plan.block_q, d)} | {name: (plan.block_q, 1) for name in names}
    features = 2 * d + plan.request.value_dim
    found = call(
        walk,
        _query_gradients,
        inputs,
        _input_specs(walk, inputs),
        outputs,
        out_specs,
        scratch,
        features,
    )
    return found.pop("q"), found


def _of_head(b, h, *_):
    return (b, h, 0, 0)


def _input_specs(walk: Walk, inputs: Arrays):
    plan, request = walk.plan, walk.plan.request
    sizes = {
        "q": ((plan.block_q, request.head_dim), "q"),
        "d_out": ((plan.block_q, request.value_dim), "q"),
        "k": ((plan.block_k, request.head_dim), "k"),
        "v": ((plan.block_k, request.value_dim), "k"),
    }
    names = ("shift", "d_sum", "peak", "unit", "delta")
    sizes |= dict.fromkeys(names, ((1, plan.block_q), "t"))
    specs = {name: walk.spec(*sizes[name]) for name in inputs if name != "operands"}
    return specs | {"operands": walk.operand_specs(inputs["operands"])}


def _query_gradients(walk: Walk, words_ref, refs, outputs, scratch) -> None:
    place, kind, first, last = walk.here(words_ref)
    lines = {n: outputs[n] for n in trained_names(walk.plan, "diagonals")}
    pl.when(first)(lambda: _clear(scratch))
    if lines:
        pl.when(pl.program_id(2) == 0)(lambda: _clear(lines))

    def body(masked):
        _, d_raw, spread = _tile_gradients(
            walk.plan, place, refs, masked=masked, swapped=False
        )
        k = refs["k"][...]
        scratch["q"][...] += dot(d_raw.astype(k.dtype), k, PRODUCT)
        for name in trained_names(walk.plan, "row", "scalar"):
            scratch[name][...] += jnp.sum(spread[name], axis=1, keepdims=True)
        for name, ref in lines.items():
            tables.add_diagonals(walk.plan, spread[name], ref, place)

    walk.visit(kind, body)

    @pl.when(last)
    def _():
        outputs["q"][...] = scratch["q"][...] * walk.plan.request.scale
        for name in trained_names(walk.plan, "row", "scalar"):
            outputs[name][...] = layout.turn(scratch[name][...])


def key_gradients(walk: Walk, inputs: Arrays):
    """dk [B, K, S, D], dv [B, K, S, E], float32, and, by name, [B, K, G, 1, S] of
    column operands, G query heads to a key/value head."""
    plan, group = walk.plan, walk.group
    b, heads, s, d = inputs["k"].shape
    e = plan.request.value_dim
    names = trained_names(plan, "column")
    sizes = {"k": (b, heads, s, d), "v": (b, heads, s, e)}
    sizes |= {name: (b, heads, group, 1, s) for name in names}

    def vectors(*grid):
        at = walk.place(*grid)
        return (at.b, quotient(at.h, group), 0, 0, at.j)

    out_specs = {
        "k": walk.spec((plan.block_k, d), "k"),
        "v": walk.spec((plan.block_k, e), "k"),
    } | {
        name: pl.BlockSpec((None, None, group, 1, plan.block_k), vectors)
        for name in names
    }
    scratch = {"k": (plan.block_k, d), "v": (plan.block_k, e)}
    scratch |= {name: (group, plan.block_k, 1) for name in names}
    found = call(
        walk,
        _key_gradients,
        inputs,
        _input_specs(walk, inputs),
        {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in sizes.items()},
        out_specs,
        scratch,
        features=2 * (d + e),
    )
    return found.pop("k"), found.pop("v"), found


def _key_gradients(walk: Walk, words_ref, refs, outputs, scratch) -> None:
    place, kind, first, last = walk.here(words_ref)
    names = trained_names(walk.plan, "column")
    pl.when(first)(lambda: _clear(scratch))

    def body(masked):
        weights, d_raw, spread = _tile_gradients(
            walk.plan, place, refs, masked=masked, swapped=True
        )
        q, d_out = refs["q"][...], refs["d_out"][...]
        scratch["v"][...] += dot(weights.astype(d_out.dtype), d_out, PRODUCT)
        scratch["k"][...] += dot(d_raw.astype(q.dtype), q, PRODUCT)
        head = remainder(place.h, walk.group)
        for name in names:
            scratch[name][head] += jnp.sum(spread[name], axis=1, keepdims=True)

    walk.visit(kind, body)

    @pl.when(last)
    def _():
        outputs["k"][...] = scratch["k"][...] * walk.plan.request.scale
        outputs["v"][...] = scratch["v"][...]
        for name in names:
            for head in range(walk.group):
                outputs[name][head] = layout.turn(scratch[name][head])


def tile_gradient(walk: Walk, inputs: Arrays, name: str) -> jax.Array:
    """The gradient of an arranged operand that varies over queries and keys."""
    plan = walk.plan
    array = inputs["operands"][name]

    found = call(
        walk,
        _tile_gradient,
        inputs,
        _input_specs(walk, inputs),
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype)},
        {name: walk.operand_specs(inputs["operands"])[name]},
        {name: (plan.block_q, plan.block_k)},
        features=plan.request.head_dim + plan.request.value_dim,
    )
    return found[name]


def _tile_gradient(walk: Walk, words_ref, refs, outputs, scratch) -> None:
    place, kind, first, last = walk.here(words_ref)
    ((name, total),) = scratch.items()
    pl.when(first)(lambda: _clear(scratch))

    def body(masked):
        *_, spread = _tile_gradients(
            walk.plan, place, refs, masked=masked, swapped=False
        )
        total[...] += spread[name]

    walk.visit(kind, body)

    @pl.when(last)
    def _():
        outputs[name][...] = total[...].astype(outputs[name].dtype)


def _clear(scratch) -> None:
    for ref in scratch.values():
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _tile_gradients(plan: BlockPlan, place, refs, *, masked: bool, swapped: bool):
    """Weights of a tile, cotangent of its scaled products, and, by name, cotangents of
    the score operands spread over the tile.

    Args:
        swapped: tiles are [block_k, block_q], so that each product takes its inputs
            as they lie.
    """
    request, spec = plan.request, look_ups.inside(plan.request.spec)
    weight_map = spec.weight_map
    pairs = [(refs["q"][...], refs["k"][...]), (refs["d_out"][...], refs["v"][...])]
    raw, dp = (dot(*(p[::-1] if swapped else p), LAST_AXES) for p in pairs)
    raw = raw * request.scale
    tile = layout.read_tile(plan, refs["operands"], place, swapped=swapped)
    mask = layout.visible(plan, tile, place, swapped=swapped) if masked else None
    s = tile_math.masked_scores(spec, raw, tile, mask)
    rows = {
        name: refs[name][...] if swapped else layout.turn(refs[name][...])
        for name in ("shift", "d_sum", "peak", "unit", "delta")
        if name in refs
    }
    u, factor, shift = again.finished(spec, s, mask, rows.get("shift"))
    weights = u if factor is None else u * factor
    if spec.reweight is not None:
        weights, dp = _taken_again(spec.reweight, weights, dp, rows, tile)
    ds = tile_math.score_cotangent(
        weight_map, s, u, shift, mask, (dp, rows.get("d_sum"))
    )
    ds = ds if factor is None else ds * factor
    d_raw, spread = tile_math.score_gradients(spec, raw, ds, tile, mask)
    return weights, d_raw, spread


def _taken_again(reweight, p: jax.Array, dp: jax.Array, rows: Arrays, tile):
    """b and the cotangent of p, from p and the cotangent of b."""
    b = reweight.apply(p, rows["peak"], tile)
    slope = reweight.slope(p, rows["peak"], tile)
    if "unit" in rows:
        b, dp = b * rows["unit"], (dp - rows["delta"]) * rows["unit"]
    return b, slope * dp


def sum_cotangents(walk: Walk, inputs: Arrays) -> jax.Array:
    """[B, H, 1, T]: with `reweight`, the cotangent of the log of a row's sum."""
    plan = walk.plan
    b, h, t, d = inputs["q"].shape
    found = call(
        walk,
        _sum_cotangents,
        inputs,
        _input_specs(walk, inputs),
        {"d_sum": jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32)},
        {"d_sum": walk.spec((1, plan.block_q), "t")},
        {"d_sum": (plan.block_q, 1)},
        features=d + plan.request.value_dim,
    )
    return found["d_sum"]


def _sum_cotangents(walk: Walk, words_ref, refs, outputs, scratch) -> None:
    place, kind, first, last = walk.here(words_ref)
    spec = walk.plan.request.spec
    pl.when(first)(lambda: _clear(scratch))

    def body(masked):
        tile, s, mask = tile_scores(walk.plan, place, refs, masked)
        rows = {
            name: layout.turn(refs[name][...])
            for name in ("shift", "peak", "unit", "delta")
            if name in refs
        }
        u, factor, _ = again.finished(spec, s, mask, rows["shift"])
        p = u if factor is None else u * factor
        dp = dot(refs["d_out"][...], refs["v"][...], LAST_AXES)
        _, dp = _taken_again(spec.reweight, p, dp, rows, tile)
        scratch["d_sum"][...] -= jnp.sum(p * dp, axis=1, keepdims=True)

    walk.visit(kind, body)

    @pl.when(last)
    def _():
        outputs["d_sum"][...] = layout.turn(scratch["d_sum"][...])
