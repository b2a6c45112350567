"""The forward kernel: a block of threads owns 128 queries of one head.

Tiles of scores live in registers only, and the row statistics with them (Dao et al.,
arXiv 2205.14135). One warpgroup's softmax runs under the other's matrix products
(Shah et al., FlashAttention-3, arXiv 2407.08608, section 3.1).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.kernels.compat import type_like
from attnjax.kernels.mosaic_gpu import finish, launch
from attnjax.kernels.mosaic_gpu.block import Block, Plan
from attnjax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, ROWS
from attnjax.kernels.spec import AttentionSpec


def forward(plan: Plan, inputs, step_arrays, operands, *, keep=False, kind=None):
    """By name "out" [B, T, H, E] in q's dtype, "lse" [B, H, T] of maps with a sum, and
    with `keep` "core", the output before the epilogue.

    Args:
        inputs: q, k, v, padded to whole tiles and to whole 64s of head dimension; then
            what the block takes of rows, [B, H, T].
        keep: also write the output before the epilogue.
        kind: the block, `ForwardBlock` or one like it.
    """
    kind = kind or ForwardBlock
    q, v = inputs["q"], inputs["v"]
    b, t, h, d = q.shape
    e = v.shape[3]
    of_rows = kind.row_result(plan.grid.request.spec)
    out_type = {"out": type_like((b, t, h, e), q.dtype, q)}
    if of_rows is not None:
        out_type[of_rows] = type_like((b, h, t), jnp.float32, q)
    if keep:
        out_type["core"] = out_type["out"]
    own = (COMPUTE_WARPGROUPS, ROWS)
    vectors = [x for x in (*inputs, of_rows) if x not in ("q", "k", "v", None)]
    scratch = {
        "q_tiles": launch.tile_memory((*own, d), q.dtype),
        "out_tiles": launch.tile_memory((*own, e), q.dtype) if e != d else None,
        **{f"{name}_rows": plgpu.SMEM(own, jnp.float32) for name in vectors},
        "q_ready": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        **plan.ring("k", d, q.dtype),
        **plan.ring("v", e, q.dtype),
        **_late_memory(plan, e, q.dtype),
    }

    def body(*refs, **memory):
        block = kind(plan, tuple(inputs), refs, memory)
        block.results = dict(zip(out_type, block.outputs, strict=True))
        block.run()

    out = launch.kernel(
        body,
        name=kind.name,
        out_type=list(out_type.values()),
        scratch=scratch,
        grid=(h, plan.grid.num_q, b),
        interpret=plan.interpret,
    )(*inputs.values(), *step_arrays, *operands)
    return dict(zip(out_type, out, strict=True))


def _late_memory(plan: Plan, width: int, dtype) -> dict:
    """Shared memory of the epilogue's tiles that are copied there."""
    memory = {}
    for x in plan.late:
        if x.staged:
            own = (COMPUTE_WARPGROUPS, ROWS, width)
            memory[f"late_{x.name}"] = launch.tile_memory(own, dtype)
            ready = plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS)
            memory[f"late_{x.name}_ready"] = ready
    return memory


class ForwardBlock(Block):
    """128 queries of one head over all keys."""

    name = "attention_forward"
    results: dict

    @staticmethod
    def row_result(spec: AttentionSpec) -> str | None:
        """Name of what is written of each row, if anything."""
        return "lse" if spec.weight_map.needs_sum else None

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
        q_first = self.own_first()
        rows = (self.batch, pl.ds(q_first, ROWS), self.head)
        q_tile = x["q_tiles"].at[wg]
        self.load_own(self.inputs["q"], rows, q_tile, x["q_ready"].at[wg])
        self._copy_late(rows, wg)
        hooks = self.hooks(self.head)
        numbers = hooks.numbers()
        acc = self.machine.full((ROWS, self.inputs["v"].shape[3]), 0.0)
        start = (acc, *(y for y in self.start_rows(wg) if y is not None))
        step = functools.partial(self._step, hooks, numbers, q_tile, q_first)
        # The second warpgroup starts half a step late.
        pl.when(wg == 1)(self._take_turn)
        carry = self.over_steps(step, start)
        pl.when(wg == 0)(self._take_turn)
        self._store(carry, rows, wg, hooks)

    def start_rows(self, wg):
        """What is kept of rows before any key."""
        del wg
        return self.rows.start(ROWS)

    def _take_turn(self):
        if self.plan.tiles.ping_pong:
            plgpu.barrier_arrive(self.scratch["turn"])
            plgpu.barrier_wait(self.scratch["turn"])

    def unpack(self, carry):
        """(values, row maximum or None, row sum or None)."""
        acc, *rest = carry
        weight_map = self.request.spec.weight_map
        top = rest.pop(0) if weight_map.needs_max else None
        return acc, top, rest.pop(0) if weight_map.needs_sum else None

    def _step(self, hooks, numbers, q_tile, q_first, n, carry, *, masked):
        """One tile of keys: scores, weights, and their values."""
        slot, turn = self.slot(n), self.scratch["turn"]
        k_tile = self.wait("k", slot)
        products = self.machine.product(q_tile, k_tile, between=self._take_turn)
        self.free("k", slot)
        s, mask = hooks.scores(
            numbers, self.rows.raw(products), q_first, self.first_row, n, masked=masked
        )
        *kept, u = self.add_rows(hooks, s, mask, self.unpack(carry))
        u = u.astype(self.inputs["q"].dtype)
        kept = tuple(y for y in (*kept, u) if y is not None)
        # The weights are finished before the other warpgroup's turn begins.
        acc, *kept, u = jax.lax.optimization_barrier(kept)
        if self.plan.tiles.ping_pong:
            plgpu.barrier_arrive(turn)
        v_tile = self.wait("v", slot)
        if self.plan.tiles.ping_pong:
            plgpu.barrier_wait(turn)
        acc = self.machine.accumulate(acc, u, v_tile)
        self.free("v", slot)
        return (acc, *kept)

    def add_rows(self, hooks, s, mask, carry):
        """With a tile: (values so far, row maximum, row sum, the tile's weights)."""
        del hooks
        acc, top, total = carry
        top, fade = self.rows.raise_top(top, s)
        u, summed = self.rows.weigh(s, self.rows.shift(top), 0, mask)
        if fade is not None:
            acc = acc * self.machine.spread(fade, acc.shape, 0)
            total = None if total is None else total * fade
        if total is not None:
            total = total + jnp.sum(summed, axis=1)
        return acc, top, total, u

    def finish_rows(self, carry, hooks):
        """Finished values, and what is written of rows, or None."""
        acc, top, total = self.unpack(carry)
        if total is None:
            return acc, None
        sink = self.request.spec.weight_map.sink_logit(hooks.numbers())
        factor, lse = self.rows.finish(top, total, sink)
        return acc * self.machine.spread(factor, acc.shape, 0), lse

    def _copy_late(self, rows, wg):
        """Start the copies of the epilogue's tiles."""
        b, span, h = rows
        for late, ref in zip(self.plan.late, self.late_refs, strict=True):
            if late.staged:
                place = (b if late.per_batch else 0, span, h if late.per_head else 0)
                tile = self.scratch[f"late_{late.name}"].at[wg]
                ready = self.scratch[f"late_{late.name}_ready"].at[wg]
                plgpu.copy_gmem_to_smem(ref.at[place], tile, ready)

    def _finish(self, acc, rows, wg):
        """The epilogue's steps."""
        b, span, h = rows
        refs = dict(zip(self.plan.late, self.late_refs, strict=True))

        def read(late):
            staged = None
            if late.staged:
                plgpu.barrier_wait(self.scratch[f"late_{late.name}_ready"].at[wg])
                staged = self.scratch[f"late_{late.name}"].at[wg]
            where = (b, span.start, h)
            return finish.read(late, refs[late], self.machine, where, staged)

        return finish.apply(self.request, self.machine, self.plan.late, acc, read)

    def _store(self, carry, rows, wg, hooks):
        """Normalise, run the epilogue, and write the output and what is of rows."""
        x, out_ref = self.scratch, self.results["out"]
        name = self.row_result(self.request.spec)
        acc, vector = self.finish_rows(carry, hooks)
        if vector is not None:
            x[f"{name}_rows"].at[wg][...] = vector
        tiles = x["q_tiles"] if x["out_tiles"] is None else x["out_tiles"]
        if "core" in self.results:
            tiles.at[wg][...] = acc.astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tiles.at[wg], self.results["core"].at[rows])
        if self.request.spec.epilogue:
            acc = self._finish(acc, rows, wg)
        if "core" in self.results:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tiles.at[wg][...] = acc.astype(out_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiles.at[wg], out_ref.at[rows])
        if vector is not None:
            b, span, h = rows
            row_ref = self.results[name].at[b, h, span]
            plgpu.copy_smem_to_gmem(x[f"{name}_rows"].at[wg], row_ref)
        plgpu.wait_smem_to_gmem(0)
