"""The forward kernel: one block of queries, a walk over the keys that it sees.

    s = scores(scale * q k^T)                     [block_q, block_k], float32
    top' = max(top, rowmax s)                     where the weight map needs a maximum
    acc' = exp(top - top') acc + u(s - top') v    [block_q, E], float32
The output is normalised and the log-sum written when a row of steps ends.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attnjax.kernels import look_ups, tile_math
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.mosaic_tpu import finish, layout
from attnjax.kernels.mosaic_tpu.call import Walk, call
from attnjax.kernels.spec import AttentionSpec

# Contractions of 2-D blocks: over both last axes, and of an ordinary product.
LAST_AXES, PRODUCT = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


def dot(x: jax.Array, y: jax.Array, dims) -> jax.Array:
    """A product accumulated in float32, of float32 inputs at full precision."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        dims,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def forward(walk: Walk, inputs, out_dtype, *, keep_core: bool):
    """By name, padded: "out" [B, H, T, E]; "lse" [B, H, 1, T] where something is
    summed; "core", the output before the epilogue, where it is to be kept.

    Args:
        inputs: q [B, H, T, D], k [B, K, S, D] and v [B, K, S, E], padded, of one
            dtype; "operands" as `layout.arrange_operands` gives them and "late" as
            `finish.arrange` does.
    """
    plan, request = walk.plan, walk.plan.request
    weight_map = request.spec.weight_map
    d, e = request.head_dim, request.value_dim
    b, h, t, _ = inputs["q"].shape
    outputs = {"out": jax.ShapeDtypeStruct((b, h, t, e), out_dtype)}
    out_specs = {"out": walk.spec((plan.block_q, e), "q")}
    scratch = {"acc": (plan.block_q, e)}
    if keep_core:
        outputs["core"], out_specs["core"] = outputs["out"], out_specs["out"]
    if weight_map.needs_sum:
        outputs["lse"] = jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32)
        out_specs["lse"] = walk.spec((1, plan.block_q), "t")
        scratch["total"] = (plan.block_q, 1)
    if weight_map.needs_max:
        scratch["top"] = (plan.block_q, 1)
    in_specs = {
        "q": walk.spec((plan.block_q, d), "q"),
        "k": walk.spec((plan.block_k, d), "k"),
        "v": walk.spec((plan.block_k, e), "k"),
        "operands": walk.operand_specs(inputs["operands"]),
        "late": finish.specs(walk, inputs["late"]),
    }
    return call(
        walk, _forward, inputs, in_specs, outputs, out_specs, scratch, features=d + e
    )


def _forward(walk: Walk, words_ref, refs, outputs, scratch) -> None:
    place, kind, first, last = walk.here(words_ref)

    @pl.when(first)
    def _():
        least = tile_math.start_of_max(walk.plan.request.spec.weight_map)
        for name, ref in scratch.items():
            ref[...] = jnp.full(ref.shape, least if name == "top" else 0.0, ref.dtype)

    walk.visit(kind, lambda masked: _absorb(walk.plan, place, refs, scratch, masked))
    pl.when(last)(lambda: _finish(walk.plan, place, refs, outputs, scratch))


def _absorb(plan: BlockPlan, place, refs, scratch, masked: bool) -> None:
    """Add one tile to the running rows."""
    _, s, mask = tile_scores(plan, place, refs, masked)
    accumulate(plan.request.spec, s, mask, refs["v"][...], scratch)


def tile_scores(plan: BlockPlan, place, refs, masked: bool):
    """A tile [block_q, block_k], its scores, and its mask or None."""
    raw = dot(refs["q"][...], refs["k"][...], LAST_AXES) * plan.request.scale
    tile = layout.read_tile(plan, refs["operands"], place, swapped=False)
    mask = layout.visible(plan, tile, place, swapped=False) if masked else None
    spec = look_ups.inside(plan.request.spec)
    return tile, tile_math.masked_scores(spec, raw, tile, mask), mask


def accumulate(spec: AttentionSpec, s: jax.Array, mask, v: jax.Array, rows) -> None:
    """Add a tile of scores to running rows.

    Args:
        rows: refs "acc", and "top" and "total" where the weight map has them.
    """
    acc, top, fade = rows["acc"][...], None, None
    if "top" in rows:
        old = rows["top"][...]
        top = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
        rows["top"][...] = top
        fade = jnp.exp(old - top)
        acc = acc * fade
    shift = tile_math.shift_of(spec.weight_map, top)
    u, summed = tile_math.weigh(spec.weight_map, s, shift, mask)
    if "total" in rows:
        total = rows["total"][...]
        total = total if fade is None else total * fade
        rows["total"][...] = total + jnp.sum(summed, axis=1, keepdims=True)
    rows["acc"][...] = acc + dot(u.astype(v.dtype), v, PRODUCT)


def _finish(plan: BlockPlan, place, refs, outputs, scratch) -> None:
    """Write the rows and their log-sums."""
    acc = scratch["acc"][...]
    if "total" in scratch:
        factor, lse = row_results(plan, place, refs, scratch)
        acc = acc * factor
        outputs["lse"][...] = layout.turn(lse)
    if "core" in outputs:
        outputs["core"][...] = acc.astype(outputs["core"].dtype)
    rows = finish.apply(plan, acc, refs["late"], place)
    outputs["out"][...] = rows.astype(outputs["out"].dtype)


def row_results(plan: BlockPlan, place, refs, rows):
    """The factor from numerators to weights and the log-sum, [block_q, 1].

    Args:
        rows: refs "total", and "top" where the weight map needs a maximum.
    """
    spec = plan.request.spec
    tile = layout.read_tile(plan, refs["operands"], place, swapped=False)
    sink = tile_math.sink_column(spec, tile.operands, jnp.float32)
    sink = None if sink is None else sink.reshape(1, 1)
    top = rows["top"][...] if "top" in rows else None
    shift = tile_math.shift_of(spec.weight_map, top)
    return tile_math.row_results(shift, rows["total"][...], sink)
