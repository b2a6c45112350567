"""Functions of a tile with vectors beside it, which keep thin arrays thin.

A function is traced on shapes [m, n], [m, 1], [1, n] and [1, 1]; in a kernel these are
a tile, a vector along one of its axes, and a number. A vector is spread over the tile
where the function does so, and not before.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.kernels.mosaic_gpu.inline import WRAPPERS, small_power
from attnjax.kernels.mosaic_gpu.shim import Machine

# What is handled here beyond elementwise operations.
REDUCTIONS = {
    "reduce_sum": (jnp.sum, 0.0),
    "reduce_max": (jnp.max, float("-inf")),
    "reduce_min": (jnp.min, float("inf")),
}
RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})


def shape_of(shape: tuple[int, int], *, rows: bool, columns: bool) -> tuple[int, int]:
    """The shape that an array has in a trace, by the axes of the tile it varies on."""
    return (shape[0] if rows else 1, shape[1] if columns else 1)


def evaluate(machine: Machine, fn: Callable, shapes, *args, width: int | None = None):
    """fn(*args) in a kernel.

    Args:
        shapes: what `fn` is traced on: for each argument its shape, of rank 2. Each
            arg is a tile, a vector or a number, accordingly; tiles may be wider.
        width: columns of tiles in registers, where they are more than those of the
            trace: the others do not count in sums over columns.
    """
    given = [
        jax.ShapeDtypeStruct(shape, x.dtype)
        for shape, x in zip(shapes, args, strict=True)
    ]
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*given)
    flat = _Evaluation(machine, width)(closed.jaxpr, closed.consts, args)
    return jax.tree.unflatten(jax.tree.structure(out), flat)


class _Evaluation:
    def __init__(self, machine: Machine, width: int | None):
        self.machine, self.width = machine, width

    def __call__(self, jaxpr, consts, args) -> list:
        names = (*jaxpr.constvars, *jaxpr.invars)
        env = dict(zip(names, (*consts, *args), strict=True))

        def read(x):
            return x.val if hasattr(x, "val") else env[x]

        for eqn in jaxpr.eqns:
            out = self._apply(eqn, [read(x) for x in eqn.invars])
            env.update(zip(eqn.outvars, out, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _apply(self, eqn, values: list) -> list:
        name = eqn.primitive.name
        if name in WRAPPERS:
            inner = eqn.params[WRAPPERS[name]]
            return self(inner.jaxpr, inner.consts, values)
        if name in REDUCTIONS:
            return [self._reduce(eqn, *values)]
        if name == "broadcast_in_dim":
            return [self._spread(eqn, *values)]
        if name in RESHAPES:
            return [self._same(eqn, *values)]
        if name == "add_any":
            return [jax.lax.add(*values)]
        if name == "integer_pow" and eqn.params["y"] < 2:
            return [small_power(*values, eqn.params["y"])]
        values = [self._meet(*x, eqn) for x in zip(eqn.invars, values, strict=True)]
        out = eqn.primitive.bind(*values, **eqn.params)
        return out if eqn.primitive.multiple_results else [out]

    def _meet(self, var, x, eqn):
        """An argument of an elementwise operation, which may have axes of size 1 that
        another one does not have."""
        wanted = self._shape(eqn.outvars[0].aval.shape)
        before = self._shape(var.aval.shape)
        if len(before) == len(wanted) or not var.aval.shape:
            return x
        if not before:
            return jax.lax.broadcast_in_dim(x, wanted, ())
        axis = next(i for i, n in enumerate(var.aval.shape) if n > 1)
        return self.machine.spread(x, wanted, axis)

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What an array of this shape has in registers."""
        thick = tuple(n for n in shape if n > 1)
        if len(thick) == 2 and self.width is not None:
            return (thick[0], self.width)
        return thick

    def _spread(self, eqn, x):
        wanted = self._shape(eqn.params["shape"])
        before = self._shape(eqn.invars[0].aval.shape)
        if len(before) == len(wanted):
            return x
        if not before:
            return jax.lax.broadcast_in_dim(x, wanted, ())
        source = eqn.invars[0].aval.shape
        kept = next(i for i, n in enumerate(source) if n > 1)
        return self.machine.spread(x, wanted, eqn.params["broadcast_dimensions"][kept])

    def _same(self, eqn, x):
        before, after = (
            self._shape(v.aval.shape) for v in (eqn.invars[0], eqn.outvars[0])
        )
        if before != after:
            raise NotImplementedError(
                f"a kernel keeps the axes of a tile; got {eqn.primitive.name} from "
                f"{before} to {after}"
            )
        return x

    def _reduce(self, eqn, x):
        fn, neutral = REDUCTIONS[eqn.primitive.name]
        shape = eqn.invars[0].aval.shape
        thick = [i for i in eqn.params["axes"] if shape[i] > 1]
        if not thick:
            return x
        if thick != [1] or shape[0] == 1:
            raise NotImplementedError(
                f"a kernel reduces a tile over its last axis; got {eqn.primitive.name} "
                f"of {shape} over {eqn.params['axes']}"
            )
        if self.width not in (None, shape[1]):
            columns = self.machine.iota((shape[0], self.width), 1)
            x = jnp.where(columns < shape[1], x, neutral)
        return fn(x, axis=1)
