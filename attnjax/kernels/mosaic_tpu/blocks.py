"""Block sizes by shape and mask."""

import numpy as np

from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.mosaic_tpu.steps import EMPTY, static_kinds
from attnjax.kernels.request import Request

# Lanes of a vector register: blocks are multiples of it.
LANES = 128
# Square blocks that are weighed against one another, in tokens. A tile of 512 x 512
# float32 scores is 1 MiB, and a backward body holds about six of them in VMEM.
CANDIDATES = (512, 256, 128)
# What a step of the grid costs, in scores.
STEP_OVERHEAD = 32_768
# Features (of q, k or v) up to which the largest block fits VMEM.
WIDE = 256


def plan_blocks(request: Request, block_sizes: tuple[int, int] | None) -> BlockPlan:
    """Choose block sizes, or take the given ones."""
    if block_sizes is not None:
        return BlockPlan(request, *block_sizes)
    wide = max(request.head_dim, request.value_dim) > WIDE
    plans = [_plan(request, size) for size in CANDIDATES[1 if wide else 0 :]]
    return min(plans, key=_cost)


def _plan(request: Request, size: int) -> BlockPlan:
    """Blocks of `size`, cut to the padded lengths."""

    def cut(length: int) -> int:
        return min(size, -(-length // LANES) * LANES)

    return BlockPlan(request, cut(request.q_len), cut(request.kv_len))


def _cost(plan: BlockPlan) -> int:
    """Scores computed, padding and overhead included."""
    visited = int(np.count_nonzero(static_kinds(plan) != EMPTY))
    return visited * (plan.block_q * plan.block_k + STEP_OVERHEAD)
