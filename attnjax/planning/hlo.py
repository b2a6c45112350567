"""Reading a compiled module's text: costs of loops are counted as often as they run.

XLA's own cost analysis counts the body of a loop once, and on GPUs gives nothing. Here
every instruction is weighted by the trip counts of the loops around it.
"""

import dataclasses
import math
import re
from functools import cached_property

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "async-done",
    "opt-barrier", "async-start", "async-update", "copy-done",
}  # fmt: skip
_CALLS = re.compile(
    r"\b(calls|body|condition|to_apply|branch_computations|true_computation"
    r"|false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, opcode: as in the text.
        shape: text of the result's shape.
        operands: names of the operands; for a parameter or constant its number.
        attributes: what follows the operands.
        is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False
    literal: str = ""

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """Computations it calls, by attribute."""
        return {
            key: _NAME.findall(text) for key, text in _CALLS.findall(self.attributes)
        }


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array of a shape's text."""
    return [
        (kind, tuple(int(n.strip("<=")) for n in dims.split(",") if n))
        for kind, dims in _ARRAY.findall(shape)
    ]


def num_bytes(shape: str) -> float:
    """Bytes of all arrays of a shape's text."""
    return sum(math.prod(dims) * _bits(kind) / 8 for kind, dims in arrays(shape))


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(re.search(r"\d+", kind).group())


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals or not left.lstrip("ROT ").startswith("%"):
        return None
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opening = rest.find("(")
    if opening < 1:
        return None
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=_NAME.search(left).group(1),
        opcode=rest[:opening],
        shape=shape,
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[closing + 1 :],
        is_root=left.startswith("ROOT"),
        literal=inside,
    )


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed module.

    Attributes:
        computations: name -> its instructions by name.
        entry: name of the entry computation.
        files: id of a stack frame -> Python files that called one another there.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    files: dict[str, frozenset[str]] = dataclasses.field(default_factory=dict)

    @cached_property
    def weights(self) -> dict[str, tuple[float, float, bool]]:
        """Computation -> (times run, times called in the text, whether fused)."""
        found: dict[str, tuple[float, float, bool]] = {}
        self._visit(self.entry, 1.0, False, found)
        return found

    @cached_property
    def unknown_loops(self) -> int:
        """Loops whose length the module does not say; counted once."""
        return sum(
            self.trips(i) is None
            for c in self.weights
            for i in self.computations[c].values()
            if i.opcode == "while"
        )

    def _visit(self, name, times, is_fused, found) -> None:
        if name not in self.computations:
            return
        old = found.get(name, (0.0, 0.0, is_fused))
        found[name] = (old[0] + times, old[1] + 1.0, is_fused)
        for instruction in self.computations[name].values():
            called = instruction.called
            if instruction.opcode == "while":
                inside = times * (self.trips(instruction) or 1)
                for body in called.get("body", []):
                    self._visit(body, inside, is_fused, found)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for names in called.values():
                    for inner in names:
                        self._visit(inner, times, is_fused, found)
            elif instruction.opcode == "fusion":
                for inner in called.get("calls", []):
                    self._visit(inner, times, True, found)

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop runs, None where that depends on data."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        for name in loop.called.get("condition", []):
            return self._bound(self.computations.get(name, {}))
        return None

    def _bound(self, condition: dict) -> int | None:
        """N of a condition that is "counter < N", the counter an entry of the carry."""
        root = next((i for i in condition.values() if i.is_root), None)
        if root is None:
            return None
        inputs = [condition[n] for n in root.operands if n in condition]
        inner = {}
        for called in root.called.get("calls", []):
            inner = self.computations.get(called, {})
        test = next((i for i in inner.values() if i.is_root), root)
        inputs += [i for i in inner.values() if i.opcode != "parameter" and i != test]
        numbers = [i for i in inputs if i.opcode == "constant"]
        others = {i.opcode for i in inputs} - {"constant"}
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        if others != {"get-tuple-element"} or len(numbers) != 1:
            return None
        is_integer = re.match(r"[su]\d+\[\]", numbers[0].shape)
        return int(numbers[0].literal) if is_integer else None

    def is_from(self, instruction: Instruction, file: str) -> bool:
        """Whether a Python file, named by its end, is in the stack that traced it."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        files = self.files.get(found.group(1), ()) if found else ()
        return any(name.endswith(file) for name in files)

    def each(self):
        """(times run, times called, fused?, computation, instruction) of all."""
        for name, (times, calls, is_fused) in self.weights.items():
            computation = self.computations[name]
            for instruction in computation.values():
                yield times, calls, is_fused, computation, instruction


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line[0].isspace():
            current = None
            if line.endswith("{") and ("->" in line):
                name = _NAME.search(line)
                if name:
                    current = computations.setdefault(name.group(1), {})
                    entry = name.group(1) if line.startswith("ENTRY") else entry
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    return Module(computations, entry, _stacks(text))


def _stacks(text: str) -> dict[str, frozenset[str]]:
    """Files of every stack frame, from the tables in front of the computations."""
    tables: dict[str, dict[str, str]] = {}
    current = None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            break
        if re.fullmatch(r"[A-Z]\w+", line):
            current = tables.setdefault(line, {})
        elif current is not None and line.strip():
            key, _, value = line.partition(" ")
            current[key] = value
    names = tables.get("FileNames", {})
    places = {
        key: names.get(_field(value, "file_name_id"), "").strip('"')
        for key, value in tables.get("FileLocations", {}).items()
    }
    frames = tables.get("StackFrames", {})
    # Some versions write ids of parents larger by one: the first frame has none.
    shift = 1 if _field(frames.get("1", ""), "parent_frame_id") == "1" else 0
    found: dict[str, frozenset[str]] = {"0": frozenset()}
    for key, value in frames.items():
        parent = str(int(_field(value, "parent_frame_id") or shift) - shift)
        own = places.get(_field(value, "file_location_id"), "")
        found[key] = found.get(parent, frozenset()) | {own}
    return found


def _field(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\d+)", text)
    return found.group(1) if found else ""


# ---- costs


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a module costs a device.

    Attributes:
        flops: of matrix products, 2 a multiply-add.
        bytes: read and written by instructions that are not inside of a fusion.
        once: (flops, bytes) with the body of each loop counted once, as XLA does.
        unknown_loops: loops of unknown length, counted once.
        apart: those of `bytes` that a file asked for is answerable for.
        kernels: calls of Pallas kernels, whose products nobody counts.
    """

    flops: float
    bytes: float
    once: tuple[float, float]
    unknown_loops: int
    apart: float = 0.0
    kernels: float = 0.0


def costs(module: Module, file: str | None = None) -> Costs:
    """FLOPs and bytes of a module.

    Args:
        module: from `parse`.
        file: the end of a Python file's name, whose traffic is also given apart.
    """
    apart = kernels = 0.0
    totals = [0.0, 0.0, 0.0, 0.0]
    for times, calls, is_fused, computation, instruction in module.each():
        flops = product_flops(instruction, computation)
        moved = 0.0 if is_fused else traffic(module, computation, instruction)
        for place, value in enumerate(
            (times * flops, times * moved, calls * flops, calls * moved)
        ):
            totals[place] += value
        if moved and file is not None and module.is_from(instruction, file):
            apart += times * moved
        kernels += times * is_kernel(instruction)
    once = (totals[2], totals[3])
    return Costs(totals[0], totals[1], once, module.unknown_loops, apart, kernels)


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction calls a kernel that Pallas made."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    words = ("tpu_custom_call", "mosaic", "triton")
    return bool(found) and any(word in found.group(1) for word in words)


def product_flops(instruction: Instruction, computation: dict) -> float:
    """FLOPs of a dot, a convolution or a library's matrix product; else 0."""
    is_gemm = instruction.opcode == "custom-call" and (
        "gemm" in instruction.attributes or "matmul" in instruction.attributes
    )
    if instruction.opcode not in ("dot", "convolution") and not is_gemm:
        return 0.0
    out = max((math.prod(d) for _, d in arrays(instruction.shape)), default=0)
    operands = [computation.get(name) for name in instruction.operands[:2]]
    if len(operands) < 2 or None in operands:
        return 0.0
    left, right = (arrays(o.shape)[0][1] for o in operands)
    if instruction.opcode == "convolution":
        return 2.0 * convolution_products(
            instruction.attributes, left, right, arrays(instruction.shape)[0][1]
        )
    dims = re.search(
        r'lhs_contracting_dim(?:ension)?s"?[=:][\{\[]([\d,"]*)', instruction.attributes
    )
    if not dims:
        return 0.0
    contracted = [int(n) for n in re.findall(r"\d+", dims.group(1))]
    return 2.0 * out * math.prod(left[n] for n in contracted)


def convolution_products(
    attributes: str,
    left: tuple[int, ...],
    right: tuple[int, ...],
    out: tuple[int, ...],
) -> float:
    """Multiply-adds of a convolution, those with padding and holes left out.

    TPUs write batched matrix products as convolutions whose batch axes are spatial
    and dilated or padded so that one tap of the window meets an entry.

    Args:
        attributes: of the instruction: window and dim_labels.
        left, right, out: dimensions of input, kernel and result.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    inputs, kernel, outputs = labels.groups()
    products = out[outputs.index("b")] * out[outputs.index("f")]
    products *= right[kernel.index("i")]
    window = _window(attributes)
    for axis in range(len(inputs) - 2):
        name = str(axis)
        products *= _taps(
            left[inputs.index(name)],
            right[kernel.index(name)],
            out[outputs.index(name)],
            {key: values[axis] for key, values in window.items()},
        )
    return float(products)


def _window(attributes: str) -> dict[str, list[str]]:
    """The words of a window={...} by name, one for each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    words = found.group(1).split() if found else []
    pairs = (word.split("=") for word in words)
    return {key: value.split("x") for key, value in pairs}


def _taps(size: int, taps: int, out: int, window: dict[str, str]) -> int:
    """Pairs of an output and a tap of the kernel that meet an entry of the input."""
    import numpy as np

    stride, holes = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    spread, pad = int(window.get("rhs_dilate", 1)), window.get("pad", "0_0")
    places = np.arange(out)[:, None] * stride + np.arange(taps) * spread
    places -= int(pad.split("_")[0])
    inside = (places >= 0) & (places <= (size - 1) * holes) & (places % holes == 0)
    return int(inside.sum())


def traffic(module: Module, computation: dict, instruction: Instruction) -> float:
    """Bytes that an instruction reads and writes; slices count as what they touch."""
    op = instruction.opcode
    if op in _FREE or op.endswith("-done"):
        return 0.0
    if op in ("dynamic-slice", "gather", "slice"):
        return 2 * num_bytes(instruction.shape)
    sizes = [
        num_bytes(computation[name].shape) if name in computation else 0.0
        for name in instruction.operands
    ]
    if op in ("dynamic-update-slice", "scatter"):
        return 2 * sum(sizes[1:])
    out = num_bytes(instruction.shape)
    for inner in instruction.called.get("calls", []) if op == "fusion" else []:
        sizes, out = _fusion_sizes(module.computations.get(inner, {}), sizes, out)
    return out + sum(sizes)


def _fusion_sizes(inner: dict, sizes: list, out: float) -> tuple[list, float]:
    """What a fusion touches of operands that it slices or updates in place."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    sizes = list(sizes)
    for parameter in inner.values():
        if parameter.opcode != "parameter" or not parameter.literal.isdecimal():
            continue
        place, uses = int(parameter.literal), _through_bitcasts(parameter, users)
        if place >= len(sizes) or not uses:
            continue
        if all(u.opcode in ("dynamic-slice", "gather", "slice") for u in uses):
            sizes[place] = min(sizes[place], sum(num_bytes(use.shape) for use in uses))
        elif all(u.opcode == "dynamic-update-slice" for u in uses):
            update = sum(
                num_bytes(inner[u.operands[1]].shape)
                for u in uses
                if len(u.operands) > 1 and u.operands[1] in inner
            )
            out = max(update, out - sizes[place])
            sizes[place] = 0.0
    return sizes, out


def _through_bitcasts(instruction, users) -> list[Instruction]:
    found = []
    for use in users.get(instruction.name, []):
        if use.opcode in ("bitcast", "convert", "copy", "reshape"):
            found += _through_bitcasts(use, users)
        else:
            found.append(use)
    return found
