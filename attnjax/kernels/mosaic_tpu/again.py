"""A second pass over the keys, for rows whose finished weights are taken once more.

Forward, a first kernel collects each row's sum and largest weight; a second adds up
b v and b, b the weights after `reweight`. Backward, a first kernel collects the
cotangent of each row's sum, and the ordinary ones follow (see blocked_reweight.py for
the formulas).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attnjax.kernels import tile_math
from attnjax.kernels.mosaic_tpu import finish, layout
from attnjax.kernels.mosaic_tpu.call import Walk, call
from attnjax.kernels.mosaic_tpu.forward import (
    PRODUCT,
    dot,
    row_results,
    tile_scores,
)
from attnjax.kernels.spec import AttentionSpec

Arrays = Mapping[str, jax.Array]


def finished(spec: AttentionSpec, s: jax.Array, mask, shift):
    """Numerators u, the factor that makes weights of them (None for 1), and what their
    exponentials were shifted by.

    Args:
        shift: the rows' log-sums, 0 for rows that see nothing; None without a sum.
    """
    weight_map, factor = spec.weight_map, None
    if weight_map.needs_sum and not weight_map.exponential:
        factor, shift = jnp.exp(-shift), None
    u = tile_math.keep(weight_map, mask, weight_map.unnormalized(s, shift))
    return u, factor, shift


def statistics(walk: Walk, inputs) -> dict[str, jax.Array]:
    """By name [B, H, 1, T]: "peak", a row's largest weight, and where the weight map
    has a sum "lse", its log.

    Args:
        inputs: q, k and operands as for `forward.forward`.
    """
    plan, request = walk.plan, walk.plan.request
    b, h, t, d = inputs["q"].shape
    names = ["peak", *(["lse"] if request.spec.weight_map.needs_sum else [])]
    scratch = {"peak": (plan.block_q, 1)}
    scratch |= {"total": (plan.block_q, 1)} if "lse" in names else {}
    scratch |= {"top": (plan.block_q, 1)} if request.spec.weight_map.needs_max else {}
    in_specs = {
        "q": walk.spec((plan.block_q, d), "q"),
        "k": walk.spec((plan.block_k, d), "k"),
        "operands": walk.operand_specs(inputs["operands"]),
    }
    return call(
        walk,
        _statistics,
        {name: inputs[name] for name in in_specs},
        in_specs,
        {name: jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32) for name in names},
        {name: walk.spec((1, plan.block_q), "t") for name in names},
        scratch,
        features=d,
    )


def _statistics(walk: Walk, words_ref, refs, outputs, rows) -> None:
    place, kind, first, last = walk.here(words_ref)
    spec = walk.plan.request.spec

    @pl.when(first)
    def _():
        least = tile_math.start_of_max(spec.weight_map)
        for name, ref in rows.items():
            ref[...] = jnp.full(ref.shape, least if name == "top" else 0.0, ref.dtype)

    def body(masked):
        _, s, mask = tile_scores(walk.plan, place, refs, masked)
        top = fade = None
        if "top" in rows:
            old = rows["top"][...]
            top = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
            rows["top"][...] = top
            fade = jnp.exp(old - top)
        shift = tile_math.shift_of(spec.weight_map, top)
        u, summed = tile_math.weigh(spec.weight_map, s, shift, mask)
        kept = {name: rows[name][...] for name in rows if name != "top"}
        if fade is not None:
            kept = {name: x * fade for name, x in kept.items()}
        peak = jnp.max(u, axis=1, keepdims=True)
        rows["peak"][...] = jnp.maximum(kept["peak"], peak)
        if "total" in rows:
            total = jnp.sum(summed, axis=1, keepdims=True)
            rows["total"][...] = kept["total"] + total

    walk.visit(kind, body)

    @pl.when(last)
    def _():
        peak = rows["peak"][...]
        if "total" in rows:
            factor, lse = row_results(walk.plan, place, refs, rows)
            peak = peak * factor
            outputs["lse"][...] = layout.turn(lse)
        outputs["peak"][...] = layout.turn(peak)


def forward(walk: Walk, inputs, out_dtype, *, keep_core: bool):
    """As `forward.forward`, without "lse"; by name also "unit" [B, H, 1, T], 1 over
    the sum of b, where `reweight` has a sum.

    Args:
        inputs: with "peak", and "shift" where the weight map has a sum.
    """
    plan, request = walk.plan, walk.plan.request
    d, e = request.head_dim, request.value_dim
    b, h, t, _ = inputs["q"].shape
    outputs = {"out": jax.ShapeDtypeStruct((b, h, t, e), out_dtype)}
    out_specs = {"out": walk.spec((plan.block_q, e), "q")}
    scratch = {"acc": (plan.block_q, e)}
    if keep_core:
        outputs["core"], out_specs["core"] = outputs["out"], out_specs["out"]
    if request.spec.reweight.needs_sum:
        outputs["unit"] = jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32)
        out_specs["unit"] = walk.spec((1, plan.block_q), "t")
        scratch["total"] = (plan.block_q, 1)
    in_specs = {
        "q": walk.spec((plan.block_q, d), "q"),
        "k": walk.spec((plan.block_k, d), "k"),
        "v": walk.spec((plan.block_k, e), "k"),
        "operands": walk.operand_specs(inputs["operands"]),
        "late": finish.specs(walk, inputs["late"]),
    }
    rows = ("peak", "shift")
    in_specs |= {n: walk.spec((1, plan.block_q), "t") for n in rows if n in inputs}
    return call(
        walk, _again, inputs, in_specs, outputs, out_specs, scratch, features=d + e
    )


def _again(walk: Walk, words_ref, refs, outputs, rows) -> None:
    place, kind, first, last = walk.here(words_ref)
    spec = walk.plan.request.spec

    @pl.when(first)
    def _():
        for ref in rows.values():
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def body(masked):
        tile, s, mask = tile_scores(walk.plan, place, refs, masked)
        shift = layout.turn(refs["shift"][...]) if "shift" in refs else None
        u, factor, _ = finished(spec, s, mask, shift)
        p = u if factor is None else u * factor
        b = spec.reweight.apply(p, layout.turn(refs["peak"][...]), tile)
        v = refs["v"][...]
        rows["acc"][...] += dot(b.astype(v.dtype), v, PRODUCT)
        if "total" in rows:
            rows["total"][...] += jnp.sum(b, axis=1, keepdims=True)

    walk.visit(kind, body)
    pl.when(last)(lambda: _finish(walk, place, refs, outputs, rows))


def _finish(walk: Walk, place, refs, outputs, rows) -> None:
    """Write the rows."""
    plan, acc = walk.plan, rows["acc"][...]
    if "total" in rows:
        tile = layout.read_tile(plan, refs["operands"], place, swapped=False)
        peak = layout.turn(refs["peak"][...])
        total = rows["total"][...] + plan.request.spec.reweight.extra(peak, tile)
        some = total > 0
        unit = jnp.where(some, 1 / jnp.where(some, total, 1), 0)
        acc = acc * unit
        outputs["unit"][...] = layout.turn(unit)
    if "core" in outputs:
        outputs["core"][...] = acc.astype(outputs["core"].dtype)
    found = finish.apply(plan, acc, refs["late"], place)
    outputs["out"][...] = found.astype(outputs["out"].dtype)
