"""The kernels as one differentiable function: padding, residuals, gradients."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import epilogue, fold, tile_math, tiles
from attnjax.kernels.mosaic_gpu import (
    again,
    backward,
    by_blocks,
    decode,
    distances,
    finish,
    forward,
    hooks,
    rows,
    steps,
    table,
)
from attnjax.kernels.mosaic_gpu.block import Plan
from attnjax.kernels.mosaic_gpu.tiles import (
    BLOCK,
    ROWS,
    Tiles,
    backward_tiles,
    diagonal_tiles,
    forward_tiles,
    joint_dkv,
    padded_dim,
)
from attnjax.kernels.operands import as_rank4
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static argument of the derivative rule.

    Attributes:
        request: the call.
        interpret: what `plgpu.kernel` takes to interpret, or None to compile.
        forward_tiles, backward_tiles: sizes; None chooses by head dimensions.
    """

    request: Request
    interpret: object = None
    forward_tiles: Tiles | None = None
    backward_tiles: Tiles | None = None

    @property
    def dims(self) -> tuple[int, int]:
        """D and E as the kernels see them."""
        return padded_dim(self.request.head_dim), padded_dim(self.request.value_dim)

    def plan(self, kernel: str, operands: Arrays, *, late: bool = True):
        """Plan of "forward", "dq", "dkv", "dk" or "dv", with the arrays that its steps
        and hooks take, with `late` those of a forward kernel's epilogue included."""
        narrow = by_blocks.narrow(self.request.spec.mask)
        if kernel == "forward":
            chosen = forward_tiles(*self.dims, narrow=narrow)
            sizes = self.forward_tiles or chosen
        else:
            sizes = self.backward_tiles or backward_tiles(*self.dims)
        if narrow and sizes.step != ROWS:
            raise ValueError(
                f"Tiles: step must be {ROWS} for blocks that are not multiples of "
                f"{BLOCK} keys; got {sizes.step}."
            )
        if kernel in ("forward", "dq"):
            grid = steps.Grid(self.request, BLOCK, sizes.step)
        else:
            grid = steps.Grid(self.request, sizes.step, BLOCK, transposed=True)
        read = tiles.of_tiles(self.request.spec, operands)
        padded = hooks.pad_operands(grid, read)
        found, step_arrays = steps.make_steps(grid, padded)
        held, arrays = hooks.hold(grid, padded)
        count = len(step_arrays)
        held_late = ()
        if late and kernel == "forward" and self.request.spec.epilogue:
            given = (self.request, sizes, grid.q_len, operands)
            held_late, more = finish.hold(*given, jnp.dtype(self.request.dtypes[0]))
            arrays = [*arrays, *more]
        plan = Plan(grid, found, sizes, held, count, self.interpret, held_late)
        return plan, step_arrays, arrays


def attend(call: Call, q, k, v, operands: Arrays):
    """Output [B, T, H, E] in q's dtype, and log-sum [B, T, H] or None."""
    operands = tiles.place_queries(operands, call.request.q_len)
    request = call.request
    request = dataclasses.replace(request, spec=distances.inside(request.spec))
    call = dataclasses.replace(call, request=request)
    known = tiles.declarations(call.request.spec)
    trained = {n: x for n, x in operands.items() if known[n].trains}
    fixed = {n: x for n, x in operands.items() if not known[n].trains}
    return _attend(call, q, k, v, trained, fixed)


def _pad(x: jax.Array) -> jax.Array:
    """[B, T, H, D] to whole blocks of tokens and whole 64s of D, with zeros."""
    tokens = steps.padded_length(x.shape[1]) - x.shape[1]
    width = ((0, 0), (0, tokens), (0, 0), (0, padded_dim(x.shape[3]) - x.shape[3]))
    return jnp.pad(x, width) if tokens or width[3][1] else x


def _pad_rows(x: jax.Array) -> jax.Array:
    """[B, T, H] to float32 [B, H, T], T in whole blocks, with zeros."""
    x = jnp.swapaxes(x, 1, 2).astype(jnp.float32)
    tokens = steps.padded_length(x.shape[2]) - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, 0), (0, tokens))) if tokens else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, q, k, v, trained: Arrays, fixed: Arrays):
    out, lse, _ = _compute(call, q, k, v, {**trained, **fixed}, keep=False)
    return out, _given_back(call, lse)


def _attend_fwd(call: Call, q, k, v, trained: Arrays, fixed: Arrays):
    # An epilogue's derivative needs the rows before it. Written beside the output they
    # cost one more pass over memory; made again they would cost the whole forward pass.
    operands = {**trained, **fixed}
    out, lse, core = _compute(call, q, k, v, operands, keep=True)
    return (out, _given_back(call, lse)), (q, k, v, trained, fixed, core, lse)


def _given_back(call: Call, lse):
    """The log-sum, which rows that are taken again do not have."""
    return lse if call.request.spec.reweight is None else None


def _compute(call: Call, q, k, v, operands: Arrays, *, keep: bool):
    """Output, log-sum or None, and with `keep` the output before the epilogue."""
    request = call.request
    read = tiles.of_tiles(request.spec, operands)
    folded = decode.fold_call(request, (q, k, v), read)
    if folded is None:
        return _run_forward(call, q, k, v, operands, keep=keep)
    part = dataclasses.replace(call, request=folded.request)
    out, lse, _ = _run_forward(part, folded.q, folded.k, folded.v, folded.operands)
    core, lse = fold.unfold(folded, out, lse, operands)
    # Parts of the keys are joined before the epilogue.
    return _with_epilogue(request, core, operands), lse, core


def _with_epilogue(request: Request, core: jax.Array, operands: Arrays) -> jax.Array:
    steps = request.spec.epilogue
    if not steps:
        return core
    out = epilogue.run_steps(steps, core.astype(jnp.float32), operands)
    return out.astype(core.dtype)


def _run_forward(call: Call, q, k, v, operands: Arrays, *, keep: bool = False):
    """Output [B, T, H, E], what is known of rows, and with `keep` the output before
    the epilogue.

    Rows: log-sum [B, T, H] or None; with `reweight` by name [B, H, T], padded.
    """
    request = call.request
    plan, *arrays = call.plan("forward", operands)
    keep = keep and bool(request.spec.epilogue)
    inputs = {"q": _pad(q), "k": _pad(k), "v": _pad(v)}
    if request.spec.reweight is None:
        found = forward.forward(plan, inputs, *arrays, keep=keep)
        lse = found.get("lse")
        if lse is not None:
            lse = jnp.swapaxes(lse[:, :, : request.q_len], 1, 2)
    else:
        first, *more = call.plan("forward", operands, late=False)
        lse = again.statistics(first, inputs["q"], inputs["k"], *more)
        inputs |= _finished_rows(request, lse)
        found = forward.forward(
            plan, inputs, *arrays, keep=keep, kind=again.SecondBlock
        )
        lse |= {name: found[name] for name in ("factor",) if name in found}
    out = found["out"][:, : request.q_len, :, : request.value_dim]
    if "core" not in found:
        return out, lse, out
    return out, lse, found["core"][:, : request.q_len, :, : request.value_dim]


def _finished_rows(request: Request, stats: Arrays) -> dict[str, jax.Array]:
    """What makes weights of a row's scores again: "shift" or "unit", and "peak"."""
    weight_map, found = request.spec.weight_map, {"peak": stats["peak"]}
    if weight_map.needs_sum:
        found |= _shift_or_unit(weight_map, stats["lse"])
    return found


def _shift_or_unit(weight_map, lse: jax.Array) -> dict[str, jax.Array]:
    # Rows that see nothing: exp(LOW - 0) is 0, exp(LOW - (-inf)) would not be.
    shift = jnp.where(lse == -jnp.inf, 0.0, lse)
    if not weight_map.exponential:
        return {"unit": jnp.exp(-shift)}
    return {"shift": shift * rows.LOG2E if rows.in_base2(weight_map) else shift}


def _attend_bwd(call: Call, residuals, cotangents):
    q, k, v, trained, fixed, core, lse = residuals
    request, operands = call.request, {**trained, **fixed}
    cotangents, d_late = _before_epilogue(call, operands, core, cotangents)
    inputs = {"q": q, "k": k, "v": v}
    plan, *arrays = call.plan("dq", operands)
    if request.spec.reweight is None:
        row_arrays, d_trained = _row_arrays(call, operands, core, lse, cotangents)
        inputs["d_out"] = row_arrays.pop("d_out")
        inputs = {name: _pad(x) for name, x in inputs.items()}
        inputs |= {name: _pad_rows(x) for name, x in row_arrays.items()}
    else:
        inputs["d_out"] = cotangents[0]
        inputs = {name: _pad(x) for name, x in inputs.items()}
        rows_again = _rows_again(plan, operands, lse, (inputs, _pad(core)), arrays)
        row_arrays, d_trained = rows_again
        inputs |= row_arrays
    d_trained |= d_late
    d_q, sums, whole = backward.query_gradients(plan, inputs, *arrays)
    d_trained |= _table_gradients(call, plan, inputs, operands, sums)
    for name, x in sums.items():
        x = x[:, :, : request.q_len, None]
        d_trained[name] = _sum_to(x, call, name, trained[name])
    for name, x in whole.items():
        x = _written(plan.grid, operands, x)
        d_trained[name] = _sum_to(x, call, name, trained[name])
    found = {}
    joint = joint_dkv(*call.dims)
    for wanted in [("dk", "dv")] if joint else [("dk",), ("dv",)]:
        plan, *arrays = call.plan("dkv", operands)
        part, sums = backward.key_gradients(plan, inputs, *arrays, wanted=wanted)
        found |= part
        for name, x in sums.items():
            x = x[:, :, None, : request.kv_len]
            d_trained[name] = _sum_to(x, call, name, trained[name])
    d_q = d_q[:, : request.q_len, :, : request.head_dim]
    d_k = found["dk"][:, : request.kv_len, :, : request.head_dim]
    d_v = found["dv"][:, : request.kv_len, :, : request.value_dim]
    d_trained = {n: d_trained[n].astype(x.dtype) for n, x in trained.items()}
    return d_q, d_k, d_v, d_trained, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _table_gradients(call: Call, plan: Plan, inputs, operands: Arrays, sums: dict):
    """Gradients of tables of distances; takes their ends out of `sums`.

    Args:
        plan, inputs, sums: of the dq kernel.
    """
    found, grid = {}, plan.grid
    by_distance = distances.steps_of(grid.request.spec)
    if not by_distance:
        return found
    read = hooks.pad_operands(grid, tiles.of_tiles(grid.request.spec, operands))
    _, arrays = hooks.hold(grid, read)
    plan = dataclasses.replace(plan, tiles=diagonal_tiles(plan.tiles, *call.dims))
    for name, step in by_distance.items():
        cover = steps.coverage(grid, read)
        first, *near = distances.near_tiles(grid, step, cover, operands)
        own = dataclasses.replace(
            plan, steps=table.NearSteps(), num_step_refs=len(near)
        )
        found_sums = table.diagonal_sums(own, inputs, (name, first), near, arrays)
        ends = [sums.pop(f"{name} {end}") for end in ("up", "down")]
        x = distances.collect(grid, step, first, found_sums, ends, operands)
        one = operands[name].shape[0] == 1
        found[name] = jnp.sum(x, axis=0, keepdims=True) if one else x
    return found


def _before_epilogue(call: Call, operands: Arrays, core, cotangents):
    """The cotangents before the epilogue, and the gradients of its operands."""
    spec = call.request.spec
    if not spec.epilogue:
        return cotangents, {}
    known = tiles.declarations(spec)
    late = {x.name: operands[x.name] for x in spec.epilogue_operands}
    trained = {n: x for n, x in late.items() if known[n].trains}

    def run(core, trained):
        return _with_epilogue(call.request, core, late | trained)

    _, pull = jax.vjp(run, core, trained)
    d_core, d_late = pull(cotangents[0])
    return (d_core, cotangents[1]), d_late


def _row_arrays(call: Call, operands: Arrays, out, lse, cotangents):
    """What the backward kernels need of each row, [B, T, H], beside the output's
    cotangent; and the gradient of the weight map's own operand."""
    request, weight_map = call.request, call.request.spec.weight_map
    d_out, d_lse = cotangents
    if not weight_map.needs_sum:
        return {"d_out": d_out}, {}
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_sum = d_lse.astype(jnp.float32) - delta
    per_head = (jnp.swapaxes(x, 1, 2)[..., None] for x in (lse, d_sum))
    grads = tile_math.sink_gradient(request.spec, operands, *per_head)
    found = _shift_or_unit(weight_map, lse)
    if weight_map.exponential:
        return {"d_out": d_out, "d_sum": d_sum, **found}, grads
    factor = found["unit"]
    d_out = (d_out.astype(jnp.float32) * factor[..., None]).astype(d_out.dtype)
    return {"d_out": d_out, "d_sum": d_sum * factor}, grads


def _rows_again(plan: Plan, operands: Arrays, stats: Arrays, padded, arrays):
    """As `_row_arrays`, [B, H, T] with padding, for rows that are taken again.

    Args:
        plan, arrays: of the dq kernel.
        padded: (q, k, v and d_out by name, the output before the epilogue).
    """
    spec, (inputs, core) = plan.grid.request.spec, padded
    found = _finished_rows(plan.grid.request, stats)
    if spec.reweight.needs_sum:
        d_out = inputs["d_out"].astype(jnp.float32)
        delta = jnp.sum(d_out * core.astype(jnp.float32), axis=-1)
        found |= {"factor": stats["factor"], "delta": jnp.swapaxes(delta, 1, 2)}
    if not spec.weight_map.needs_sum:
        return found, {}
    d_sum = again.sum_cotangents(plan, inputs | found, *arrays)
    rows = (stats["lse"][..., None], d_sum[..., None])
    rows = (x[:, :, : plan.grid.request.q_len] for x in rows)
    return found | {"d_sum": d_sum}, tile_math.sink_gradient(spec, operands, *rows)


def _sum_to(x: jax.Array, call: Call, name: str, operand: jax.Array) -> jax.Array:
    """Sum [B, H, T or 1, S or 1] to the operand's shape."""
    axes = tiles.declarations(call.request.spec)[name].axes
    wanted = as_rank4(operand, axes).shape
    over = [i for i in range(4) if wanted[i] == 1 and x.shape[i] > 1]
    return jnp.sum(x, axis=over, keepdims=True).reshape(operand.shape)


def _written(grid: steps.Grid, operands: Arrays, x: jax.Array) -> jax.Array:
    """[B, H, T, S] with zeros in the tiles that no step visited, padding cut off."""
    read = tiles.of_tiles(grid.request.spec, operands)
    cover = steps.coverage(grid, hooks.pad_operands(grid, read)) > 0
    seen = jnp.repeat(jnp.repeat(cover, grid.block_q, 2), grid.block_k, 3)
    x = jnp.where(seen, x, 0.0)
    return x[:, :, : grid.request.q_len, : grid.request.kv_len]
