"""Trying meshes, remat policies and micro-batches; the fastest that fit come first.

Every combination is first weighed by a formula. The cheapest that should fit is
compiled; what the compiler then says corrects the formula for the next.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from attnjax.core.errors import UserError
from attnjax.planning import planner, problem, targets
from attnjax.planning.planner import Plan
from attnjax.planning.targets import PlanTarget
from attnjax.planning.text import mesh_text, number, seconds, size

REMATS = ("none", "dots", "full")
# Extra forward work and kept activations, as shares of a layer's.
_REMAT = {"none": (0.0, 1.0), "dots": (0.1, 0.6), "full": (1 / 3, 0.05)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One combination.

    Attributes:
        data, fsdp, tensor: sizes of the mesh axes.
        remat: config.model.remat.
        accumulate: config.train.accumulate.
        memory: bytes a device, by formula.
        cost: relative time of a step, by formula.
    """

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulate: int
    memory: float
    cost: float

    def apply(self, config: dict) -> dict:
        """The config with this setting."""
        changed = copy.deepcopy(config)
        changed["mesh"].update(
            data=self.data, fsdp=self.fsdp, tensor=self.tensor, sequence=1
        )
        changed["model"]["remat"] = self.remat
        changed["train"]["accumulate"] = self.accumulate
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
        config: resolved; its mesh, remat and accumulate are replaced.
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
    return (0, train.costs.bytes)


def describe(one: Setting) -> str:
    """A setting in words."""
    mesh = {"data": one.data, "fsdp": one.fsdp, "tensor": one.tensor}
    return f"{mesh_text(mesh)}, remat={one.remat}, accumulate={one.accumulate}"


def settings(config: dict, target: PlanTarget) -> list[Setting]:
    """All combinations, the cheapest by formula first."""
    facts = _Facts.of(config, target)
    found = [
        facts.setting(data, fsdp, tensor, remat, accumulate)
        for data, fsdp, tensor in _meshes(target.count, facts)
        for remat in REMATS
        for accumulate in _micro_batches(facts.batch, data * fsdp)
    ]
    if not found:
        raise UserError(
            "--search: config.train.batch_size must be a multiple of data x fsdp for "
            f"some mesh of {target.count} devices; got batch_size={facts.batch}. Use a "
            f"multiple of {target.count}."
        )
    return sorted(found, key=lambda s: (s.cost, s.memory))


def _meshes(count: int, facts: "_Facts") -> Iterator[tuple[int, int, int]]:
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


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Numbers for the formulas."""

    params: int
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    seq_len: int
    state_bytes: int
    item: int

    @classmethod
    def of(cls, config: dict, target: PlanTarget) -> "_Facts":
        single = copy.deepcopy(config)
        single["mesh"].update(data=1, fsdp=1, tensor=1, sequence=1)
        here = problem.experiment(single, target, targets.devices(target)[:1])
        from attnjax.training import start

        dims = here.model.dims
        return cls(
            params=here.model.parameter_count(),
            layers=dims.num_layers,
            width=dims.embed_dim,
            mlp=here.model.block_dims.mlp_dim,
            heads=dims.num_heads,
            kv_heads=dims.num_kv_heads,
            vocab=here.model.vocab_size,
            batch=config["train"]["batch_size"],
            seq_len=config["data"]["seq_len"],
            state_bytes=problem.device_bytes(start.abstract_state(here)),
            item=4 if dims.dtype == "float32" else 2,
        )

    def setting(self, data, fsdp, tensor, remat, accumulate) -> Setting:
        rows = self.batch // (data * fsdp * accumulate)
        tokens = rows * self.seq_len
        extra, kept = _REMAT[remat]
        layer = tokens * (12 * self.width + 4 * self.mlp / tensor) * self.item
        state = (self.state_bytes + 4 * self.params) / (fsdp * tensor)
        residual = self.layers * tokens * self.width * self.item
        logits = min(tokens * self.vocab, 1 << 24) * 8 / tensor
        memory = state + residual + self.layers * kept * layer + 2 * layer + logits
        # Relative to the device's share of the products, which is the same for all:
        # what remat repeats, what tensor parallelism sends for every layer and what
        # is gathered or reduced for every micro-batch.
        sent = 0.0
        if fsdp > 1:
            sent += 3.0 * self.params / tensor * accumulate
            # The compiler also splits activations over fsdp, and exchanges them.
            sent += 4.0 * residual * accumulate
        if data > 1:
            sent += 4.0 * self.params / (fsdp * tensor) * accumulate
        if tensor > 1:
            sent += 8.0 * residual * accumulate
        total = self.batch * self.seq_len / (data * fsdp * tensor)
        work = 6.0 * self.params * total
        # About 1000 FLOPs of compute take as long as a byte of communication.
        cost = 1.0 + extra + 2.0 * 1000 * sent / max(work, 1.0)
        return Setting(data, fsdp, tensor, remat, accumulate, memory, cost)


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
                rate = plan.tokens / train.estimate.step
                result += (
                    f", at least {seconds(train.estimate.step)} a step, "
                    f"{number(rate)}tokens/s, MFU at most "
                    f"{100 * train.estimate.mfu:.0f} %"
                )
        out.append(f"{place + 1}. {flags(config, plan)}: {result}")
    return out


def flags(config: dict, plan: Plan) -> str:
    """The command-line flags of a setting."""
    mesh = " ".join(
        f"--config.mesh.{axis}={plan.mesh[axis]}" for axis in ("data", "fsdp", "tensor")
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
