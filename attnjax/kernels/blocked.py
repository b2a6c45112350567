"""Attention in O(T) memory in plain JAX, with its own backward pass.

Queries are cut into blocks of `block_q` and keys into blocks of `block_k`. Tiles that
the mask leaves empty are skipped and tiles that it leaves full are computed without
it, both from a table made at trace time; row statistics are carried from tile to
tile (Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135). The backward
pass recomputes the weights from the rows' log-sums. When one tile covers everything,
its weights are kept instead; a few queries read a long cache where it lies.
"""

import functools
from collections.abc import Mapping

import jax

from attnjax.kernels import (
    blocked_backward,
    blocked_decode,
    blocked_forward,
    blocked_reweight,
    epilogue,
    one_tile,
    tiles,
)
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.choose_blocks import plan_blocks
from attnjax.kernels.request import Request
from attnjax.kernels.tile_table import tile_table

NAME = "blocked"
RANK = {"cpu": 20, "gpu": 10, "tpu": 10}

Arrays = Mapping[str, jax.Array]


def supports(request: Request) -> str | None:
    """None: every spec, on every target that jax compiles for."""
    del request


def run(
    request: Request,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    operands: Arrays,
    *,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Output [B, T, H, E] in q's dtype, and log-sum-exp [B, T, H] if normalised.

    Args:
        block_sizes: (block_q, block_k) in tokens; None chooses by shape.
    """
    spec = request.spec
    plan = plan_blocks(request, block_sizes)
    placed = tiles.place_queries(tiles.of_tiles(spec, operands), request.q_len)
    known = tiles.declarations(spec)
    trained = {n: x for n, x in placed.items() if known[n].trains}
    fixed = {n: x for n, x in placed.items() if not known[n].trains}
    out, lse = _attend(plan, q, k, v, trained, fixed)
    if spec.epilogue:
        out = epilogue.run_steps(spec.epilogue, out, operands).astype(q.dtype)
    return out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: BlockPlan, q, k, v, trained: Arrays, fixed: Arrays):
    return _attend_fwd(plan, q, k, v, trained, fixed)[0]


def _attend_fwd(plan: BlockPlan, q, k, v, trained: Arrays, fixed: Arrays):
    operands = {**trained, **fixed}
    if plan.one_tile:
        out, lse, kept = one_tile.forward(plan.request, q, k, v, operands)
    else:
        padded = blocked_forward.pad_operands(plan, operands)
        table = tile_table(plan, padded)
        if plan.decodes:
            out, lse = blocked_decode.forward(plan, q, k, v, operands, table)
            kept = (out, lse, table)
        elif plan.request.spec.reweight is None:
            out, lse = blocked_forward.forward(plan, q, k, v, padded, table)
            kept = (out, lse, table)
        else:
            out, kept = blocked_reweight.forward(plan, (q, k, v), padded, table)
            lse = None
    return (out, lse), (q, k, v, trained, fixed, kept)


def _attend_bwd(plan: BlockPlan, residuals, cotangents):
    q, k, v, trained, fixed, kept = residuals
    operands = {**trained, **fixed}
    if plan.one_tile:
        grads = one_tile.backward(plan.request, (q, k, v), operands, kept, cotangents)
    else:
        again = plan.request.spec.reweight is not None
        form = blocked_reweight if again else blocked_backward
        grads = form.backward(plan, (q, k, v), operands, kept, cotangents)
    dq, dk, dv, d_operands = grads
    d_trained = {n: d_operands[n].astype(x.dtype) for n, x in trained.items()}
    dq, dk, dv = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return dq, dk, dv, d_trained, None


_attend.defvjp(_attend_fwd, _attend_bwd)
