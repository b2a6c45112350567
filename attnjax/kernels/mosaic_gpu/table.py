"""The kernel that adds up tiles of the scores' cotangent along their diagonals.

For the gradient of a table of distances (distances.py). Tiles of one diagonal of tiles
have the same distances in the same places: a block of threads owns the diagonal and
goes down it, through rows of the batch too where there are blocks enough. Nothing is
added from two places.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.kernels.compat import type_like
from attnjax.kernels.mosaic_gpu import launch
from attnjax.kernels.mosaic_gpu.backward import GradientBlock, row_names
from attnjax.kernels.mosaic_gpu.block import MEMORY_REGISTERS, Plan
from attnjax.kernels.mosaic_gpu.tiles import BLOCK, COMPUTE_WARPGROUPS, ROWS

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class NearSteps:
    """The tiles of a diagonal: `distances.near_tiles` as steps."""

    per_head = False

    def bounds(self, refs, b, h, i):
        """(0, how many): all of them evaluate the mask."""
        del h
        return jnp.int32(0), refs[1][b, i]

    def block(self, refs, b, h, i, n):
        """The n-th place."""
        del h
        return refs[0][b, i, n]


def diagonal_sums(plan: Plan, arrays: Arrays, of, step_arrays, operands):
    """Float32 [G, H, N, BLOCK, step]: tiles added up along N diagonals.

    Args:
        plan: of the dq kernel, with `NearSteps`.
        arrays: as for `backward.query_gradients`.
        of: (name of the table, the first diagonal).
    """
    names = ("q", "d_out", "k", "v", *row_names(arrays))
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    groups, count, _ = step_arrays[0].shape
    shape = (groups, q.shape[2], count, COMPUTE_WARPGROUPS, ROWS, plan.tiles.step)
    halves = COMPUTE_WARPGROUPS * plan.tiles.stages
    scratch = {
        **plan.ring("k", k.shape[3], k.dtype),
        **plan.ring("v", v.shape[3], k.dtype),
    }
    for name in _halved(names):
        if arrays[name].ndim == 4:
            rows = (halves, ROWS, arrays[name].shape[3])
            scratch[f"{name}_tiles"] = launch.tile_memory(rows, q.dtype)
        else:
            scratch[f"{name}_tiles"] = plgpu.SMEM((halves, ROWS), jnp.float32)
        for state in ("ready", "freed"):
            scratch[f"{name}_{state}"] = plgpu.Barrier(num_barriers=halves)

    def body(*refs, **memory):
        block = _DiagonalBlock(plan, names, refs, memory)
        block.name, block.first = of
        block.run()

    (out,) = launch.kernel(
        body,
        name="attention_diagonals",
        out_type=[type_like(shape, jnp.float32, q)],
        scratch=scratch,
        grid=(q.shape[2], count, groups),
        interpret=plan.interpret,
    )(*(arrays[name] for name in names), *step_arrays, *operands)
    return out.reshape(groups, q.shape[2], count, BLOCK, plan.tiles.step)


def _halved(names) -> list[str]:
    """What comes by blocks of queries: each warpgroup has its own half."""
    return [name for name in names if name not in ("k", "v")]


class _DiagonalBlock(GradientBlock):
    name: str
    first: int

    def owner_index(self):
        """The diagonal."""
        return jax.lax.axis_index("owners")

    def place(self, n):
        """(row of the batch, block of queries, tile of keys) of step n."""
        grid = self.plan.grid
        refs = (self.step_refs, self.batch, self.head, self.owner)
        flat = self.plan.steps.block(*refs, n)
        b, i = (
            jax.lax.div(flat, jnp.int32(grid.num_q)),
            jax.lax.rem(flat, jnp.int32(grid.num_q)),
        )
        if self.step_refs[0].shape[0] > 1:
            b = self.batch
        return b, i, i * (BLOCK // grid.block_k) + self.first + self.owner

    def first_row(self, n, head=None):
        """First key of step n."""
        del head
        return self.place(n)[2] * self.plan.tiles.step

    def _copy(self):
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        stages, x = self.plan.tiles.stages, self.scratch
        kv_head = jax.lax.div(self.head, jnp.int32(self.group))

        def fetch(name, index, slot, n):
            freed, ready = x[f"{name}_freed"].at[slot], x[f"{name}_ready"].at[slot]
            pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, freed))
            tile = x[f"{name}_tiles"].at[slot]
            plgpu.copy_gmem_to_smem(self.inputs[name].at[index], tile, ready)

        def fill(n, _):
            slot, (b, i, j) = self.slot(n), self.place(n)
            keys = pl.ds(j * self.plan.tiles.step, self.plan.tiles.step)
            for name in ("k", "v"):
                fetch(name, (b, keys, kv_head), slot, n)
            for wg in range(COMPUTE_WARPGROUPS):
                rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)
                for name in _halved(self.inputs):
                    vector = len(self.inputs[name].shape) == 3
                    index = (b, self.head, rows) if vector else (b, rows, self.head)
                    fetch(name, index, slot * COMPUTE_WARPGROUPS + wg, n)

        def drain(n, _):
            slot = self.slot(n)
            for name in ("k", "v"):
                plgpu.barrier_wait(x[f"{name}_freed"].at[slot])
            for wg in range(COMPUTE_WARPGROUPS):
                for name in _halved(self.inputs):
                    half = slot * COMPUTE_WARPGROUPS + wg
                    plgpu.barrier_wait(x[f"{name}_freed"].at[half])

        jax.lax.fori_loop(0, self.num_steps, fill, None)
        left = jnp.maximum(self.num_steps - stages, 0)
        jax.lax.fori_loop(left, self.num_steps, drain, None)

    def compute(self):
        """A compute warpgroup: 64 rows of every tile of the diagonal."""
        wg, size = jax.lax.axis_index("wg"), self.plan.tiles.step
        start = self.machine.full((ROWS, size), 0.0)
        total = jax.lax.fori_loop(0, self.num_steps, self._step, start)
        place = (self.batch, self.head, self.owner, wg)
        self.outputs[0][(*place, pl.ds(0, ROWS), pl.ds(0, size))] = total

    def _step(self, n, total):
        wg, slot, (b, i, _) = jax.lax.axis_index("wg"), self.slot(n), self.place(n)
        half, first = slot * COMPUTE_WARPGROUPS + wg, i * BLOCK + wg * ROWS
        hooks = dataclasses.replace(self.hooks(self.head), head=(b, self.head))
        products = self.machine.product(self.wait("q", half), self.wait("k", slot))
        self.free("q", half)
        self.free("k", slot)
        rows = {}
        for name in row_names(self.inputs):
            rows[name] = self.machine.vector(self.wait(name, half), (), 0)
            self.free(name, half)
        _, cotangents = self.weights(
            hooks, hooks.numbers(), products, first, n, rows, 0, masked=True
        )
        d_out, v = self.wait("d_out", half), self.wait("v", slot)
        _, d_operands = cotangents(self.machine.product(d_out, v))
        self.free("d_out", half)
        self.free("v", slot)
        return total + d_operands[self.name]
