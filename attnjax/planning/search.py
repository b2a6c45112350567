"""Trying meshes, remat policies and micro-batches; the fastest that fit come first.

Every combination is first weighed by a formula. The cheapest that should fit is
compiled; what the compiler then says corrects the formula for the next.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from attnjax.core.errors import UserError
from attnjax.planning import formulas, planner
from attnjax.planning.formulas import Facts, Split
from attnjax.planning.planner import Plan
from attnjax.planning.targets import PlanTarget
from attnjax.planning.text import mesh_text, number, seconds, size
from attnjax.training import sharding

REMATS = tuple(formulas.REMAT)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One combination, weighed by formula.

    Attributes:
        split: mesh axes, remat policy and micro-batches.
        memory: bytes a device.
        cost: of a step: seconds, give or take what is not known.
    """

    split: Split
    memory: float
    cost: float

    def apply(self, config: dict) -> dict:
        """The config with this setting."""
        changed = copy.deepcopy(config)
        one = self.split
        changed["mesh"].update(
            data=one.data,
            fsdp=one.fsdp,
            tensor=one.tensor,
            sequence=one.sequence,
        )
        changed["model"]["remat"] = one.remat
        changed["train"]["accumulate"] = one.accumulate
        return changed


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plans: compiled, the best first: those that fit by estimated time, then the
            others by what they lack.
        possible: how many combinations there were.
    """

    plans: tuple[Plan, ...]
    possible: int


def search(
    config: dict,
    target: PlanTarget,
    *,
    tries: int = 12,
    enough: int = 5,
    say: Callable[[str], Any] = lambda line: None,
) -> Found:
    """Compile up to `tries` settings, ending once `enough` fit.

    Args:
        config: resolved; its mesh (but mesh.sequence), remat and accumulate are
            replaced.
        target: what to compile for.
        tries: most compilations.
        enough: how many that fit are wanted.
        say: takes a line before every compilation.

    Raises:
        UserError: the batch cannot be spread over the target's devices at all.
    """
    waiting = settings(config, target)
    possible, usable, ratio = len(waiting), planner.usable_bytes(target), 1.0
    plans: list[Plan] = []
    while waiting and len(plans) < tries:
        one = _next(waiting, usable / ratio)
        waiting.remove(one)
        say(f"{len(plans) + 1}/{min(tries, possible)}: {describe(one)}")
        plans.append(planner.plan(one.apply(config), target, decode=False))
        total = plans[-1].train.total
        if total is not None and total > usable:
            # The formula was too hopeful; the rest is judged by what was seen.
            ratio = max(ratio, total / one.memory)
        if sum(bool(p.train.fits) for p in plans) >= enough:
            break
    return Found(tuple(sorted(plans, key=_rank)), possible)


def _next(waiting: list[Setting], room: float) -> Setting:
    """The cheapest that should fit, else the one that needs the least memory."""
    fitting = [s for s in waiting if s.memory <= 0.9 * room]
    if fitting:
        return min(fitting, key=lambda s: s.cost)
    return min(waiting, key=lambda s: s.memory)


def _rank(plan: Plan):
    train = plan.train
    if train.fits is None:
        return (2, 0.0)
    if not train.fits:
        return (1, -train.spare)
    if train.estimate is not None:
        return (0, train.estimate.step)
    return (0, train.costs.bytes if train.costs is not None else float("inf"))


def describe(one: Setting) -> str:
    """A setting in words."""
    split = one.split
    mesh = {axis: getattr(split, axis) for axis in sharding.AXES}
    return f"{mesh_text(mesh)}, remat={split.remat}, accumulate={split.accumulate}"


def settings(config: dict, target: PlanTarget) -> list[Setting]:
    """All combinations, the cheapest by formula first."""
    facts, sequence = Facts.of(config, target), _sequence(config, target)
    splits = [
        Split(data, fsdp, tensor, remat, accumulate, sequence)
        for data, fsdp, tensor in _meshes(target.count // sequence, facts)
        for remat in REMATS
        for accumulate in _micro_batches(facts.batch, data * fsdp)
    ]
    found = [Setting(s, facts.memory(s), facts.seconds(s)) for s in splits]
    if not found:
        raise UserError(
            "--search: config.train.batch_size must be a multiple of data x fsdp for "
            f"some mesh of {target.count} devices; got batch_size={facts.batch}. Use a "
            f"multiple of {target.count}."
        )
    return sorted(found, key=lambda s: (s.cost, s.memory))


def _sequence(config: dict, target: PlanTarget) -> int:
    """Devices that share the tokens of a row: as the config says."""
    sequence = config.get("mesh", {}).get("sequence", 1)
    if sequence < 1 or target.count % sequence:
        raise UserError(
            "--search: config.mesh.sequence must be a divisor of the target's "
            f"{target.count} devices; got {sequence}. Set it to 1."
        )
    return sequence


def _meshes(count: int, facts: Facts) -> Iterator[tuple[int, int, int]]:
    for tensor in _divisors(count):
        if tensor > 8 or facts.heads % tensor or facts.kv_heads % tensor:
            continue
        rest = count // tensor
        for fsdp in _divisors(rest):
            if facts.batch % rest == 0 and (fsdp == 1 or facts.width % fsdp == 0):
                yield rest // fsdp, fsdp, tensor


def _micro_batches(batch: int, shards: int) -> list[int]:
    rows, found = batch // shards, []
    while rows >= 1:
        found.append(batch // shards // rows)
        if rows % 2:
            break
        rows //= 2
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def lines(found: Found, show: int) -> list[str]:
    """A table of the best settings."""
    out = [
        f"{len(found.plans)} of {found.possible} settings compiled; "
        f"{sum(bool(p.train.fits) for p in found.plans)} fit."
    ]
    for place, plan in enumerate(found.plans[:show]):
        train, config = plan.train, plan.config
        if train.fits is None:
            result = f"did not compile: {train.compiled.error}"
        elif not train.fits:
            result = f"does not fit, by {size(-train.spare)}"
        else:
            result = f"fits, {size(train.total)} of {size(train.usable)}"
            if train.estimate is not None:
                rate = plan.units / train.estimate.step
                result += (
                    f", at least {seconds(train.estimate.step)} a step, at most "
                    f"{number(rate).strip()} {plan.unit}s/s, MFU at most "
                    f"{100 * train.estimate.mfu:.0f} %"
                )
        out.append(f"{place + 1}. {flags(config, plan)}: {result}")
    return out


def flags(config: dict, plan: Plan) -> str:
    """The command-line flags of a setting."""
    mesh = " ".join(
        f"--config.mesh.{axis}={plan.mesh[axis]}"
        for axis in sharding.AXES
        if axis != "sequence" or plan.mesh[axis] > 1
    )
    return (
        f"{mesh} --config.model.remat={config['model']['remat']} "
        f"--config.train.accumulate={config['train']['accumulate']}"
    )


def to_json(found: Found, show: int) -> dict:
    """What `lines` shows, as JSON."""
    return {
        "possible": found.possible,
        "compiled": len(found.plans),
        "best": [planner.to_json(plan) for plan in found.plans[:show]],
    }
