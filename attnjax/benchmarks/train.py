"""Training-step speed: the config-built step, the same step by hand, eager PyTorch.

All three start from the same weights, run the same recipe on the same tokens and are
timed in turns; their losses are compared first, so that what is timed is the same
computation.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.benchmarks import jax_twin, machine, recipe, tables, timing, torch_twin
from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.training import experiment, optimizers
from attnjax.training import step as training_step

OURS, HAND, TORCH = "attnjax", "plain_jax", "pytorch_eager"
PROGRAMS = (OURS, HAND, TORCH)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        rounds: rounds, each timing every program.
        calls: steps a program runs in its turn.
        check_steps: steps whose losses are compared before anything is timed.
    """

    rounds: int = 30
    calls: int = 5
    check_steps: int = 3


class Framework:
    """The step as `attnjax.train` builds it from a config.

    Args:
        sizes: the recipe.
        ids: int32 [B, T + 1].
        unroll: `config.model.unroll`.
    """

    def __init__(self, sizes: recipe.Recipe, ids: np.ndarray, *, unroll=1):
        given = recipe.config(sizes)
        given["model"]["unroll"] = unroll
        config = experiment.resolve(given)
        model = experiment.build_model(config, {"vocab_size": sizes.vocab_size})
        train = schema.build(experiment.TrainConfig, config["train"])
        plan = training_step.Recipe(
            task=experiment.build_task(config, model),
            optim=schema.build(optimizers.Config, config["optim"]),
            steps=train.steps,
            seed=train.seed,
            accumulate=train.accumulate,
        )
        self.state = jax.jit(lambda: training_step.init_state(plan))()
        self.weights = recipe.weights(self.state["params"])
        self.batch = jax.tree.map(jnp.asarray, _batch(ids))
        dispatch = jax.jit(training_step.make_dispatch(plan), donate_argnums=0)
        self.program = dispatch.lower(self.state, self.batch).compile()

    def run(self, count: int) -> np.ndarray:
        """`count` steps; their losses."""
        losses = []
        for _ in range(count):
            self.state, metrics = self.program(self.state, self.batch)
            losses.append(metrics["loss"])
        return np.array([loss[0] for loss in losses])


class Hand:
    """The step of `jax_twin`, compiled."""

    def __init__(self, sizes: recipe.Recipe, ids: np.ndarray, weights, *, unroll=1):
        self.state = jax_twin.init_state(weights)
        self.batch = jnp.asarray(ids)
        repeats = sizes.num_layers if unroll == "all" else unroll
        step = jax.jit(jax_twin.make_step(sizes, unroll=repeats), donate_argnums=0)
        self.program = step.lower(self.state, self.batch).compile()

    def run(self, count: int) -> np.ndarray:
        """`count` steps; their losses."""
        losses = []
        for _ in range(count):
            self.state, metrics = self.program(self.state, self.batch)
            losses.append(metrics["loss"])
        return np.array(losses)


class Eager:
    """The step of `torch_twin`, with one thread a core."""

    def __init__(self, sizes: recipe.Recipe, ids: np.ndarray, weights):
        self.twin = torch_twin.Twin(sizes, weights, threads=machine.cores())
        self.ids = ids

    def run(self, count: int) -> np.ndarray:
        """`count` steps; their losses."""
        return np.array([float(self.twin.step(self.ids)) for _ in range(count)])


def run(
    pattern: str | None = None,
    *,
    sizes: recipe.Recipe | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Measure the programs whose names match `pattern`; ours is always one of them.

    Returns:
        "recipe", "machine", "load" (programs running before we started), "skipped"
        ({program: reason}), "losses" (first steps, by program), "compiled" (FLOPs and
        bytes of the two compiled steps and their ratios), and "rows": per program
        "ms", "cpu_ms", "tokens_per_second", and "time_ratio" (its time over ours, the
        median of paired rounds) with the 95 % interval "ratio_low", "ratio_high".

    Raises:
        UserError: when the pattern matches no program.
    """
    sizes, settings = sizes or recipe.Recipe(), settings or Settings()
    wanted, load = _wanted(pattern), timing.load_average()
    programs, skipped = _programs(sizes, wanted)
    losses = {name: p.run(settings.check_steps) for name, p in programs.items()}
    samples = timing.interleave(
        {name: program.run for name, program in programs.items()},
        rounds=settings.rounds,
        calls=settings.calls,
    )
    return {
        "benchmark": "train",
        "recipe": dataclasses.asdict(sizes),
        "settings": dataclasses.asdict(settings),
        "machine": machine.describe(),
        "load": load,
        "skipped": skipped,
        "losses": {name: [float(x) for x in values] for name, values in losses.items()},
        "compiled": compiled_sizes(programs) if HAND in programs else None,
        "rows": [_row(name, samples, sizes) for name in programs],
    }


def _wanted(pattern: str | None) -> list[str]:
    if pattern is None:
        return list(PROGRAMS)
    found = [name for name in PROGRAMS if re.search(pattern, name)]
    if not found:
        raise UserError(
            f"bench train: --filter matches no program; got {pattern!r}. Programs: "
            f"{', '.join(PROGRAMS)}."
        )
    return found


def _programs(sizes: recipe.Recipe, wanted: list[str]) -> tuple[dict, dict]:
    """The programs to time by name, and why others are missing."""
    ids = recipe.tokens(sizes)
    ours = Framework(sizes, ids)
    programs: dict[str, Any] = {OURS: ours}
    skipped: dict[str, str] = {}
    if HAND in wanted:
        programs[HAND] = Hand(sizes, ids, ours.weights)
    if TORCH in wanted:
        reason = torch_twin.missing()
        if reason is None:
            programs[TORCH] = Eager(sizes, ids, ours.weights)
        else:
            skipped[TORCH] = reason
    return programs, skipped


def compiled_sizes(programs: dict[str, Any]) -> dict[str, Any]:
    """FLOPs and temporary bytes of the compiled steps, ours over the twin's."""
    ours, hand = (_size(programs[name].program) for name in (OURS, HAND))
    return {
        OURS: ours,
        HAND: hand,
        "ratio": {name: ours[name] / hand[name] for name in ours},
    }


def _size(program) -> dict[str, float]:
    """What the compiler says: a scan's body counts once, whatever its length."""
    return {
        "flops": float(program.cost_analysis()["flops"]),
        "temporary_bytes": float(program.memory_analysis().temp_size_in_bytes),
    }


def _row(name: str, samples: dict, sizes: recipe.Recipe) -> dict[str, Any]:
    mine = samples[name]
    against = timing.ratio(mine.wall, samples[OURS].wall)
    return {
        "program": name,
        "ms": 1e3 * mine.median,
        "cpu_ms": 1e3 * float(np.median(mine.cpu)),
        "tokens_per_second": sizes.tokens / mine.median,
        "time_ratio": against.median,
        "ratio_low": against.low,
        "ratio_high": against.high,
    }


def _batch(ids: np.ndarray) -> dict[str, np.ndarray]:
    """ids [B, T + 1] as the loop hands over one step's batch, [1, B, T] each."""
    rows, length = ids.shape[0], ids.shape[1] - 1
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": places,
        "weights": np.ones((rows, length), np.float32),
    }
    return {name: array[None] for name, array in batch.items()}


def print_report(report: dict[str, Any]) -> None:
    """The report as text: machine, table, what is missing, compiled sizes."""
    sizes = report["recipe"]
    print(machine.line(report["machine"]))
    print(
        f"{sizes['num_layers']} layers, {sizes['num_heads']} heads, width "
        f"{sizes['embed_dim']}, {sizes['batch_size']} x {sizes['seq_len']} tokens "
        "a step"
    )
    tables.show(
        ("program", "ms/step", "cpu ms", "tokens/s", "time over ours", "95 % interval"),
        [_cells(row) for row in report["rows"]],
    )
    for name, reason in report["skipped"].items():
        print(f"{name} skipped: {reason}")
    if report["compiled"]:
        ratios = report["compiled"]["ratio"]
        print(
            f"compiled step over the hand-written one: FLOPs {ratios['flops']:.4f}, "
            f"temporary bytes {ratios['temporary_bytes']:.4f}"
        )
    timing.print_load(report["load"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["program"],
        f"{row['ms']:.1f}",
        f"{row['cpu_ms']:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['time_ratio']:.3f}",
        f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
    )
