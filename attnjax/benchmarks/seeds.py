"""Seeds trained by one program against as many separate steps: the quickstart model.

A step of the vmapped program and a step of a single run take turns; what counts is
the time per seed. Their losses are compared first.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.benchmarks import machine, tables, timing
from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.training import experiment, optimizers
from attnjax.training import step as training_step

# configs/quickstart.py, as far as a step depends on it.
QUICKSTART = {
    "model": {
        "layers": "attention",
        "num_layers": 4,
        "embed_dim": 160,
        "num_heads": 5,
        "qk_norm": True,
        "tie_embeddings": True,
    },
    "data": {"seq_len": 256},
    "optim": {
        "name": "adamw",
        "learning_rate": 4e-3,
        "schedule": "cosine",
        "warmup_steps": 40,
    },
    "train": {"steps": 360, "batch_size": 16},
}
VOCAB = 257  # bytes and the end of a document


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        counts: how many seeds share a program.
        rounds: rounds, each timing both programs.
        calls: steps of a program in its turn.
        check_steps: steps whose losses are compared before anything is timed.
    """

    counts: tuple[int, ...] = (2, 5)
    rounds: int = 7
    calls: int = 2
    check_steps: int = 2


class Steps:
    """A compiled step with its state and batches.

    Args:
        recipe: of one run.
        vocab_size: V.
        batch: rows, length.
        seeds: train them in one program; None trains recipe.seed alone.
    """

    def __init__(self, recipe, vocab_size: int, batch, *, seeds: list[int] | None):
        own = [recipe.seed] if seeds is None else seeds
        init = jax.jit(
            lambda seed: training_step.init_state(
                training_step.vary(recipe, {"seed": seed})
            )
        )
        states = [init(np.int32(seed)) for seed in own]
        batches = [_batch(seed, vocab_size, batch) for seed in own]
        if seeds is None:
            self.state, parts = states[0], batches[0]
            dispatch = training_step.make_dispatch(recipe)
        else:
            self.state = jax.tree.map(lambda *each: jnp.stack(each), *states)
            parts = jax.tree.map(lambda *each: np.stack(each), *batches)
            values = {"seed": np.asarray(seeds, np.int32)}
            dispatch = training_step.make_group_dispatch(recipe, values)
        self.batch = jax.tree.map(lambda a: jnp.asarray(a[None]), parts)
        jitted = jax.jit(dispatch, donate_argnums=0)
        self.program = jitted.lower(self.state, self.batch).compile()

    def run(self, count: int) -> np.ndarray:
        """`count` steps; losses [count] or [count, N]."""
        losses = []
        for _ in range(count):
            self.state, metrics = self.program(self.state, self.batch)
            losses.append(metrics["loss"])
        return np.array([loss[0] for loss in losses])


def _batch(seed: int, vocab_size: int, shape: tuple[int, int]) -> dict:
    rows, length = shape
    ids = np.random.default_rng(seed).integers(vocab_size, size=(rows, length + 1))
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return {
        "tokens": ids[:, :-1].astype(np.int32),
        "targets": ids[:, 1:].astype(np.int32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": places,
        "weights": np.ones((rows, length), np.float32),
    }


def _recipe(config: dict, vocab_size: int, seed: int) -> training_step.Recipe:
    model = experiment.build_model(config, {"vocab_size": vocab_size})
    return training_step.Recipe(
        task=experiment.build_task(config, model),
        optim=schema.build(optimizers.Config, config["optim"]),
        steps=config["train"]["steps"],
        seed=seed,
    )


def run(
    pattern: str | None = None,
    *,
    given: dict | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Measure.

    Args:
        pattern: regular expression of the counts to measure, such as "5".
        given: groups of a config instead of the quickstart's.
        settings: how much to measure.

    Returns:
        "config", "settings", "machine", "load", and "rows": per count "seeds",
        "ms_per_seed", "separate_ms", "time_ratio" (time per seed over that of a
        separate run, the median of paired rounds) with the 95 % interval "ratio_low",
        "ratio_high", and "loss_difference", the largest of the first steps.

    Raises:
        UserError: when the pattern matches no count.
    """
    settings, given = settings or Settings(), given or QUICKSTART
    counts = [n for n in settings.counts if re.search(pattern or "", str(n))]
    if not counts:
        known = ", ".join(map(str, settings.counts))
        raise UserError(
            f"bench seeds: --filter matches no number of seeds; got {pattern!r}. "
            f"Numbers: {known}."
        )
    load, config = timing.load_average(), experiment.resolve(given)
    return {
        "benchmark": "seeds",
        "config": given,
        "settings": dataclasses.asdict(settings),
        "machine": machine.describe(),
        "load": load,
        "rows": [_row(config, count, settings) for count in counts],
    }


def _row(config: dict, count: int, settings: Settings) -> dict[str, Any]:
    shape = config["train"]["batch_size"], config["data"]["seq_len"]
    seeds = list(range(count))
    programs = {
        "separate": Steps(_recipe(config, VOCAB, 0), VOCAB, shape, seeds=None),
        "together": Steps(_recipe(config, VOCAB, 0), VOCAB, shape, seeds=seeds),
    }
    losses = {name: each.run(settings.check_steps) for name, each in programs.items()}
    difference = np.abs(losses["together"][:, 0] - losses["separate"]).max()
    samples = timing.interleave(
        {name: each.run for name, each in programs.items()},
        rounds=settings.rounds,
        calls=settings.calls,
    )
    per_seed = samples["together"].wall / count
    ratio = timing.ratio(per_seed, samples["separate"].wall)
    return {
        "seeds": count,
        "ms_per_seed": 1e3 * float(np.median(per_seed)),
        "separate_ms": 1e3 * samples["separate"].median,
        "time_ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "loss_difference": float(difference),
    }


def print_report(report: dict[str, Any]) -> None:
    """The report as text."""
    print(machine.line(report["machine"]))
    tables.show(
        ("seeds", "ms/step and seed", "separate ms", "time ratio", "95 % interval"),
        [
            (
                str(row["seeds"]),
                f"{row['ms_per_seed']:.1f}",
                f"{row['separate_ms']:.1f}",
                f"{row['time_ratio']:.3f}",
                f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            )
            for row in report["rows"]
        ],
    )
    timing.print_load(report["load"])
