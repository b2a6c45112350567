"""Communication between devices, as the compiled module does it."""

import dataclasses
import math
import re

from attnjax.planning.hlo import Instruction, Module, arrays, num_bytes

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication among groups of one size.

    Attributes:
        kind: HLO's name.
        group: devices in a group.
        nodes: that a group's devices lie in.
        count: how often it runs in a step.
        bytes: of the whole array (the larger of what goes in and comes out of a
            device), over all runs.
    """

    kind: str
    group: int
    nodes: int
    count: float
    bytes: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by the ring algorithm."""
        return self._passed_on(self.group)

    @property
    def sent_across(self) -> float:
        """Bytes that a device sends to other nodes.

        Those of a group that are in one node share what leaves it.
        """
        if self.nodes < 2:
            return 0.0
        return self._passed_on(self.nodes) * self.nodes / self.group

    def _passed_on(self, parts: int) -> float:
        """Bytes that leave one of `parts` members of a ring."""
        if self.kind.startswith("collective"):
            return self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (parts - 1) / parts


def collectives(module: Module, devices: int, node: int | None) -> list[Collective]:
    """All communication of a run of `module`, loops counted as often as they run."""
    found: dict[tuple, list[float]] = {}
    for times, _, _, computation, instruction in module.each():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        ids = first_group(instruction.attributes, devices)
        if len(ids) < 2 and not kind.startswith("collective"):
            continue
        nodes = 1 if node is None else len({i // node for i in ids})
        total = found.setdefault((kind, len(ids), nodes), [0.0, 0.0])
        total[0] += times
        total[1] += times * _size(instruction, computation)
    rows = [Collective(*key, *total) for key, total in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _size(instruction: Instruction, computation: dict) -> float:
    inputs = sum(
        num_bytes(computation[name].shape)
        for name in instruction.operands
        if name in computation
    )
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        # (inputs, outputs): what is not input has come out.
        return max(inputs, num_bytes(instruction.shape) - inputs)
    return (
        max(inputs, num_bytes(instruction.shape))
        if arrays(instruction.shape)
        else inputs
    )


def first_group(attributes: str, devices: int) -> list[int]:
    """Ids of the devices in the first group of a collective."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return [int(pairs.group(1)), int(pairs.group(2))]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return [int(n) for n in listed.group(1).split(",")]
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    )
    if iota:
        import numpy as np

        sizes = [int(n) for n in iota.group(2).split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if iota.group(3):
            ids = ids.transpose([int(n) for n in iota.group(3).split(",")])
        group = int(iota.group(1).split(",")[-1])
        return ids.reshape(-1)[:group].tolist()
    return _mesh_group(attributes) or list(range(devices))


def _mesh_group(attributes: str) -> list[int] | None:
    """The first group of "mesh['a'=4,'b'=2] {'a'}", or None."""
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\s*\{([^}]*)\}", attributes
    )
    if not found:
        return None
    import numpy as np

    axes = re.findall(r"'([^']+)'=(\d+)", found.group(1))
    ids = np.arange(math.prod(int(n) for _, n in axes)).reshape(
        [int(n) for _, n in axes]
    )
    # A part of an axis is written 'a':(before)size.
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(2))
    picks = []
    for name, size in axes:
        mine = [(b, s) for n, b, s in parts if n == name]
        if not mine:
            picks.append([0])
        elif not mine[0][1]:
            picks.append(list(range(int(size))))
        else:
            before, part = int(mine[0][0]), int(mine[0][1])
            stride = int(size) // (before * part)
            picks.append([i * stride for i in range(part)])
    return ids[np.ix_(*picks)].reshape(-1).tolist()
