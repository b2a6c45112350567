"""The epilogue at the end of the forward kernel: steps on finished rows [64, E].

Its operands are laid out by the axes along which they really vary:
    number    neither t nor e: [B|1, H|1, 1]
    row       t alone: [B|1, H|1, T]
    features  e alone: [B|1, H|1, E]
    tile      both: [B|1, T, H|1, E], as they come; copied into shared memory while
              the kernel works where it has room, read from global memory otherwise
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attnjax.kernels import epilogue
from attnjax.kernels.mosaic_gpu import thin
from attnjax.kernels.mosaic_gpu.shim import Machine
from attnjax.kernels.mosaic_gpu.tiles import (
    BLOCK,
    ROWS,
    SHARED_MEMORY,
    Tiles,
    forward_bytes,
    padded_dim,
)
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]
_FORMS = {
    (False, False): "number",
    (True, False): "row",
    (False, True): "features",
    (True, True): "tile",
}


@dataclasses.dataclass(frozen=True)
class Late:
    """One operand of the epilogue in global memory.

    Attributes:
        name: its name.
        form: how it is laid out.
        per_batch, per_head: whether it differs along those axes.
        staged: whether a tile of it is copied into shared memory.
    """

    name: str
    form: str
    per_batch: bool
    per_head: bool
    staged: bool = False


def refusal(request: Request) -> str | None:
    """Why the steps cannot run on tiles in registers, or None."""
    for operand in request.spec.epilogue_operands:
        if set(operand.axes) - set(epilogue.OUTPUT_AXES):
            return (
                f"reads operands of the epilogue by row and feature; {operand.name!r} "
                f"has axes {operand.axes!r}"
            )
    if request.spec.epilogue and request.value_dim == 1:
        return "keeps rows of an epilogue apart from features; E is 1"
    return None


def hold(request: Request, sizes: Tiles, q_len: int, late: Arrays, dtype):
    """Arrange the operands of the epilogue for the forward kernel.

    Args:
        q_len: queries with padding.
        dtype: of q; tiles of it can be copied into shared memory.
    """
    width = padded_dim(request.value_dim)
    free = SHARED_MEMORY - forward_bytes(sizes, padded_dim(request.head_dim), width)
    held, arrays = [], []
    for operand in request.spec.epilogue_operands:
        x = epilogue.spread(late[operand.name], operand.axes)
        b, t, h, e = x.shape
        form, staged = _FORMS[t > 1, e > 1], False
        if form == "tile":
            x = jnp.pad(x, ((0, 0), (0, q_len - t), (0, 0), (0, width - e)))
            size = BLOCK * width * x.dtype.itemsize
            staged = x.dtype == dtype and size <= free
            free -= size if staged else 0
        else:
            x = x.astype(jnp.float32).swapaxes(1, 2)
            x = x.reshape(b, h, -1)
            longer = {"row": q_len, "features": width}.get(form, 1)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, longer - x.shape[2])))
        held.append(Late(operand.name, form, b > 1, h > 1, staged))
        arrays.append(x)
    return tuple(held), arrays


def read(late: Late, ref, machine: Machine, where, staged=None):
    """The operand of 64 rows of one head, float32: a tile, a vector or a number.

    Args:
        where: (batch index, first query, head).
        staged: its tile in shared memory, if it is there.
    """
    b, first, h = where
    b, h = b if late.per_batch else 0, h if late.per_head else 0
    if late.form == "number":
        return ref[b, h, 0]
    span = pl.ds(first, ROWS)
    if late.form == "row":
        return machine.vector(ref, (b, h, span), 0)
    if late.form == "features":
        return machine.vector(ref, (b, h, slice(None)), 1)
    if staged is not None:
        return machine.tile(staged, ()).astype(jnp.float32)
    return machine.tile(ref, (b, span, h, slice(None))).astype(jnp.float32)


def apply(
    request: Request, machine: Machine, late: tuple[Late, ...], rows: jax.Array, read
) -> jax.Array:
    """The steps on rows [64, E] in float32; columns of padding may hold anything.

    Args:
        read: operand -> its values.
    """
    forms = {x.name: x.form for x in late}
    by_name = {x.name: x for x in late}
    whole = (ROWS, request.value_dim)
    for step in request.spec.epilogue:
        names = [operand.name for operand in step.operands]
        shapes = [_shape(whole, forms[name]) for name in names]

        def run(o, *arrays, step=step, names=names):
            return step.apply(o, dict(zip(names, arrays, strict=True)))

        given = [read(by_name[name]) for name in names]
        rows = thin.evaluate(
            machine, run, [whole, *shapes], rows, *given, width=rows.shape[1]
        )
    return rows


def _shape(whole: tuple[int, int], form: str) -> tuple[int, int]:
    return thin.shape_of(
        whole, rows=form in ("row", "tile"), columns=form in ("features", "tile")
    )


def example(request: Request):
    """The steps' jaxpr as the kernel runs them, for a look at its operations.

    Raises:
        NotImplementedError, TypeError, ValueError: where they do not run on a tile.
    """
    spec, shapes = request.spec, dict(request.operand_shapes)
    late, values = [], {}
    for operand in spec.epilogue_operands:
        sizes = dict(zip(operand.axes, shapes[operand.name], strict=True))
        form = _FORMS[sizes.get("t", 1) > 1, sizes.get("e", 1) > 1]
        late.append(Late(operand.name, form, per_batch=False, per_head=False))
        shape = _shape((ROWS, request.value_dim), form)
        values[operand.name] = jnp.zeros([n for n in shape if n > 1], jnp.float32)

    def run(o):
        machine = Machine(interpret=True)
        return apply(request, machine, tuple(late), o, lambda x: values[x.name])

    return jax.make_jaxpr(run)(jnp.zeros((ROWS, request.value_dim), jnp.float32))
