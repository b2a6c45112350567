"""Parameters whose first value depends on the seed and their path alone.

Two variants of a model then start with equal values wherever they share a
parameter, whatever order their modules are built in and whether their layers are
scanned or not.
"""

import zlib
from collections.abc import Callable

import jax
from flax import nnx

Initializer = Callable[..., jax.Array]


class Buffer(nnx.Variable):
    """State without a gradient (running means): saved, sharded, never optimised."""


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], init: Initializer, *, dtype
) -> nnx.Param:
    """A parameter of `shape` that remembers how it is initialised.

    Args:
        rngs: gives the value that the parameter has in a module used on its own;
            `materialize` draws it again from the path.
        shape: its shape.
        init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
        dtype: storage dtype.
    """
    return nnx.Param(init(rngs.params(), shape, dtype), initializer=init)


def buffer(value: jax.Array) -> Buffer:
    """State without a gradient, starting at `value`."""
    return Buffer(value)


def path_text(path: tuple) -> str:
    """A parameter path as text: ("mixer", "query", 0) -> "mixer/query/0"."""
    return "/".join(str(part) for part in path)


def path_key(key: jax.Array, path: tuple) -> jax.Array:
    """A key for the parameter at `path`: a function of `key` and the names alone."""
    return jax.random.fold_in(key, zlib.crc32(path_text(path).encode()) & 0x7FFFFFFF)


def materialize(module: nnx.Module, key: jax.Array, *, index=None) -> dict:
    """Initial values of every parameter of `module`, as a plain nested dict.

    Args:
        module: a built module.
        key: from the seed (and the module's place in the model).
        index: int32 scalar, the layer; folded in after the path, so that a stack
            of layers is a vmap over it.

    Returns:
        Values drawn from (key, path, index). A parameter that carries no
        initializer (made by a foreign module) keeps the value it was built with.
    """
    state = nnx.state(module, nnx.Param)
    values = []
    for path, variable in nnx.to_flat_state(state):
        init = variable.get_metadata().get("initializer")
        value = variable.get_value()
        if init is not None:
            own = path_key(key, path)
            if index is not None:
                own = jax.random.fold_in(own, index)
            value = init(own, value.shape, value.dtype)
        values.append((path, value))
    return nest(values)


def nest(values) -> dict:
    """[(path, value)] -> nested dict with string keys."""
    tree: dict = {}
    for path, value in values:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree
