"""The chunked recurrence on Hopper GPUs (Mosaic GPU, sm_90a), with own backward.

Chunks of 64 tokens, so that the products of a chunk are those of one warpgroup. Files:
recur.py (derivative rule: which kernel gives what), phases.py (what XLA makes before
the kernels: cumulative decays, decayed copies), pairs.py (pair weights of decays by
channel), inverse.py (the delta rule's triangles), scan.py (states, forward and back),
outputs.py and gradients.py (chunks in parallel), normaliser.py, block.py, tile.py and
launch.py (what they share), wide.py (wide heads in parts), refusals.py.

It was compiled for the H200 and interpreted, never timed: "auto" does not take it
until it was measured against `blocked`, so it has no rank and is asked for by name.
"""

import functools

import jax

from attnjax.kernels.linear.inputs import Inputs
from attnjax.kernels.linear.mosaic_gpu.refusals import MAX_DIM, reason
from attnjax.kernels.linear.mosaic_gpu.wide import in_parts
from attnjax.kernels.linear.request import LinearRequest

NAME = "mosaic_gpu"
RANK: dict[str, int] = {}
WHY_BY_NAME = ": its speed is not measured"


def supports(request: LinearRequest) -> str | None:
    """Why the kernels cannot compute the request, or None."""
    return reason(request)


def run(
    request: LinearRequest, inputs: Inputs, *, interpret: object = None
) -> tuple[jax.Array, jax.Array]:
    """[B, T, K, G, E] and the last state [B, K, D, E].

    Args:
        interpret: parameters of jax's Mosaic GPU interpreter, for machines without a
            GPU; None compiles.
    """
    from attnjax.kernels.linear.mosaic_gpu.recur import Call, recur

    return in_parts(
        functools.partial(recur, Call(request, interpret)),
        inputs,
        most=MAX_DIM,
        normalise=request.spec.normalise,
    )
