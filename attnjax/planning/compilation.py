"""Compiling a program for devices that are not there, and what comes of it."""

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from attnjax import kernels
from attnjax.planning.problem import Program, device_bytes
from attnjax.planning.targets import PlanTarget

NO_CUDNN = "cuDNN chooses its plans on a device and cannot be compiled without one"
NO_BLACKWELL = (
    "not checked: without a device Mosaic GPU lowers for Hopper (sm_90a) alone"
)
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said.

    Attributes:
        program: what was compiled.
        seconds: of tracing, lowering and compiling.
        choices: the implementations of attention and linear attention that it holds.
        text: of the optimised module, "" where there is none.
        unread: why a compiled module has no text, else None.
        arguments, outputs, aliased, temporaries: bytes per device.
        optimal_seconds: XLA's own estimate (TPU), loops counted once; or None.
        needs: bytes of memory that XLA said it lacks room for, where it refused.
        error: its first line, where it failed otherwise.
        failed_kernels: lines about kernels that do not compile.
    """

    program: str
    seconds: float
    choices: tuple[kernels.Choice, ...] = ()
    text: str = dataclasses.field(default="", repr=False)
    unread: str | None = None
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    optimal_seconds: float | None = None
    needs: float | None = None
    error: str | None = None
    failed_kernels: tuple[str, ...] = ()

    @property
    def is_compiled(self) -> bool:
        """Whether there is a module."""
        return self.error is None and self.needs is None


def ruled_out(target: PlanTarget) -> dict[str, str]:
    """Implementations of attention that cannot be compiled for a target here."""
    if target.platform != "gpu":
        return {}
    out = {"cudnn": NO_CUDNN}
    if target.chip.name == "b200":
        out["mosaic_gpu"] = NO_BLACKWELL
    return out


def compile_program(program: Program, target: PlanTarget, device) -> Compiled:
    """Compile; failures become fields of the result.

    Args:
        program: from `problem`.
        target: what it is compiled for.
        device: one of the target's devices, to try single kernels on.
    """
    start = time.perf_counter()
    with kernels.watching(ruled_out(target)) as watch:
        try:
            lowered = program.jitted.lower(*program.arguments)
            compiled, text, unread = compile_lowered(lowered, target)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            return _failed(program, watch, error, device, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return Compiled(
        program.name,
        seconds,
        tuple(watch.choices),
        text,
        unread,
        int(memory.argument_size_in_bytes),
        int(memory.output_size_in_bytes),
        int(memory.alias_size_in_bytes),
        int(memory.temp_size_in_bytes),
        cost.get("optimal_seconds") if target.platform == "tpu" else None,
    )


def compile_lowered(lowered, target: PlanTarget) -> tuple[Any, str, str | None]:
    """The executable, the optimised module's text, and why there is none.

    libtpu is newer than the XLA of jaxlib, which cannot read all that it writes; so on
    TPUs libtpu is told to write the text down itself.
    """
    if target.platform != "tpu":
        compiled = lowered.compile()
        return compiled, *module_text(compiled)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        return compiled, *module_text(compiled, Path(folder))


def module_text(compiled, folder: Path | None = None) -> tuple[str, str | None]:
    """The optimised module, from what the compiler wrote to `folder` if need be."""
    try:
        return compiled.as_text() or "", None
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
    written = sorted(folder.glob("*.after_optimizations.txt")) if folder else []
    if not written:
        return "", reason
    return max(written, key=lambda file: file.stat().st_size).read_text(), None


def _failed(program, watch, error, device, seconds) -> Compiled:
    choices = tuple(watch.choices)
    needs = memory_needed(str(error), device_bytes(program.arguments))
    if needs is not None:
        return Compiled(program.name, seconds, choices, needs=needs)
    lines = failed_kernels(choices, lambda c: try_kernel(c, device))
    first = next((x for x in str(error).splitlines() if x.strip()), "")
    return Compiled(
        program.name,
        seconds,
        choices,
        error=f"{type(error).__name__}: {first[:300]}",
        failed_kernels=tuple(lines),
    )


def memory_needed(message: str, arguments: int = 0) -> float | None:
    """Bytes that XLA says the program would use where it does not fit; else None.

    Args:
        message: of the exception.
        arguments: bytes of the arguments, which one of XLA's messages leaves out.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([BKMGT]) of", message)
    if found:
        return float(found.group(1)) * _UNITS[found.group(2)]
    found = re.search(r"HLO temporaries \(([\d.]+)([BKMGT])\)", message)
    if found:
        return float(found.group(1)) * _UNITS[found.group(2)] + arguments
    found = re.search(r"allocate ([\d.]+)\s*([BKMGT])i?B?", message)
    return float(found.group(1)) * _UNITS[found.group(2)] if found else None


def failed_kernels(choices, attempt: Callable[[kernels.Choice], None]) -> list[str]:
    """One line for every kernel that `attempt` cannot compile."""
    lines = []
    for choice in choices:
        if choice.used == kernels.choices.EXPLICIT:
            continue
        try:
            attempt(choice)
        except Exception as error:
            first = next((x for x in str(error).splitlines() if x.strip()), "")
            lines.append(
                f"{choice.used} does not compile for {choice.shapes}: "
                f"{type(error).__name__}: {first[:200]}"
            )
    return lines


def try_kernel(choice: kernels.Choice, device) -> None:
    """Compile one call, forward and backward, for one device."""
    r = choice.request
    place = SingleDeviceSharding(device)

    def shape(sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    if isinstance(r, kernels.LinearRequest):
        run, operands = kernels.linear_attention, _linear_operands(r, shape)
        arrays = (
            shape((r.batch, r.length, r.heads, r.dim), r.dtypes[0]),
            shape((r.batch, r.length, r.kv_heads, r.dim), r.dtypes[1]),
            shape((r.batch, r.length, r.kv_heads, r.value_dim), r.dtypes[2]),
        )
        has_more = r.spec.return_state
    else:
        run, operands = kernels.attention, _operands(r, shape)
        arrays = (
            shape((r.batch, r.q_len, r.num_heads, r.head_dim), r.dtypes[0]),
            shape((r.batch, r.kv_len, r.num_kv_heads, r.head_dim), r.dtypes[1]),
            shape((r.batch, r.kv_len, r.num_kv_heads, r.value_dim), r.dtypes[2]),
        )
        has_more = r.spec.return_lse

    def total(arrays, operands):
        how = {"implementation": choice.used, "target": r.target}
        out = run(*arrays, r.spec, operands, **how)
        out = out[0] if has_more else out
        return out.astype(jnp.float32).sum()

    jax.jit(jax.grad(total)).lower(arrays, operands).compile()


def _operands(r: kernels.Request, shape) -> dict:
    """Shapes of the operands of a call of attention."""
    integers = ("segment_ids", "offset", "positions", "prefix_len")
    return {
        name: shape(
            sizes,
            jnp.int32
            if name.endswith(integers)
            else (bool if name == "kv_mask" else jnp.float32),
        )
        for name, sizes in r.operand_shapes
    }


def _linear_operands(r: kernels.LinearRequest, shape) -> dict:
    """Shapes of the operands of a call of linear attention."""
    decays = {
        "head": (r.kv_heads,),
        "token": (r.batch, r.length, r.kv_heads),
        "channel": (r.batch, r.length, r.kv_heads, r.dim),
    }
    sizes = {
        "log_decay": decays.get(r.spec.decay),
        "beta": (r.batch, r.length, r.kv_heads),
        "segment_ids": (r.batch, r.length),
        "initial_segment": (r.batch,),
        "initial_state": (r.batch, r.kv_heads, r.dim, r.value_dim + r.spec.normalise),
    }
    return {
        name: shape(sizes[name], jnp.int32 if "segment" in name else jnp.float32)
        for name in sorted(r.operands)
    }
