"""Rows that need their keys twice: the kernels around a spec's `reweight`.

Forward, one kernel collects each row's log-sum and largest weight from scores alone;
another, the forward kernel with other weights, adds up b v and b. Backward, one kernel
collects the cotangent of each row's log-sum, -sum_j p_j dp_j, and the ordinary ones
follow. Every kernel computes its scores again (blocked_reweight.py has the formulas).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.kernels.compat import type_like
from attnjax.kernels.mosaic_gpu import launch
from attnjax.kernels.mosaic_gpu.backward import QueryBlock, row_names
from attnjax.kernels.mosaic_gpu.block import Block, Plan
from attnjax.kernels.mosaic_gpu.forward import ForwardBlock
from attnjax.kernels.mosaic_gpu.second import Second
from attnjax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, ROWS
from attnjax.kernels.spec import AttentionSpec

OWN = (COMPUTE_WARPGROUPS, ROWS)


class SecondBlock(ForwardBlock):
    """The forward kernel's block on rows whose log-sum and largest weight are known."""

    name = "attention_again"

    @staticmethod
    def row_result(spec: AttentionSpec) -> str | None:
        """The factor from b to weights, where b has a sum."""
        return "factor" if spec.reweight.needs_sum else None

    def start_rows(self, wg):
        """The row sum of b; reads what is known of rows."""
        self.known, span = {}, pl.ds(self.own_first(), ROWS)
        for name in row_names(self.inputs):
            memory, ready = self.scratch[f"{name}_rows"], self.scratch["q_ready"]
            source = (self.batch, self.head, span)
            tile = memory.at[wg]
            self.load_own(self.inputs[name], source, tile, ready.at[wg])
            self.known[name] = self.machine.vector(tile, (), 0)
        if self.row_result(self.request.spec) is None:
            return ()
        return (self.machine.full((ROWS,), 0.0),)

    def unpack(self, carry):
        """(values, None, sum of b or None)."""
        acc, *rest = carry
        return acc, None, rest[0] if rest else None

    def _second(self, hooks) -> Second:
        return Second(self.rows, hooks, 0, self.own_first(), self.known)

    def add_rows(self, hooks, s, mask, carry):
        """As for the forward kernel; weights are b."""
        acc, _, total = carry
        u, _ = self.rows.weigh(s, self.known.get("shift"), 0, mask)
        b = self._second(hooks).again(u)
        if total is not None:
            total = total + jnp.sum(b, axis=1)
        return acc, None, total, b

    def finish_rows(self, carry, hooks):
        """Values over the sum of b, and the factor."""
        acc, _, total = self.unpack(carry)
        if total is None:
            return acc, None
        total = total + self._second(hooks).extra((ROWS, self.plan.tiles.step))
        alive = total > 0
        factor = jnp.where(alive, 1 / jnp.where(alive, total, 1.0), 0.0)
        return acc * self.machine.spread(factor, acc.shape, 0), factor


def statistics(plan: Plan, q, k, step_arrays, operands) -> dict[str, jax.Array]:
    """By name float32 [B, H, T]: "peak", a row's largest weight, and of maps with a sum
    "lse", its logarithm.

    Args:
        q, k: padded as for `forward.forward`.
    """
    b, t, h, d = q.shape
    names = ["lse"] if plan.grid.request.spec.weight_map.needs_sum else []
    names.append("peak")
    scratch = {
        "q_tiles": launch.tile_memory((*OWN, d), q.dtype),
        **{f"{name}_rows": plgpu.SMEM(OWN, jnp.float32) for name in names},
        "q_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        **plan.ring("k", d, q.dtype),
    }

    def body(*refs, **memory):
        block = _StatisticsBlock(plan, ("q", "k"), refs, memory)
        block.results = dict(zip(names, block.outputs, strict=True))
        block.run()

    out = launch.kernel(
        body,
        name="attention_statistics",
        out_type=[type_like((b, h, t), jnp.float32, q) for _ in names],
        scratch=scratch,
        grid=(h, plan.grid.num_q, b),
        interpret=plan.interpret,
    )(q, k, *step_arrays, *operands)
    return dict(zip(names, out, strict=True))


class _StatisticsBlock(Block):
    results: dict

    @property
    def streams(self):
        return {"k": (self.inputs["k"], False)}

    def streamed_head(self, turn):
        del turn
        return jax.lax.div(self.head, jnp.int32(self.group))

    def compute(self):
        """A compute warpgroup: 64 queries over all steps."""
        wg, x = jax.lax.axis_index("wg"), self.scratch
        first = self.own_first()
        span, q_tile = pl.ds(first, ROWS), x["q_tiles"].at[wg]
        place = (self.batch, span, self.head)
        self.load_own(self.inputs["q"], place, q_tile, x["q_ready"].at[wg])
        hooks = self.hooks(self.head)
        numbers = hooks.numbers()
        weight_map = self.request.spec.weight_map

        def unpack(carry):
            peak, *rest = carry
            top = rest.pop(0) if weight_map.needs_max else None
            return peak, top, rest.pop(0) if weight_map.needs_sum else None

        def step(n, carry, *, masked):
            peak, top, total = unpack(carry)
            slot = self.slot(n)
            products = self.machine.product(q_tile, self.wait("k", slot))
            self.free("k", slot)
            where = (first, self.first_row, n)
            raw = self.rows.raw(products)
            s, mask = hooks.scores(numbers, raw, *where, masked=masked)
            top, fade = self.rows.raise_top(top, s)
            u, summed = self.rows.weigh(s, self.rows.shift(top), 0, mask)
            if fade is not None:
                peak, total = peak * fade, None if total is None else total * fade
            if total is not None:
                total = total + jnp.sum(summed, axis=1)
            peak = jnp.maximum(peak, jnp.max(u, axis=1))
            return tuple(y for y in (peak, top, total) if y is not None)

        start = (self.machine.full((ROWS,), 0.0), *self.rows.start(ROWS))
        start = tuple(y for y in start if y is not None)
        peak, top, total = unpack(self.over_steps(step, start))
        found = {"peak": peak}
        if total is not None:
            sink = weight_map.sink_logit(numbers)
            factor, found["lse"] = self.rows.finish(top, total, sink)
            found["peak"] = peak * factor
        self.store_rows(self.results, found, span)


def sum_cotangents(plan: Plan, arrays, step_arrays, operands) -> jax.Array:
    """The cotangent of the rows' log-sums, float32 [B, H, T].

    Args:
        arrays: as for `backward.query_gradients`, without "d_sum".
    """
    names = ("q", "d_out", "k", "v", *row_names(arrays))
    q, v = arrays["q"], arrays["v"]
    b, t, h, d = q.shape
    scratch = {
        "q_tiles": launch.tile_memory((*OWN, d), q.dtype),
        "d_out_tiles": launch.tile_memory((*OWN, v.shape[3]), q.dtype),
        **{
            f"{name}_rows": plgpu.SMEM(OWN, jnp.float32)
            for name in (*row_names(arrays), "d_sum")
        },
        "own_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        **plan.ring("k", d, q.dtype),
        **plan.ring("v", v.shape[3], q.dtype),
    }

    def body(*refs, **memory):
        _SumBlock(plan, names, refs, memory).run()

    (out,) = launch.kernel(
        body,
        name="attention_row_cotangents",
        out_type=[type_like((b, h, t), jnp.float32, q)],
        scratch=scratch,
        grid=(h, plan.grid.num_q, b),
        interpret=plan.interpret,
    )(*(arrays[name] for name in names), *step_arrays, *operands)
    return out


class _SumBlock(QueryBlock):
    def compute(self):
        """A compute warpgroup: 64 queries over all steps."""
        wg, first = jax.lax.axis_index("wg"), self.own_first()
        span = pl.ds(first, ROWS)
        tiles, known = self.load_rows(wg, span)
        hooks = self.hooks(self.head)
        numbers = hooks.numbers()
        second = Second(self.rows, hooks, 0, first, known)

        def step(n, total, *, masked):
            slot = self.slot(n)
            products = self.machine.product(tiles["q"], self.wait("k", slot))
            self.free("k", slot)
            where, raw = (first, self.first_row, n), self.rows.raw(products)
            s, mask = hooks.scores(numbers, raw, *where, masked=masked)
            u, _ = self.rows.weigh(s, known.get("shift"), 0, mask)
            dp = self.machine.product(tiles["d_out"], self.wait("v", slot))
            self.free("v", slot)
            p = second.finished(u)
            return total + jnp.sum(p * second.of_finished(u, dp), axis=1)

        total = self.over_steps(step, self.machine.full((ROWS,), 0.0))
        self.store_rows({"d_sum": self.outputs[0]}, {"d_sum": -total}, span)
