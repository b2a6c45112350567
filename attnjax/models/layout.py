"""Where each layer's arrays lie, and how to move them to another layout.

Parameters are named by absolute layer ("layers/007/mixer/query/kernel") in every
message and table; in memory and in checkpoints layers of a repeated group are
stacked. `Layout` is the table between the two, stored with each checkpoint.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from attnjax.models import schedule


@dataclasses.dataclass(frozen=True)
class Layout:
    """The schedule of a model and the groups it is stacked in.

    Attributes:
        names: the instance name of each layer.
        groups: (pattern, repeats) of each scanned group.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[tuple[str, ...], int], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Layout":
        """The layout of a schedule."""
        return cls.of_stages([names])

    @classmethod
    def of_stages(cls, stages: Sequence[Sequence[str]]) -> "Layout":
        """The layout of schedules in a row; no group reaches over the end of one."""
        names = tuple(name for stage in stages for name in stage)
        groups = (schedule.groups(tuple(stage)) for stage in stages)
        return cls(names, tuple(itertools.chain.from_iterable(groups)))

    @property
    def places(self) -> list[tuple[int, int, int, str]]:
        """(group, place in the pattern, repeat, instance) of each layer."""
        places = []
        for g, (pattern, repeats) in enumerate(self.groups):
            for i in range(repeats):
                places += [(g, j, i, name) for j, name in enumerate(pattern)]
        return places

    def layers_of(self, group: int, sub: int) -> list[int]:
        """Absolute layers stacked at a group's place, in order."""
        return [
            layer
            for layer, (g, j, _, _) in enumerate(self.places)
            if (g, j) == (group, sub)
        ]

    def to_json(self) -> dict:
        """For the checkpoint's table."""
        return {
            "names": list(self.names),
            "groups": [[list(pattern), n] for pattern, n in self.groups],
        }

    @classmethod
    def from_json(cls, table: dict) -> "Layout":
        """The inverse of `to_json`."""
        return cls(
            tuple(table["names"]),
            tuple((tuple(pattern), n) for pattern, n in table["groups"]),
        )


def by_layer(stack: dict, layout: Layout) -> dict[int, dict]:
    """{layer: its arrays} of a stacked tree of arrays (numpy or jax)."""
    return {
        layer: jax.tree.map(lambda a, i=i: a[i], stack[f"group_{g}"][f"sub_{j}"])
        for layer, (g, j, i, _) in enumerate(layout.places)
    }


def stacked(layers: dict[int, dict], layout: Layout) -> dict:
    """The inverse of `by_layer`; arrays come out as numpy."""
    stack: dict = {}
    for g, (pattern, _) in enumerate(layout.groups):
        subs = {}
        for j in range(len(pattern)):
            rows = [layers[layer] for layer in layout.layers_of(g, j)]
            subs[f"sub_{j}"] = jax.tree.map(
                lambda *a: np.stack([np.asarray(x) for x in a]), *rows
            )
        stack[f"group_{g}"] = subs
    return stack


def relayout(
    stack: dict, source: Layout, target: Layout, *, keep: Sequence[int] | None = None
) -> dict:
    """Move a stacked tree from one layout to another.

    Args:
        stack: {"group_0": {"sub_0": arrays with a leading layer axis, ...}, ...}.
        source: its layout.
        target: the wanted one.
        keep: the source layer of each target layer; None keeps the numbering.
            With it a shorter model is made of some layers of a longer one.

    Returns:
        The same values in the target's groups.

    Raises:
        ValueError: when a layer of the target has no source, or layers that the
            target stacks together differ in structure.
    """
    if keep is None and source.groups == target.groups:
        return stack
    keep = range(len(target.names)) if keep is None else keep
    have = by_layer(stack, source)
    missing = [layer for layer in keep if layer not in have]
    if missing or len(keep) != len(target.names):
        raise ValueError(
            f"relayout: every target layer needs a source layer; got "
            f"{len(target.names)} target layers, sources {list(keep)} of "
            f"{len(source.names)}."
        )
    return stacked(dict(enumerate(have[layer] for layer in keep)), target)


def named(stack: dict, layout: Layout) -> dict[str, jax.Array]:
    """Every array by its absolute name, "layers/007/mixer/query/kernel"."""
    names = {}
    for layer, tree in by_layer(stack, layout).items():
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            names["/".join([f"layers/{layer:03d}", *path_of(path)])] = value
    return names


def absolute_names(path: tuple[str, ...], layout: Layout) -> list[str]:
    """The absolute names of one array of a model's params.

    Args:
        path: keys from the root, e.g. ("layers", "group_0", "sub_1", "mlp", ...).
        layout: the model's layout.

    Returns:
        One name a layer for a stacked array, else one name.
    """
    if path[0] != "layers":
        return ["/".join(str(p) for p in path)]
    group, sub = (int(part.rsplit("_", 1)[1]) for part in path[1:3])
    rest = "/".join(str(p) for p in path[3:])
    return [f"layers/{layer:03d}/{rest}" for layer in layout.layers_of(group, sub)]


def path_of(key_path) -> tuple[str, ...]:
    """The plain keys of a `jax.tree_util` key path."""
    return tuple(
        str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p))))
        for p in key_path
    )
