"""The computation with its derivative: kernels put together by a custom VJP."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import epilogue, tile_math, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.mosaic_tpu import again, backward, finish, layout, steps, tables
from attnjax.kernels.mosaic_tpu.blocks import plan_blocks
from attnjax.kernels.mosaic_tpu.call import Walk
from attnjax.kernels.mosaic_tpu.forward import forward
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]


def attend(
    request: Request, q, k, v, operands: Arrays, *, block_sizes=None, interpret=False
) -> tuple[jax.Array, jax.Array | None]:
    """Output [B, T, H, E] in q's dtype, and log-sum-exp [B, T, H] if normalised."""
    spec = request.spec
    plan = plan_blocks(request, block_sizes)
    placed = tiles.place_queries(tiles.of_tiles(spec, operands), request.q_len)
    known = tiles.declarations(spec)
    trained = {n: x for n, x in placed.items() if known[n].trains}
    fixed = {n: x for n, x in placed.items() if not known[n].trains}
    late = {operand.name: operands[operand.name] for operand in spec.epilogue_operands}
    return _attend(plan, interpret, q, k, v, trained, fixed, late)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: BlockPlan, interpret, q, k, v, trained, fixed, late):
    found, _ = _forward(plan, interpret, (q, k, v), {**trained, **fixed}, late)
    return found["out"], _log_sum(plan, found)


def _log_sum(plan: BlockPlan, found):
    """The log-sums that are given: none of rows that were taken again."""
    return found.get("lse") if plan.request.spec.reweight is None else None


def _attend_fwd(plan: BlockPlan, interpret, q, k, v, trained, fixed, late):
    operands = {**trained, **fixed}
    keep_core = bool(plan.request.spec.epilogue)
    found, kinds = _forward(
        plan, interpret, (q, k, v), operands, late, keep_core=keep_core
    )
    out = found["out"]
    # A constant is made again: a residual would be an array of its own.
    kinds = kinds if isinstance(kinds, jax.Array) else None
    core = found.get("core", out)
    rows = {name: found[name] for name in ("lse", "peak", "unit") if name in found}
    kept = (q, k, v, trained, fixed, late, core, rows, kinds)
    return (out, _log_sum(plan, found)), kept


def _forward(plan: BlockPlan, interpret, qkv, operands, late, *, keep_core=False):
    """What the kernels give, in the caller's layout, and the kinds of tiles."""
    kinds = steps.tile_kinds(plan, operands)
    walk = Walk(plan, steps.list_steps(kinds), interpret=interpret)
    inputs = dict(zip("qkv", _heads(plan, *qkv), strict=True))
    inputs["operands"] = layout.arrange_operands(plan, operands)
    late = finish.arrange(plan, late)
    if plan.request.spec.reweight is None:
        found = forward(
            walk, inputs | {"late": late}, qkv[0].dtype, keep_core=keep_core
        )
    else:
        found = again.statistics(walk, inputs)
        given = inputs | {"late": late, "peak": found["peak"]}
        if "lse" in found:
            given["shift"] = _finite(found["lse"])
        found |= again.forward(walk, given, qkv[0].dtype, keep_core=keep_core)
    length = plan.request.q_len
    joined = {
        name: tiles.heads_first(x)[:, :length]
        if name in ("out", "core")
        else jnp.swapaxes(x[:, :, 0, :length], 1, 2)
        for name, x in found.items()
    }
    return joined, kinds


def _finite(lse: jax.Array) -> jax.Array:
    """The shift of a row's scores. Rows that see nothing: exp(LOW - 0) is 0, exp(LOW -
    (-inf)) would not be."""
    return jnp.where(lse == -jnp.inf, 0, lse)


def _heads(plan: BlockPlan, q, k, v):
    """q, k and v heads first, padded to whole blocks, in the dtype of products."""
    narrow = set(plan.request.dtypes) == {"bfloat16"}
    dtype = jnp.bfloat16 if narrow else jnp.float32
    q_len, kv_len = plan.num_q * plan.block_q, plan.num_k * plan.block_k
    lengths = (q_len, kv_len, kv_len)
    pairs = zip((q, k, v), lengths, strict=True)
    return [layout.blocked_heads(x.astype(dtype), length) for x, length in pairs]


def _attend_bwd(plan: BlockPlan, interpret, residuals, cotangents):
    q, k, v, trained, fixed, late, core, rows, kinds = residuals
    operands = {**trained, **fixed}
    kinds = steps.tile_kinds(plan, operands) if kinds is None else kinds
    inputs = dict(zip("qkv", _heads(plan, q, k, v), strict=True))
    d_out, d_late = _through_epilogue(plan, core, late, cotangents[0])
    # Rounded once: what is subtracted from its products must be made of the same.
    d_out = d_out.astype(inputs["q"].dtype)
    walk = Walk(plan, steps.list_steps(kinds), interpret=interpret)
    q_len = plan.num_q * plan.block_q
    inputs["d_out"] = layout.blocked_heads(d_out, q_len)
    inputs["operands"] = layout.arrange_operands(plan, operands)
    if plan.request.spec.reweight is None:
        stats = _row_statistics(plan, core, rows, (d_out, cotangents[1]))
    else:
        stats = _again_statistics(walk, core, rows, d_out, inputs)
    inputs |= {name: layout.row_vectors(x, q_len) for name, x in stats.items()}
    grads = _map_gradient(plan, operands, rows, stats)

    turned = dataclasses.replace(
        walk,
        words=steps.list_steps(steps.by_keys(plan, kinds)),
        over="keys",
        pairs=kinds.shape[1] > 1,
    )
    dq, by_rows = backward.query_gradients(walk, inputs)
    dk, dv, columns = backward.key_gradients(turned, inputs)
    for name, x in (by_rows | columns).items():
        grads[name] = _join(plan, name, x, operands)
    for name in backward.trained_names(plan, "tile"):
        grads[name] = _tile_gradient(walk, kinds, inputs, name, operands)
    lengths = (plan.request.q_len, plan.request.kv_len, plan.request.kv_len)
    joined = (
        tiles.heads_first(x)[:, :length].astype(like.dtype)
        for x, length, like in zip((dq, dk, dv), lengths, (q, k, v), strict=True)
    )
    d_trained = {name: grads[name].astype(x.dtype) for name, x in trained.items()}
    return (*joined, d_trained, None, d_late)


def _through_epilogue(plan: BlockPlan, core, late: Arrays, d_out):
    """Cotangents of the rows before the epilogue, float32, and of its operands."""
    steps_after = plan.request.spec.epilogue
    if not steps_after:
        return d_out, {}

    def after(core, late):
        return epilogue.run_steps(steps_after, core, late)

    _, pull = jax.vjp(after, core.astype(jnp.float32), late)
    return pull(d_out.astype(jnp.float32))


def _row_statistics(plan: BlockPlan, core, rows: Arrays, cotangents):
    """By name [B, T, H]: the shift of a row's scores, the cotangent of its log-sum."""
    if not plan.request.spec.weight_map.needs_sum:
        return {}
    d_out, d_lse = (x.astype(jnp.float32) for x in cotangents)
    d_sum = d_lse - jnp.sum(d_out * core.astype(jnp.float32), axis=-1)
    return {"shift": _finite(rows["lse"]), "d_sum": d_sum}


def _again_statistics(walk: Walk, core, rows: Arrays, d_out, inputs):
    """The same for rows that were taken again, and what of them is needed beside."""
    spec, length = walk.plan.request.spec, walk.plan.request.q_len
    stats = {name: x for name, x in rows.items() if name != "lse"}
    if "unit" in stats:
        products = d_out.astype(jnp.float32) * core.astype(jnp.float32)
        stats["delta"] = jnp.sum(products, axis=-1)
    if not spec.weight_map.needs_sum:
        return stats
    stats["shift"] = _finite(rows["lse"])
    q_len = inputs["q"].shape[2]
    given = {name: layout.row_vectors(x, q_len) for name, x in stats.items()}
    d_sum = backward.sum_cotangents(walk, inputs | given)[:, :, 0, :length]
    return stats | {"d_sum": jnp.swapaxes(d_sum, 1, 2)}


def _map_gradient(plan: BlockPlan, operands: Arrays, rows: Arrays, stats: Arrays):
    """The gradient of the weight map's own operand."""
    if "d_sum" not in stats:
        return {}
    pair = (rows["lse"], stats["d_sum"])
    columns = (jnp.swapaxes(x, 1, 2)[..., None] for x in pair)
    return tile_math.sink_gradient(plan.request.spec, operands, *columns)


def _join(plan: BlockPlan, name: str, x: jax.Array, operands: Arrays) -> jax.Array:
    """[B, H, 1, T], [B, K, G, 1, S] or [B, H, R, L], summed over rows and heads that
    share a value, in the operand's own shape."""
    if layout.operand_forms(plan)[name] == "diagonals":
        return _join_diagonals(plan, name, x, operands)
    x = x.reshape(x.shape[0], -1, 1, x.shape[-1])
    operand = tiles.declarations(plan.request.spec)[name]
    shape = operands[name].shape
    sizes = dict(zip(operand.axes, shape, strict=True))
    shared = [axis for axis, letter in enumerate("bh") if sizes.get(letter, 1) == 1]
    x = jnp.sum(x, axis=tuple(shared), keepdims=True)
    form = layout.operand_forms(plan)[name]
    if form == "scalar":
        return jnp.sum(x, axis=3).reshape(shape)
    return x[..., : sizes["t" if form == "row" else "s"]].reshape(shape)


def _join_diagonals(plan: BlockPlan, name: str, x: jax.Array, operands: Arrays):
    """[B, H, R, L] along falling distances to the table's own shape."""

    def arrange(table):
        return tables.arrange_diagonals(plan, name, table, operands)

    like, pull = jax.vjp(arrange, operands[name].astype(jnp.float32))
    shared = tuple(axis for axis in (0, 1) if like.shape[axis] == 1)
    return pull(jnp.sum(x, axis=shared, keepdims=True))[0]


def _tile_gradient(walk: Walk, kinds, inputs, name: str, operands: Arrays):
    """The gradient of a bias, in its own shape."""
    array = inputs["operands"][name]
    shares = (array.shape[0] == 1, array.shape[1] == 1)
    walk = dataclasses.replace(
        walk, words=steps.list_tiles(kinds), over="tiles", shares=shares
    )
    grad = backward.tile_gradient(walk, inputs, name)
    t, s = operands[name].shape[2:]
    return grad[:, :, :t, :s]


_attend.defvjp(_attend_fwd, _attend_bwd)
