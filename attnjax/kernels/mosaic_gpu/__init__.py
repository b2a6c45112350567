"""Attention on Hopper GPUs as Pallas kernels (Mosaic GPU, sm_90a), with own backward.

Scores, masks and weight maps are traced into one kernel, so a variant costs its own
arithmetic and no trip through memory. Queries are padded to blocks of 128, head
dimensions to multiples of 64. Files: attend.py (derivative rule), forward.py,
backward.py and table.py (kernels), block.py (what they share), steps.py (which tiles
are visited), hooks.py, by_blocks.py, distances.py, rows.py, thin.py and finish.py (the
spec's functions on a tile), tiles.py (sizes), decode.py (few queries), launch.py and
shim.py (jax), refusals.py (what is refused), inline.py (user functions).

It was compiled for the H200 and interpreted, never timed: "auto" does not take it
until it was measured against cuDNN, so it has no rank and is asked for by name.
"""

import dataclasses
from collections.abc import Mapping

import jax

from attnjax.kernels import tuned
from attnjax.kernels.mosaic_gpu import by_blocks
from attnjax.kernels.mosaic_gpu.refusals import reason
from attnjax.kernels.mosaic_gpu.tiles import ROWS, Tiles
from attnjax.kernels.request import Request

NAME = "mosaic_gpu"
RANK: dict[str, int] = {}


def supports(request: Request) -> str | None:
    """Why the kernels cannot compute the request, or None."""
    return reason(request)


def run(
    request: Request,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    operands: Mapping[str, jax.Array],
    *,
    interpret: object = None,
    tiles: tuple | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Output [B, T, H, E] in q's dtype, and log-sum-exp [B, T, H] if normalised.

    Args:
        interpret: parameters of jax's Mosaic GPU interpreter, for machines without a
            GPU; None compiles.
        tiles: `Tiles` of the forward and of the backward kernels; None takes those
            that were measured on the device, or chooses them by shape.
    """
    from attnjax.kernels.mosaic_gpu.attend import Call, attend

    measured = None if tiles else tuned.sizes_of(NAME, request)
    if measured is not None:
        tiles = tuple(Tiles(*sizes) for sizes in measured)
        if by_blocks.narrow(request.spec.mask):
            tiles = tuple(dataclasses.replace(x, step=ROWS) for x in tiles)
    call = Call(request, interpret, *(tiles or ()))
    return attend(call, q, k, v, operands)
