"""Block sizes by measurement, or by shape and mask."""

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.kernels import look_ups, tuned
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.mosaic_tpu.hooks import mask_problem
from attnjax.kernels.mosaic_tpu.steps import EMPTY, PARTIAL, is_static, static_kinds
from attnjax.kernels.request import Request

# Lanes of a vector register: blocks are multiples of it.
LANES = 128
# (block_q, block_k) that are weighed against one another, in tokens. The bodies hold up
# to a dozen tiles of float32 in the 16 MiB of VMEM that a kernel has; the first is for
# requests that keep little else there, and the first two are not for wide features.
WIDEST = (512, 1024)
CANDIDATES = (WIDEST, (512, 512), (256, 256), (128, 128))
FEW_FEATURES, MANY_FEATURES = 128, 256
# What a step of the grid costs, in scores: a third of a microsecond.
STEP_OVERHEAD = 2**16


def plan_blocks(request: Request, block_sizes: tuple[int, int] | None) -> BlockPlan:
    """Block sizes as given, as measured on the device, or by shape."""
    if block_sizes is not None:
        return BlockPlan(request, *block_sizes)
    measured = tuned.sizes_of("mosaic_tpu", request)
    if measured is not None:
        return _plan(request, *measured)
    plans = [_plan(request, *size) for size in CANDIDATES[_first(request) :]]
    plans = [plan for plan in plans if _whole_marks(plan)] or plans[-1:]
    if mask_problem(request):
        plans = [plan for plan in plans if not masks_inside(plan)] or plans
    return min(plans, key=_cost)


def masks_inside(plan: BlockPlan) -> bool:
    """Whether a kernel evaluates the mask: not if each tile is empty or full."""
    return not is_static(plan) or PARTIAL in static_kinds(plan)


def _first(request: Request) -> int:
    """The largest of the candidates that fits beside the other blocks."""
    features = max(request.head_dim, request.value_dim)
    if features > MANY_FEATURES:
        return 2
    tiles = any(operand.axes in ("bhts", "*") for operand in request.spec.operands)
    light = features <= FEW_FEATURES and set(request.dtypes) == {"bfloat16"}
    # A user's function keeps as much as it likes.
    known = all(step.finite for step in request.spec.score)
    known = known and request.spec.reweight is None
    return 0 if light and known and not tiles else 1


def _whole_marks(plan: BlockPlan) -> bool:
    """Whether no tile is larger than a block that an array marks: what the array
    leaves out is then skipped."""
    masks = look_ups.masks_by_blocks(plan.request.spec).values()
    return all(
        plan.block_q <= max(LANES, mask.block_q)
        and plan.block_k <= max(LANES, mask.block_k)
        for mask in masks
        if not mask.complete
    )


def _plan(request: Request, block_q: int, block_k: int) -> BlockPlan:
    """Blocks of at most these sizes, cut to the padded lengths."""

    def cut(size: int, length: int) -> int:
        return min(size, -(-length // LANES) * LANES)

    return BlockPlan(request, cut(block_q, request.q_len), cut(block_k, request.kv_len))


def _cost(plan: BlockPlan) -> int:
    """Scores computed, padding and overhead included."""
    visited = int(np.count_nonzero(static_kinds(plan) != EMPTY))
    return visited * (plan.block_q * plan.block_k + STEP_OVERHEAD)


def turn(x: jax.Array) -> jax.Array:
    """A row [1, n] as a column [n, 1], or back, by a transposition of full lanes."""
    if x.shape[0] == 1:
        return jnp.broadcast_to(x, (LANES, x.shape[1])).T[:, :1]
    return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]
