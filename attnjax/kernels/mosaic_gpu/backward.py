"""The backward kernels: weights are computed again from the rows' log-sums.

One kernel owns queries and sums dq over keys; another owns keys and sums dk and dv
over queries and over the query heads that share them. Nothing is added from two
places, so results repeat bit for bit. Where dk and dv together do not fit a
warpgroup's registers, each has a kernel of its own.
"""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.kernels.compat import type_like
from attnjax.kernels.mosaic_gpu import distances, launch
from attnjax.kernels.mosaic_gpu.block import Block, Plan
from attnjax.kernels.mosaic_gpu.second import Second
from attnjax.kernels.mosaic_gpu.shim import Machine
from attnjax.kernels.mosaic_gpu.tiles import BLOCK, COMPUTE_WARPGROUPS, ROWS

Arrays = Mapping[str, jax.Array]
OWN = (COMPUTE_WARPGROUPS, ROWS)
# What the kernels take of rows, where the spec has it: the shift of exponentials and
# the cotangent of the row's sum; and of rows that are taken again the factors that
# finish their weights before and after, the largest one, and what is subtracted of dp.
WEIGHT_ROWS = ("shift", "unit", "peak", "factor")
ROW_NAMES = (*WEIGHT_ROWS, "delta", "d_sum")


def row_names(arrays: Iterable[str]) -> list[str]:
    """Row statistics among the inputs."""
    return [name for name in ROW_NAMES if name in arrays]


def query_gradients(plan: Plan, arrays: Arrays, step_arrays, operands):
    """dq [B, T, H, D] without the scale, and row sums of operand cotangents.

    Args:
        arrays: q, k, v, d_out, padded; those of `ROW_NAMES` [B, H, T].

    Returns:
        dq in q's dtype; {operand: float32 [B, H, T]}, for each operand that is summed
        over keys, and {"operand up", "operand down"} of tiles beyond the reach of a
        table; {operand: float32 [B, H, T, S]}, unwritten where a tile is skipped.
    """
    names = ("q", "d_out", "k", "v", *row_names(arrays))
    q, v = arrays["q"], arrays["v"]
    b, t, h, d = q.shape
    e, s = v.shape[3], v.shape[1]
    sums, windows, whole = _gradient_names(plan)
    sums += [f"{name} {end}" for name in windows for end in ("up", "down")]
    out_type = [type_like(q.shape, q.dtype, q)]
    out_type += [type_like((b, h, t), jnp.float32, q) for _ in sums]
    out_type += [type_like((b, h, t, s), jnp.float32, q) for _ in whole]
    scratch = {
        "q_tiles": launch.tile_memory((*OWN, d), q.dtype),
        "d_out_tiles": launch.tile_memory((*OWN, e), q.dtype),
        **{
            f"{name}_rows": plgpu.SMEM(OWN, jnp.float32)
            for name in (*row_names(arrays), *sums)
        },
        "own_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        **plan.ring("k", d, q.dtype),
        **plan.ring("v", e, q.dtype),
    }

    def attention_dq(*refs, **memory):
        QueryBlock(plan, names, refs, memory).run()

    out = launch.kernel(
        attention_dq,
        name="attention_dq",
        out_type=out_type,
        scratch=scratch,
        grid=(h, plan.grid.num_q, b),
        interpret=plan.interpret,
    )(*(arrays[name] for name in names), *step_arrays, *operands)
    rest = iter(out[1:])
    return out[0], {n: next(rest) for n in sums}, {n: next(rest) for n in whole}


def _gradient_names(plan: Plan):
    """Operands of the scores by where their gradients are summed: over keys, along
    diagonals, and nowhere."""
    kinds = {x.name: x.kind for x in plan.held}
    trained = [x.name for x in plan.grid.request.spec.score_operands]
    sums = [n for n in trained if kinds[n] in ("number", "row")]
    windows = [n for n in trained if kinds[n] == "window"]
    return sums, windows, [n for n in trained if kinds[n] == "tile"]


class GradientBlock(Block):
    """A block of a backward kernel: weights and the scores' cotangent of a tile."""

    def weights(self, hooks, numbers, products, own_first, n, rows, axis, *, masked):
        """(weights, function from dp to (cotangent of raw products, of operands))."""
        spec = self.request.spec
        raw, tile, mask = self.rows.raw(products), None, None
        if masked or spec.score:
            first_of = functools.partial(self.first_row, head=hooks.head[1])
            place = (own_first, first_of, n, masked)
            tile, mask = hooks.place(numbers, raw.shape, *place)
        s, pull = hooks.score_pull(raw, tile)
        s = hooks.hide(s, mask)
        shift = rows.get("shift")
        u, _ = self.rows.weigh(s, shift, axis, mask)
        weights = u
        if spec.reweight is not None:
            first = self.first_row(n, head=hooks.head[1]) if axis else own_first
            second = Second(self.rows, hooks, axis, first, rows)
            weights = second.weights(u)

        def cotangents(dp):
            d_sum = rows.get("d_sum")
            if spec.reweight is not None:
                dp, d_sum = second.cotangents(u, dp, d_sum)
            d_s = self.rows.cotangent(s, u, shift, axis, mask, dp, d_sum)
            d_raw, d_operands = pull(d_s)
            if mask is not None and spec.score:
                # A score function may be infinite where it is masked.
                d_raw = jnp.where(mask, d_raw, 0.0)
                d_operands = {
                    name: jnp.where(mask, x, 0.0) for name, x in d_operands.items()
                }
            return d_raw, d_operands

        return weights, cotangents


class QueryBlock(GradientBlock):
    """128 queries of one head over all keys."""

    @property
    def streams(self):
        """Tiles of keys and of their values."""
        return {name: (self.inputs[name], False) for name in ("k", "v")}

    def streamed_head(self, turn):
        """The query head's key/value head."""
        del turn
        return jax.lax.div(self.head, jnp.int32(self.group))

    def compute(self):
        """A compute warpgroup: 64 queries over all steps."""
        wg, x = jax.lax.axis_index("wg"), self.scratch
        first = self.own_first()
        span = pl.ds(first, ROWS)
        where = (self.batch, span, self.head)
        tiles, rows = self.load_rows(wg, span)
        hooks = self.hooks(self.head)
        numbers = hooks.numbers()
        sums, windows, whole = _gradient_names(self.plan)
        ends = [f"{name} {end}" for name in windows for end in ("up", "down")]
        start = (
            self.machine.full((ROWS, self.inputs["q"].shape[3]), 0.0),
            *(self.machine.full((ROWS,), 0.0) for _ in (*sums, *ends)),
        )

        def step(n, carry, *, masked):
            d_q, *totals = carry
            slot = self.slot(n)
            k_tile = self.wait("k", slot)
            products = self.machine.product(tiles["q"], k_tile)
            _, cotangents = self.weights(
                hooks, numbers, products, first, n, rows, 0, masked=masked
            )
            dp = self.machine.product(tiles["d_out"], self.wait("v", slot))
            self.free("v", slot)
            d_raw, d_operands = cotangents(dp)
            added = [jnp.sum(d_operands[name], axis=1) for name in sums]
            for name in windows:
                added += self._beyond(hooks, name, n, d_operands[name])
            totals = [x + y for x, y in zip(totals, added, strict=True)]
            later = self.outputs[1 + len(totals) :]
            for name, ref in zip(whole, later, strict=True):
                columns = pl.ds(self.first_row(n), self.plan.tiles.step)
                ref[self.batch, self.head, span, columns] = d_operands[name]
            d_raw = d_raw.astype(self.inputs["k"].dtype)
            d_q = self.machine.accumulate(d_q, d_raw, k_tile)
            self.free("k", slot)
            return (d_q, *totals)

        d_q, *totals = self.over_steps(step, start)
        sums = [*sums, *ends]
        tiles["q"][...] = (d_q * self.request.scale).astype(self.outputs[0].dtype)
        for name, total in zip(sums, totals, strict=True):
            x[f"{name}_rows"].at[wg][...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiles["q"], self.outputs[0].at[where])
        for name, ref in zip(sums, self.outputs[1 : 1 + len(sums)], strict=True):
            target = ref.at[self.batch, self.head, span]
            plgpu.copy_smem_to_gmem(x[f"{name}_rows"].at[wg], target)
        plgpu.wait_smem_to_gmem(0)

    def load_rows(self, wg, span):
        """(q's and d_out's tiles of the warpgroup's rows, what is known of rows)."""
        x, tiles, rows = self.scratch, {}, {}
        for name in ("q", "d_out"):
            tiles[name] = x[f"{name}_tiles"].at[wg]
            where = (self.batch, span, self.head)
            self.load_own(self.inputs[name], where, tiles[name], x["own_ready"].at[wg])
        for name in row_names(self.inputs):
            memory, source = x[f"{name}_rows"].at[wg], (self.batch, self.head, span)
            self.load_own(self.inputs[name], source, memory, x["own_ready"].at[wg])
            rows[name] = self.machine.vector(memory, (), 0)
        return tiles, rows

    def _beyond(self, hooks, name, n, d_tile):
        """What a tile adds to the rows beyond the reach of a table, up and down."""
        reach = next(x.reach for x in self.plan.held if x.name == name)
        base = hooks.start() + self.owner * BLOCK - self.first_row(n)
        row = jnp.sum(d_tile, axis=1)
        ends = distances.beyond(self.plan.grid, reach, base)
        return [row * jnp.where(end, 1.0, 0.0) for end in ends]


def key_gradients(plan: Plan, arrays: Arrays, step_arrays, operands, *, wanted):
    """dk [B, S, K, D] and dv [B, S, K, E], either or both, summed over query heads.

    Args:
        arrays: as for `query_gradients`.
        wanted: ("dk", "dv") or one of them.

    Returns:
        {name: gradient in k's dtype}, and {operand: float32 [B, H, S]} for operands
        that are summed over queries, with "dk".
    """
    rows = [n for n in row_names(arrays) if n in WEIGHT_ROWS or "dk" in wanted]
    names = ("k", "v", "q", "d_out", *rows)
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    b, s, kv_heads, d = k.shape
    e = v.shape[3]
    sums = _column_names(plan) if "dk" in wanted else []
    widths = {"dk": d, "dv": e}
    out_type = [type_like((b, s, kv_heads, widths[n]), k.dtype, q) for n in wanted]
    out_type += [type_like((b, q.shape[2], s), jnp.float32, q) for _ in sums]
    scratch = {
        "k_tiles": launch.tile_memory((*OWN, d), k.dtype),
        "v_tiles": launch.tile_memory((*OWN, e), k.dtype),
        **{f"{name}_rows": plgpu.SMEM(OWN, jnp.float32) for name in sums},
        "own_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        **plan.ring("q", d, k.dtype),
        **plan.ring("d_out", e, k.dtype),
    }
    for name in rows:
        scratch |= plan.ring(name, None, jnp.float32)

    def body(*refs, **memory):
        block = _KeyBlock(plan, names, refs, memory)
        block.wanted, block.sums = wanted, sums
        block.run()

    out = launch.kernel(
        body,
        name="attention_" + "_".join(wanted),
        out_type=out_type,
        scratch=scratch,
        grid=(kv_heads, plan.grid.num_k, b),
        interpret=plan.interpret,
    )(*(arrays[name] for name in names), *step_arrays, *operands)
    found = dict(zip(wanted, out, strict=False))
    return found, dict(zip(sums, out[len(wanted) :], strict=True))


def _column_names(plan: Plan) -> list[str]:
    kinds = {x.name: x.kind for x in plan.held}
    trained = plan.grid.request.spec.score_operands
    return [x.name for x in trained if kinds[x.name] == "column"]


class _KeyBlock(GradientBlock):
    wanted: tuple[str, ...]
    sums: list[str]

    @property
    def heads_per_block(self) -> int:
        return self.group

    @property
    def streams(self):
        names = ("q", "d_out", *row_names(self.inputs))
        return {name: (self.inputs[name], name in ROW_NAMES) for name in names}

    def query_head(self, turn):
        return self.head * self.group + turn

    def streamed_head(self, turn):
        return self.query_head(turn)

    def compute(self):
        """A compute warpgroup: 64 keys over all queries that may see them."""
        wg, x = jax.lax.axis_index("wg"), self.scratch
        span = pl.ds(self.own_first(), ROWS)
        where = (self.batch, span, self.head)
        own = {name: x[f"{name}_tiles"].at[wg] for name in ("k", "v")}
        for name, tile in own.items():
            self.load_own(self.inputs[name], where, tile, x["own_ready"].at[wg])
        widths = {"dk": self.inputs["k"].shape[3], "dv": self.inputs["v"].shape[3]}
        start = tuple(self.machine.full((ROWS, widths[n]), 0.0) for n in self.wanted)

        def one_head(turn, carry):
            head = self.query_head(turn)
            hooks, bounds = self.hooks(head), None
            if self.shared_steps:
                before = turn * self.num_steps
            else:
                before, carry = carry
                bounds = self.bounds(head)
            step = functools.partial(self._step, hooks, hooks.numbers(), own, before)
            totals = tuple(self.machine.full((ROWS,), 0.0) for _ in self.sums)
            carry, totals = self.over_steps(step, (carry, totals), bounds)
            self._store_sums(totals, head, span)
            return carry if bounds is None else (before + bounds[1], carry)

        if self.shared_steps:
            carry = jax.lax.fori_loop(0, self.group, one_head, start)
        else:
            start = (jnp.int32(0), start)
            _, carry = jax.lax.fori_loop(0, self.group, one_head, start)
        scales = {"dk": self.request.scale, "dv": 1.0}
        for name, x in zip(self.wanted, carry, strict=True):
            tile = own[name[1:]]
            tile[...] = (x * scales[name]).astype(tile.dtype)
        plgpu.commit_smem()
        for name, ref in zip(self.wanted, self.outputs, strict=False):
            plgpu.copy_smem_to_gmem(own[name[1:]], ref.at[where])
        plgpu.wait_smem_to_gmem(0)

    def _store_sums(self, totals, head, span):
        if not self.sums:
            return
        wg, x = jax.lax.axis_index("wg"), self.scratch
        for name, total in zip(self.sums, totals, strict=True):
            x[f"{name}_rows"].at[wg][...] = total
        plgpu.commit_smem()
        refs = self.outputs[len(self.wanted) :]
        for name, ref in zip(self.sums, refs, strict=True):
            target = ref.at[self.batch, head, span]
            plgpu.copy_smem_to_gmem(x[f"{name}_rows"].at[wg], target)
        plgpu.wait_smem_to_gmem(0)

    def _step(self, hooks, numbers, own, before, n, carry, *, masked):
        """One tile of queries: transposed scores, weights, and both cotangents."""
        carry, totals = carry
        found = dict(zip(self.wanted, carry, strict=True))
        slot, dtype = self.slot(before + n), self.inputs["k"].dtype
        q_tile = self.wait("q", slot)
        products = self.machine.product(own["k"], q_tile)
        names, again = row_names(self.inputs), self.request.spec.reweight is not None
        rows = {}
        if again:
            memory = {name: self.wait(name, slot) for name in names}
            rows = _WhenRead(self.machine, memory)
        for name in () if again else names:
            rows[name] = self.machine.vector(self.wait(name, slot), (), 1)
            self.free(name, slot)
        u, cotangents = self.weights(
            hooks, numbers, products, self.own_first(), n, rows, 1, masked=masked
        )
        d_out_tile = self.wait("d_out", slot)
        if "dv" in found:
            found["dv"] = self.machine.accumulate(
                found["dv"], u.astype(dtype), d_out_tile
            )
        if "dk" in found:
            dp = self.machine.product(own["v"], d_out_tile)
            d_raw, d_operands = cotangents(dp)
            totals = tuple(
                total + jnp.sum(d_operands[name], axis=1)
                for name, total in zip(self.sums, totals, strict=True)
            )
            d_raw = d_raw.astype(dtype)
            found["dk"] = self.machine.accumulate(found["dk"], d_raw, q_tile)
        for name in names if again else ():
            self.free(name, slot)
        self.free("d_out", slot)
        self.free("q", slot)
        return tuple(found[name] for name in self.wanted), totals


class _WhenRead(Mapping):
    """Vectors along the columns of a tile, which take a quarter of its registers each:
    loaded anew whenever one is read, so that none is held for later."""

    def __init__(self, machine: Machine, memory: Mapping):
        self.machine, self.memory = machine, memory

    def __getitem__(self, name):
        return self.machine.vector(self.memory[name], (), 1)

    def __iter__(self):
        return iter(self.memory)

    def __len__(self):
        return len(self.memory)

    def __contains__(self, name):
        return name in self.memory
