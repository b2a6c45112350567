"""The epilogue inside the forward kernel: steps on finished rows [block_q, E].

Its operands are laid out by the axes along which they really vary:
    scalar    neither t nor e: [B|1, H|1] in scalar memory
    row       t alone: [B|1, H|1, 1, T]
    features  e alone: [B|1, H|1, 1, E]
    tile      both: [B|1, H|1, T, E]
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnjax.kernels import epilogue, tiles
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.mosaic_tpu import layout
from attnjax.kernels.mosaic_tpu.call import Walk

Arrays = Mapping[str, jax.Array]
_FORMS = {
    (False, False): "scalar",
    (True, False): "row",
    (False, True): "features",
    (True, True): "tile",
}


def forms(plan: BlockPlan) -> dict[str, str]:
    """The form of each operand of the epilogue."""
    shapes = dict(plan.request.operand_shapes)
    found = {}
    for operand in plan.request.spec.epilogue_operands:
        sizes = dict(zip(operand.axes, shapes[operand.name], strict=True))
        varies = tuple(sizes.get(letter, 1) > 1 for letter in "te")
        found[operand.name] = _FORMS[varies]
    return found


def arrange(plan: BlockPlan, late: Arrays) -> dict[str, jax.Array]:
    """Operands of the epilogue in the layout of their forms."""
    known, length = forms(plan), plan.num_q * plan.block_q
    axes = {o.name: o.axes for o in plan.request.spec.epilogue_operands}
    arranged = {}
    for name, array in late.items():
        x = tiles.heads_first(epilogue.spread(array, axes[name]))
        if known[name] == "scalar":
            arranged[name] = x.astype(jnp.float32).reshape(x.shape[:2])
        elif known[name] == "row":
            x = jnp.swapaxes(x, 2, 3).astype(jnp.float32)
            arranged[name] = layout.pad_to(x, (*x.shape[:3], length))
        elif known[name] == "tile":
            arranged[name] = layout.pad_to(x, (*x.shape[:2], length, x.shape[3]))
        else:
            arranged[name] = x.astype(jnp.float32)
    return arranged


def specs(walk: Walk, arranged: Arrays) -> dict[str, pl.BlockSpec]:
    """How they are cut."""
    known = forms(walk.plan)
    return {name: _spec(walk, known[name], x.shape) for name, x in arranged.items()}


def _spec(walk: Walk, form: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    if form == "scalar":
        return pl.BlockSpec(memory_space=pltpu.SMEM)
    block_q = walk.plan.block_q
    sizes = {
        "row": (1, block_q),
        "features": (1, shape[3]),
        "tile": (block_q, shape[3]),
    }[form]

    def index(*grid):
        at = walk.place(*grid)
        last = {"row": (0, at.i), "features": (0, 0), "tile": (at.i, 0)}[form]
        return (at.b if shape[0] > 1 else 0, at.h if shape[1] > 1 else 0, *last)

    return pl.BlockSpec((None, None, *sizes), index)


def apply(plan: BlockPlan, rows: jax.Array, refs: Mapping, place) -> jax.Array:
    """The epilogue's steps on rows [block_q, E] in float32."""
    known = forms(plan)
    for step in plan.request.spec.epilogue:
        arrays = {
            o.name: _read(known[o.name], refs[o.name], place) for o in step.operands
        }
        rows = step.apply(rows, arrays)
    return rows


def _read(form: str, ref, place) -> jax.Array:
    if form in ("scalar", "row"):
        return layout.read(form, ref, place, swapped=False)
    return ref[...].astype(jnp.float32)
