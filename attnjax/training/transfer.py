"""Starting a run from the parameters of another one, matched by absolute name."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from attnjax.core.errors import UserError
from attnjax.models.layout import Layout, absolute_names, named, path_of


@dataclasses.dataclass(frozen=True)
class Report:
    """What an `init_from` did.

    Attributes:
        matched: names that were taken over.
        fresh: names of the new model that the other run does not have.
        unused: names of the other run that the new model does not have.
    """

    matched: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report for people."""

        def listed(names):
            return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")

        total = len(self.matched) + len(self.fresh)
        lines = [f"init_from: {len(self.matched)} of {total} arrays taken over"]
        if self.fresh:
            lines.append(
                f"  newly initialised ({len(self.fresh)}): {listed(self.fresh)}"
            )
        if self.unused:
            lines.append(f"  not used ({len(self.unused)}): {listed(self.unused)}")
        return lines


def all_named(params: dict, layout: Layout) -> dict[str, np.ndarray]:
    """Every array of a model's params by its absolute name."""
    names = named(params["layers"], layout)
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        keys = path_of(path)
        if keys[0] != "layers":
            names["/".join(keys)] = value
    return names


def transfer(
    params: dict,
    layout: Layout,
    source: dict[str, np.ndarray],
    *,
    layers: Sequence[int] | None = None,
) -> tuple[dict, Report]:
    """Fill `params` from the named arrays of another run.

    Args:
        params: the new model's initial values (numpy or jax arrays).
        layout: its layout.
        source: `all_named` of the other run.
        layers: the other run's layer for each layer of the new model; None keeps
            the numbers.

    Returns:
        numpy params with the structure of `params`, and what was done.

    Raises:
        UserError: when a name is in both with another shape, or nothing matches.
    """
    depth = len(layout.names)
    if layers is not None and len(layers) != depth:
        raise UserError(
            f"config.train.init_layers: must name one layer for each of {depth}; "
            f"got {len(layers)} ({list(layers)})."
        )
    matched, fresh, wrong, used = [], [], [], set()

    def find(name: str) -> str:
        if layers is None or not name.startswith("layers/"):
            return name
        _, layer, rest = name.split("/", 2)
        return f"layers/{layers[int(layer)]:03d}/{rest}"

    def one(name: str, value: np.ndarray) -> np.ndarray:
        other = find(name)
        if other not in source:
            fresh.append(name)
            return value
        found = np.asarray(source[other])
        if found.shape != value.shape:
            wrong.append(f"- {other} {found.shape}\n+ {name} {value.shape}")
            return value
        matched.append(name)
        used.add(other)
        return found.astype(value.dtype)

    def fill(path, leaf):
        keys, leaf = path_of(path), np.asarray(leaf)
        names = absolute_names(keys, layout)
        if keys[0] != "layers":
            return one(names[0], leaf)
        return np.stack([one(n, leaf[i]) for i, n in enumerate(names)])

    filled = jax.tree_util.tree_map_with_path(fill, params)
    if wrong:
        raise UserError(
            "init_from: these arrays have other shapes in the other run (-) than here "
            "(+):\n" + "\n".join(wrong[:8])
        )
    if not matched:
        raise UserError(
            "init_from: the other run has no parameter of this model; got "
            f"{', '.join(sorted(source)[:4])}, ..."
        )
    unused = tuple(sorted(set(source) - used))
    return filled, Report(tuple(matched), tuple(fresh), unused)
