"""State trees as nested dicts of named arrays: how a checkpoint stores them.

Optimizer states are named tuples and tuples; on disk every node is a dict, so that a
checkpoint opens without the classes that made it. "mu" of the first part of a chained
optimizer is `opt/0/mu/...`. None and empty tuples are not stored; empty dicts are
kept by name, since code that walks layers expects them.
"""

from typing import Any

import jax
import numpy as np

_ESCAPES = (("%", "%25"), ("/", "%2F"), (".", "%2E"))


def named(tree: Any) -> dict[str, Any]:
    """Path -> leaf, e.g. {"opt/0/mu/head/kernel": array}, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_word(key) for key in path): leaf for path, leaf in leaves}


def empties(tree: Any) -> list[str]:
    """The paths of the empty dicts in a tree."""

    def is_empty(node):
        return isinstance(node, dict) and not node

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)
    return ["/".join(_word(k) for k in path) for path, leaf in leaves if is_empty(leaf)]


def nest(leaves: dict[str, Any]) -> dict:
    """Path -> leaf as nested dicts, the words of the paths being the keys."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *groups, last = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return tree


def at(tree: dict, path: str) -> Any:
    """The leaf of a tree made by `nest`."""
    for word in path.split("/"):
        tree = tree[word]
    return tree


def unescaped(tree: dict) -> dict:
    """Nested dicts with the words of their keys as they were before `named`."""
    return {
        _plain(key): unescaped(value) if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def like(target: Any, leaves: dict[str, Any]) -> Any:
    """`leaves` (as from `named`) in the structure of `target`."""
    _, structure = jax.tree_util.tree_flatten(target)
    return jax.tree_util.tree_unflatten(structure, [leaves[p] for p in named(target)])


def signature(leaves: dict[str, Any]) -> dict[str, list]:
    """Path -> [shape, dtype name]: JSON that says what a checkpoint holds."""
    return {p: [list(leaf.shape), str(leaf.dtype)] for p, leaf in leaves.items()}


def differences(saved: dict[str, list], wanted: dict[str, list]) -> list[str]:
    """What was saved ("- path [shape] dtype") against what is wanted ("+ ...")."""
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(path), wanted.get(path)
        if old == new:
            continue
        lines += [f"- {path} {old[0]} {old[1]}"] if old else []
        lines += [f"+ {path} {new[0]} {new[1]}"] if new else []
    return lines


def check(leaves: dict[str, Any]) -> None:
    """Refuse leaves that cannot be stored exactly.

    Raises:
        TypeError: for a leaf that is not an array, or is an array of typed PRNG keys.
    """
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(
                f"checkpoint: every leaf must be an array; got {path}="
                f"{type(leaf).__name__}. Put it into meta, or make it an array."
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"checkpoint: typed PRNG keys are not stored; got {path}={leaf.dtype}. "
                "Keep the seed, or jax.random.key_data(key)."
            )


def _word(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            text = str(getattr(key, field))
            break
    else:
        text = str(key)
    for plain, escaped in _ESCAPES:
        text = text.replace(plain, escaped)
    return text


def _plain(word: str) -> str:
    for plain, escaped in reversed(_ESCAPES):
        word = word.replace(escaped, plain)
    return word
