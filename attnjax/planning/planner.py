"""`plan`: one config on one target, compiled and weighed."""

import dataclasses
import os
from typing import Any

from attnjax.models.matching import Matched
from attnjax.planning import compilation, hlo, problem, roofline, targets
from attnjax.planning.collectives import Collective, collectives
from attnjax.planning.compilation import Compiled
from attnjax.planning.roofline import Estimate
from attnjax.planning.targets import PlanTarget
from attnjax.training import feeds

# Whatever attention does was traced from here.
ATTENTION = "attnjax/kernels/dispatch.py"


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program on one device of the target. Sizes are bytes per device.

    Attributes:
        compiled: what the compiler said.
        parameters, optimizer, state: what stays from step to step (for decoding:
            parameters, none, caches).
        inputs: the batch.
        total: all that must be there at a time; None where it failed to compile.
        usable: what there is.
        costs, collectives, estimate: of one run; None or empty where not known.
    """

    compiled: Compiled
    parameters: int
    optimizer: int
    state: int
    inputs: int
    total: float | None
    usable: float
    costs: hlo.Costs | None = None
    collectives: tuple[Collective, ...] = ()
    estimate: Estimate | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the program fits; None where it did not compile."""
        return None if self.total is None else self.total <= self.usable

    @property
    def spare(self) -> float | None:
        """Bytes left over; negative is what is lacking."""
        return None if self.total is None else self.usable - self.total


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a target.

    Attributes:
        target: what it was compiled for.
        config: resolved.
        parameters: of the model.
        matched: how its FFN width was found, or None.
        mesh: sizes of the mesh axes.
        dtype: of the computation.
        train, decode: the programs; decode is None where there is no decode form or
            it was not asked for, and `decode_note` says why.
    """

    target: PlanTarget
    config: dict
    parameters: int
    matched: Matched | None
    mesh: dict[str, int]
    dtype: str
    train: ProgramPlan | None
    decode: ProgramPlan | None
    decode_note: str = ""

    @property
    def unit(self) -> str:
        """What speeds are counted in: "token" or "image"."""
        return feeds.feed_class(self.config["model"]).unit

    @property
    def units(self) -> int:
        """Tokens or images of one training step."""
        per_row = feeds.make(self.config).units_per_row
        return self.config["train"]["batch_size"] * per_row


def plan(
    config: dict,
    target: PlanTarget,
    *,
    decode: bool = True,
    decode_batch: int | None = None,
) -> Plan:
    """Compile the training step and one decode step of a resolved config.

    Nothing is initialised and nothing runs. `targets.prepare` comes first.

    Args:
        config: from `training.experiment.resolve`.
        target: from `targets.parse`.
        decode: whether to plan decoding.
        decode_batch: sequences decoded at a time over all devices; None is one for
            each shard of the batch.

    Raises:
        UserError: the config does not fit the target's devices, or the extra `aot`
            is missing.
    """
    devices = targets.devices(target)
    here = problem.experiment(config, target, devices)
    batch = problem.decode_batch(here, decode_batch)
    train = _train(here, target, devices)
    decoded, note = None, "not asked for"
    if decode:
        decoded, note = _decode(here, target, devices, batch)
    return Plan(
        target,
        config,
        here.model.parameter_count(),
        here.model.matched,
        dict(here.mesh.shape),
        here.model.dims.dtype,
        train,
        decoded,
        note,
    )


def _train(here, target: PlanTarget, devices: list) -> ProgramPlan:
    program = problem.training(here)
    state, batch = program.arguments
    kept = ("params", "buffers", "ema")
    rest = {name: state[name] for name in state if name not in kept}
    flops = 3.0 * here.row_flops * here.train.batch_size
    return _weigh(
        here,
        target,
        compilation.compile_program(program, target, devices[0]),
        sizes=(
            problem.device_bytes(state["params"]),
            problem.device_bytes(rest),
            problem.device_bytes([state[k] for k in kept[1:] if k in state]),
            problem.device_bytes(batch),
        ),
        model_flops=flops / len(devices),
    )


def _decode(here, target, devices, batch) -> tuple[ProgramPlan | None, str]:
    from attnjax.core.errors import UserError

    length = here.feed.units_per_row
    try:
        program = problem.decoding(here, batch=batch, max_len=length)
    except UserError as error:
        return None, str(error)
    arrays, states, tokens = program.arguments[:3]
    flops = here.model.flops(length) - here.model.flops(max(1, length - 1))
    planned = _weigh(
        here,
        target,
        compilation.compile_program(program, target, devices[0]),
        sizes=(
            problem.device_bytes(arrays),
            0,
            problem.device_bytes(states),
            2 * problem.device_bytes(tokens),
        ),
        model_flops=batch * max(flops, 0.0) / len(devices),
    )
    plural = "s" if batch > 1 else ""
    return planned, f"{batch:,} sequence{plural} of up to {length:,} tokens"


def _weigh(here, target, compiled: Compiled, *, sizes, model_flops) -> ProgramPlan:
    usable = usable_bytes(target)
    common = (compiled, *sizes)
    if compiled.error is not None:
        return ProgramPlan(*common, None, usable)
    if not compiled.is_compiled:
        return ProgramPlan(*common, compiled.needs, usable)
    total = compiled.arguments + compiled.temporaries
    total += max(0, compiled.outputs - compiled.aliased)
    if compiled.unread is not None:
        return ProgramPlan(*common, total, usable)
    module = hlo.parse(compiled.text)
    is_replaced = any(c.used != c.wanted for c in compiled.choices)
    costs = hlo.costs(module, ATTENTION if is_replaced else None)
    node = target.chip.node if target.chip else None
    rows = collectives(module, target.count, node)
    guess = None
    if target.chip is not None:
        guess = roofline.estimate(
            target.chip,
            costs,
            rows,
            dtype=here.model.dims.dtype,
            model_flops=model_flops,
            optimal_seconds=compiled.optimal_seconds,
        )
    return ProgramPlan(*common, total, usable, costs, tuple(rows), guess)


def usable_bytes(target: PlanTarget) -> float:
    """Bytes that a program can have on one device."""
    if target.chip is not None:
        return target.chip.usable
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / target.count


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    chip = plan.target.chip
    return {
        "target": plan.target.name,
        "devices": plan.target.count,
        "device_kind": chip.kind if chip else "cpu",
        "chip": {name: dataclasses.asdict(fact) for name, fact in chip.facts().items()}
        if chip
        else None,
        "parameters": plan.parameters,
        "matched": None if plan.matched is None else plan.matched.to_json(),
        "mesh": plan.mesh,
        "dtype": plan.dtype,
        "remat": plan.config["model"]["remat"],
        "accumulate": plan.config["train"]["accumulate"],
        f"{plan.unit}s_per_step": plan.units,
        "train": _program_json(plan.train),
        "decode": _program_json(plan.decode),
        "decode_note": plan.decode_note,
        "config": plan.config,
    }


def _program_json(one: ProgramPlan | None) -> dict[str, Any] | None:
    if one is None:
        return None
    compiled = one.compiled
    return {
        "compile_seconds": compiled.seconds,
        "error": compiled.error,
        "failed_kernels": list(compiled.failed_kernels),
        "unread": compiled.unread,
        "bytes_per_device": {
            "parameters": one.parameters,
            "optimizer": one.optimizer,
            "state": one.state,
            "inputs": one.inputs,
            "temporaries": compiled.temporaries if compiled.is_compiled else None,
            "total": one.total,
            "usable": one.usable,
            "spare": one.spare,
        },
        "fits": one.fits,
        "flops": one.costs.flops if one.costs else None,
        "kernel_calls_not_counted": one.costs.kernels if one.costs else None,
        "bytes_accessed": one.costs.bytes if one.costs else None,
        "bytes_accessed_by_stand_in": one.costs.apart if one.costs else None,
        "loops_of_unknown_length": one.costs.unknown_loops if one.costs else None,
        "collectives": [dataclasses.asdict(row) for row in one.collectives],
        "estimate": dataclasses.asdict(one.estimate) if one.estimate else None,
        "xla_optimal_seconds": compiled.optimal_seconds,
        "attention": _choices(compiled, "attention"),
        "linear_attention": _choices(compiled, "linear_attention"),
    }


def _choices(compiled: Compiled, family: str) -> list[dict[str, str]]:
    return [
        {
            "used": c.used,
            "wanted": c.wanted,
            "reason": c.reason,
            "shapes": c.shapes,
        }
        for c in compiled.choices
        if c.family == family
    ]
