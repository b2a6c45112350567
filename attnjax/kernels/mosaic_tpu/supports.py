"""What the TPU kernels take, and why not the rest."""

from attnjax.kernels import look_ups
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.compat import inside_shard_map
from attnjax.kernels.mosaic_tpu import blocks, decode_plan, hooks, steps
from attnjax.kernels.request import Request

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 512


def decodes(request: Request) -> bool:
    """Whether the kernel for few queries takes the request."""
    return request.q_len < hooks.MIN_QUERIES


def supports(request: Request) -> str | None:
    """Why the TPU kernels cannot compute the request, or None."""
    checks = (_device, _arrays, _lists, _spec)
    return next((reason for check in checks if (reason := check(request))), None)


def _device(request: Request) -> str | None:
    if request.target.platform != "tpu":
        return f"needs platform tpu, not {request.target.platform}"
    if request.target.num_devices > 1 and not inside_shard_map():
        return (
            f"has to sit inside shard_map in a program for "
            f"{request.target.num_devices} devices"
        )
    return None


def _arrays(request: Request) -> str | None:
    for dtype in request.dtypes:
        if dtype not in DTYPES:
            return f"takes bfloat16 and float32, not {dtype}"
    if max(request.head_dim, request.value_dim) > MAX_HEAD_DIM:
        return (
            f"needs D and E <= {MAX_HEAD_DIM}, not D={request.head_dim}, "
            f"E={request.value_dim}"
        )
    return decode_plan.problem(request) if decodes(request) else None


def _spec(request: Request) -> str | None:
    problems = (hooks.score_problem, hooks.map_problem, hooks.reweight_problem)
    found = next((found for problem in problems if (found := problem(request))), None)
    found = found or _tables(request)
    if found is None and blocks.masks_inside(_blocks(request)):
        found = hooks.mask_problem(request)
    return found


def _tables(request: Request) -> str | None:
    """Distances of queries and keys must fall by one along a tile."""
    moved = {"q_positions", "k_positions"} & request.operand_names
    if moved and look_ups.biases_by_distance(request.spec):
        return (
            "looks distances up along diagonals, which needs positions that count up "
            f"by one, not operand {min(moved)!r}"
        )
    return None


def _blocks(request: Request) -> BlockPlan:
    if decodes(request):
        return decode_plan.choose(request).blocks
    return blocks.plan_blocks(request, None)


def _lists(request: Request) -> str | None:
    plan = _blocks(request)
    if max(plan.num_q, plan.num_k) > steps.MOST_BLOCKS:
        return f"takes {steps.MOST_BLOCKS} blocks of tokens, not T={request.q_len}"
    if plan.num_q * plan.num_k > steps.MOST_WORDS and not steps.is_static(plan):
        return (
            f"takes {steps.MOST_WORDS} tiles when they are sorted on the device, not "
            f"{plan.num_q * plan.num_k}"
        )
    return None
