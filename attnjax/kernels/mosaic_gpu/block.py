"""What the kernels share: one block of threads and its ring of streamed tiles.

Two compute warpgroups own 64 rows each; a third one copies the tiles that they step
over into a ring in shared memory with the tensor memory accelerator. Every stream has
its own barriers: `ready` when a tile has arrived, `freed` when both warpgroups are
done with it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax.kernels.mosaic_gpu import launch
from attnjax.kernels.mosaic_gpu.finish import Late
from attnjax.kernels.mosaic_gpu.hooks import Held, Hooks
from attnjax.kernels.mosaic_gpu.rows import RowMath
from attnjax.kernels.mosaic_gpu.shim import Machine
from attnjax.kernels.mosaic_gpu.steps import Grid, Steps
from attnjax.kernels.mosaic_gpu.tiles import BLOCK, COMPUTE_WARPGROUPS, ROWS, Tiles

MEMORY_WARPGROUP = COMPUTE_WARPGROUPS
# Registers of a thread, out of 168 each that the block starts with.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one kernel is traced from; everything is static.

    Attributes:
        grid: the cut.
        steps: its steps.
        tiles: ring and tile sizes.
        held: operands of the spec, in the order in which the kernel gets them.
        num_step_refs: how many arrays the steps need.
        late: operands of the epilogue, which come after `held`.
        interpret: what `plgpu.kernel` takes, or None to compile.
    """

    grid: Grid
    steps: Steps
    tiles: Tiles
    held: tuple[Held, ...]
    num_step_refs: int
    interpret: object = None
    late: tuple[Late, ...] = ()

    def ring(self, name: str, width: int | None, dtype) -> dict:
        """Shared memory and barriers of a stream of tiles, or of vectors."""
        stages, step = self.tiles.stages, self.tiles.step
        if width is None:
            memory = plgpu.SMEM((stages, step), dtype)
        else:
            memory = launch.tile_memory((stages, step, width), dtype)
        return {
            f"{name}_tiles": memory,
            f"{name}_ready": plgpu.Barrier(num_barriers=stages),
            f"{name}_freed": plgpu.Barrier(
                num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages
            ),
        }


class Block:
    """One block of threads of a kernel, as traced.

    Subclasses give `streams`, {name: (reference, whether it is a vector)}, and
    `compute`, the work of a compute warpgroup.
    """

    # Query heads that one block goes through.
    heads_per_block = 1

    def __init__(self, plan: Plan, inputs: tuple[str, ...], refs, scratch):
        self.plan, self.request = plan, plan.grid.request
        self.machine = Machine(plan.interpret is not None)
        self.rows = RowMath(self.request, self.machine)
        ends = (len(inputs), plan.num_step_refs, len(plan.held), len(plan.late))
        parts = []
        for count in ends:
            parts.append(refs[:count])
            refs = refs[count:]
        self.inputs = dict(zip(inputs, parts[0], strict=True))
        self.step_refs, self.operand_refs, self.late_refs = parts[1:]
        self.outputs = refs
        self.scratch = scratch
        self.head = jax.lax.axis_index("heads")
        self.batch = jax.lax.axis_index("batch")
        self.owner = self.owner_index()
        # Lists of tiles that differ by head belong to turns of the block.
        self.shared_steps = self.heads_per_block == 1 or not plan.steps.per_head
        if self.shared_steps:
            self.num_full, self.num_steps = self.bounds(self.head)

    def bounds(self, head):
        """(tiles that need no mask, all tiles) of a query head."""
        refs = (self.step_refs, self.batch, head, self.owner)
        # What is read from memory has the mesh axes of its array; loops need the type
        # that arithmetic gives, which has none inside a kernel.
        return tuple(x + jnp.int32(0) for x in self.plan.steps.bounds(*refs))

    def owner_index(self):
        """Which owner this block is."""
        index = jax.lax.axis_index("owners")
        if self.plan.grid.transposed:
            return index
        # Late queries see most keys under a causal mask: they start first, so that
        # short rows fill the end.
        return self.plan.grid.owners - 1 - index

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.request.num_heads // self.request.num_kv_heads

    def run(self) -> None:
        """Split the warpgroups."""
        wg = jax.lax.axis_index("wg")
        pl.when(wg < COMPUTE_WARPGROUPS)(self._compute)
        pl.when(wg == MEMORY_WARPGROUP)(self._copy)

    def _compute(self):
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        self.compute()

    def slot(self, n):
        """Place of the n-th copy in the ring."""
        return jax.lax.rem(n, jnp.int32(self.plan.tiles.stages))

    def first_row(self, n, head=None):
        """First streamed row of step n; of a query head, where a block has several."""
        head = self.head if head is None else head
        refs = (self.step_refs, self.batch, head, self.owner)
        return self.plan.steps.block(*refs, n) * self.plan.tiles.step

    def own_first(self):
        """First row that this warpgroup owns."""
        wg = jax.lax.axis_index("wg")
        return self.owner * BLOCK + wg * ROWS

    def hooks(self, head) -> Hooks:
        """The spec's functions for one query head."""
        where = (self.batch, head)
        plan = self.plan
        return Hooks(plan.grid, plan.held, self.operand_refs, self.machine, where)

    def query_head(self, turn):
        """Query head of the block's given turn."""
        del turn
        return self.head

    def streamed_head(self, turn):
        """Head of the streamed arrays during the block's given turn."""
        raise NotImplementedError

    def _copy(self):
        """The memory warpgroup: fill the ring, then see it emptied."""
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        stages, x = self.plan.tiles.stages, self.scratch

        def fill_next(n, _):
            turn, step = jnp.int32(0), n
            if self.heads_per_block > 1:
                turn = jax.lax.div(n, self.num_steps)
                step = n - turn * self.num_steps
            fill(n, turn, step)

        def fill(n, turn, step):
            slot, head = self.slot(n), self.streamed_head(turn)
            first = self.first_row(step, self.query_head(turn))
            span = pl.ds(first, self.plan.tiles.step)
            for name, (source, is_vector) in self.streams.items():
                freed, ready = x[f"{name}_freed"].at[slot], x[f"{name}_ready"].at[slot]
                pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, freed))
                index = (self.batch, head, span) if is_vector else (
                    self.batch, span, head,
                )  # fmt: skip
                tile = x[f"{name}_tiles"].at[slot]
                plgpu.copy_gmem_to_smem(source.at[index], tile, ready)

        def drain(n, _):
            for name in self.streams:
                plgpu.barrier_wait(x[f"{name}_freed"].at[self.slot(n)])

        def fill_turn(turn, before):
            _, count = self.bounds(self.query_head(turn))
            jax.lax.fori_loop(
                0, count, lambda step, _: fill(before + step, turn, step), None
            )
            return before + count

        if self.shared_steps:
            total = self.num_steps * self.heads_per_block
            jax.lax.fori_loop(0, total, fill_next, None)
        else:
            turns = self.heads_per_block
            total = jax.lax.fori_loop(0, turns, fill_turn, jnp.int32(0))
        jax.lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

    def wait(self, name: str, slot):
        """The stream's tile in a slot, when it has arrived."""
        plgpu.barrier_wait(self.scratch[f"{name}_ready"].at[slot])
        return self.scratch[f"{name}_tiles"].at[slot]

    def free(self, name: str, slot) -> None:
        """This warpgroup is done with the stream's tile in a slot."""
        plgpu.barrier_arrive(self.scratch[f"{name}_freed"].at[slot])

    def load_own(self, source, index, tile, ready) -> None:
        """Copy a tile that this warpgroup owns and wait for it."""
        plgpu.copy_gmem_to_smem(source.at[index], tile, ready)
        plgpu.barrier_wait(ready)

    def store_rows(self, refs, found, span) -> None:
        """Write vectors of the warpgroup's rows to [B, H, T] by name."""
        wg, x = jax.lax.axis_index("wg"), self.scratch
        for name, vector in found.items():
            x[f"{name}_rows"].at[wg][...] = vector
        plgpu.commit_smem()
        for name in found:
            target = refs[name].at[self.batch, self.head, span]
            plgpu.copy_smem_to_gmem(x[f"{name}_rows"].at[wg], target)
        plgpu.wait_smem_to_gmem(0)

    def over_steps(self, step, carry, bounds=None):
        """Run `step(n, carry, masked=...)` over full tiles, then over the others."""
        num_full, num_steps = bounds or (self.num_full, self.num_steps)
        full = functools.partial(step, masked=False)
        carry = jax.lax.fori_loop(0, num_full, full, carry)
        if self.plan.grid.form == "full":
            return carry
        part = functools.partial(step, masked=True)
        return jax.lax.fori_loop(num_full, num_steps, part, carry)
