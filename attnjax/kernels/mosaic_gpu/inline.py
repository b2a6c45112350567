"""User functions reduced to operations that Mosaic GPU lowers.

Derivatives bring `add_any`, functions of jax.nn come wrapped with a derivative rule of
their own, and powers below 2 are spelled as powers; none of these is lowered, though
what they stand for is.
"""

from collections.abc import Callable

import jax

WRAPPERS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def inline(fn: Callable, *args):
    """fn(*args) with wrapped functions opened and `add_any` as an addition."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    flat = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), flat)


def _evaluate(jaxpr, consts, args) -> list:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(x):
        # Literals hold their value; variables do not. (Their classes live in
        # jax.extend, which imports all of Pallas.)
        return x.val if hasattr(x, "val") else env[x]

    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(x) for x in eqn.invars]
        if name in WRAPPERS:
            inner = eqn.params[WRAPPERS[name]]
            out = _evaluate(inner.jaxpr, inner.consts, values)
        elif name == "add_any":
            out = [jax.lax.add(*values)]
        elif name == "integer_pow" and eqn.params["y"] < 2:
            out = [small_power(*values, eqn.params["y"])]
        else:
            out = eqn.primitive.bind(*values, **eqn.params)
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(x) for x in jaxpr.outvars]


def small_power(x, power: int):
    """x^power for powers below 2, which are not lowered."""
    if power < 0:
        whole = x if power == -1 else jax.lax.integer_pow(x, -power)
        return 1 / whole
    return x if power else jax.lax.full_like(x, 1)
