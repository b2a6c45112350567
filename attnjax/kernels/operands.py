"""Arrays that a spec needs beside q, k and v: declarations, checks, tiles.

A mask, score step or weight map declares its arrays as `Operand`s. Axes are letters:
b batch, h query heads, t queries, s keys, and for arrays that no tile of scores reads
k kv heads, e value features, others any size; an axis may have size 1 where one value
serves the whole axis. Implementations cut operands into tiles that broadcast against
scores [B, H, t, s]; axes "*" marks an operand that is handed over whole.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from attnjax.kernels.errors import nearest

# How the operands of user functions are laid out, and so how their gradients are
# reduced: `ScoreFn(fn, operands, reduce)`, `MaskFn(fn, operands, layout)`.
LAYOUTS = {
    "tile": "bhts",
    "row": "bht",
    "column": "bhs",
    "head": "h",
    "batch": "b",
    "table": "*",
}
RANK4 = "bhts"


@dataclasses.dataclass(frozen=True)
class Operand:
    """The declaration of one array.

    Attributes:
        name: its key in the `operands` mapping.
        axes: the letters of its axes in order, or "*" for an array of any shape
            that is handed over whole.
        kind: "float", "int", "bool" or "any".
        trains: whether it has a gradient.
        shape: for axes "*", letters that its shape is checked by, "" for none.
            Letters beyond b, h, t, s, k and e stand for any size.
    """

    name: str
    axes: str
    kind: str = "float"
    trains: bool = False
    shape: str = ""


# Taken with every spec: coordinates of queries and keys, and which keys exist.
Q_OFFSET = Operand("q_offset", "b", "int")
Q_POSITIONS = Operand("q_positions", "bt", "int")
K_POSITIONS = Operand("k_positions", "bs", "int")
KV_MASK = Operand("kv_mask", "bs", "bool")
UNIVERSAL = (Q_OFFSET, Q_POSITIONS, K_POSITIONS, KV_MASK)

_KINDS = {"float": jnp.floating, "int": jnp.integer, "bool": jnp.bool_}


def merge_declarations(parts: Sequence[Sequence[Operand]]) -> tuple[Operand, ...]:
    """Union of declarations; one name with two meanings is refused."""
    seen: dict[str, Operand] = {}
    for operand in (operand for part in parts for operand in part):
        if seen.setdefault(operand.name, operand) != operand:
            raise ValueError(
                "AttentionSpec: an operand name has one layout; got operand "
                f"{operand.name!r} with axes {seen[operand.name].axes!r} and "
                f"{operand.axes!r}. Rename one of them."
            )
    return tuple(seen.values())


def check_operands(
    arrays: Mapping[str, jax.Array],
    declared: Sequence[Operand],
    sizes: Mapping[str, int],
) -> None:
    """Refuse missing, unknown or wrongly shaped operands.

    Args:
        arrays: what the caller gave.
        declared: what the spec needs; the universal ones are optional.
        sizes: size of each axis letter.

    Raises:
        ValueError: for a missing or unknown name or a wrong shape.
        TypeError: for a wrong dtype.
    """
    known = {operand.name: operand for operand in (*UNIVERSAL, *declared)}
    for name in arrays:
        if name not in known:
            raise ValueError(
                f"attention: operand {name!r} is not used by the spec. "
                f"{nearest(name, known)}"
            )
    for operand in declared:
        if operand.name not in arrays:
            raise ValueError(
                f"attention: the spec needs operand {operand.name!r} with axes "
                f"{_axes_text(operand)}; got {sorted(arrays) or 'no operands'}. "
                f"Pass operands={{{operand.name!r}: ...}}."
            )
    for name, array in arrays.items():
        _check_one(known[name], array, sizes)


def letters_of(operand: Operand) -> str:
    """Letters of the array's axes as far as they are known, "" for none."""
    return operand.shape if operand.axes == "*" else operand.axes


def _axes_text(operand: Operand) -> str:
    letters = letters_of(operand)
    return "[" + ", ".join(letters.upper()) + "]" if letters else "of any shape"


def _check_one(operand: Operand, array, sizes: Mapping[str, int]) -> None:
    wanted = _KINDS.get(operand.kind)
    if wanted is not None and not jnp.issubdtype(array.dtype, wanted):
        raise TypeError(
            f"attention: operand {operand.name!r} must be {operand.kind}; "
            f"got dtype={array.dtype}."
        )
    letters = letters_of(operand)
    if not letters:
        return
    legal = len(array.shape) == len(letters) and all(
        axis not in sizes or size in (1, sizes[axis])
        for size, axis in zip(array.shape, letters, strict=True)
    )
    if not legal and not (operand is Q_OFFSET and array.shape == ()):
        full = tuple(sizes.get(axis, "any") for axis in letters)
        raise ValueError(
            f"attention: operand {operand.name!r} must have shape "
            f"{_axes_text(operand)} = {full} (or 1 in an axis that it shares); "
            f"got shape={tuple(array.shape)}."
        )


def as_rank4(array: jax.Array, axes: str) -> jax.Array:
    """Insert axes of size 1 so that `array` broadcasts against [B, H, t, s]."""
    if axes == "*":
        return array
    missing = [i for i, axis in enumerate(RANK4) if axis not in axes]
    return jnp.expand_dims(array, missing)
