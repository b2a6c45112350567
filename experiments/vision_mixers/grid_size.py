"""Speed and memory of one training step as the grid of patches grows, by mechanism.

Command: python experiments/vision_mixers/grid_size.py --out experiments/vision_mixers
The models of the study (`sweep.py`), untrained; every step has 1,024 patches: one image
of 32 x 32 patches, or 16 of 8 x 8. Some minutes on two quiet cores. Writes
grid_size.md, grid_size.csv and grid_size.png.
"""

import argparse
import csv
from pathlib import Path

import jax
import jax.numpy as jnp
from sweep import mechanisms

from attnjax.benchmarks import machine, timing
from attnjax.core import config as configs
from attnjax.planning import problem, targets
from attnjax.studies.plots import DASHES, MARKS, PALETTE
from attnjax.training import experiment

SIDES = (8, 16, 32)
PATCHES = 32**2
PATCH = 4
CONFIG = Path(__file__).parents[2] / "configs" / "vit" / "mnist.py"
BASELINE = "softmax"


def compiled(settings: dict, side: int):
    """(executable, state, batch) of a step; the numbers in it mean nothing."""
    changes = {
        **settings,
        "data.name": "digits",  # any images: none are read
        "data.image_size": side * PATCH,
        "train.batch_size": PATCHES // side**2,
        "train.steps_per_dispatch": 1,
        "model.params": "match",
    }
    given = configs.apply_values(configs.load_file(str(CONFIG)), changes.items())
    target = targets.parse("cpu:1")
    here = problem.experiment(experiment.resolve(given), target, jax.devices()[:1])
    program = problem.training(here)
    arrays = [jax.tree.map(_array, part) for part in program.arguments]
    return program.jitted.lower(*program.arguments).compile(), *arrays


def _array(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        noise = jax.random.normal(jax.random.key(0), leaf.shape) * 0.02
        return noise.astype(leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def program(executable, state, batch):
    """n steps of one model."""
    held = {"state": state}

    def run(calls: int) -> None:
        for _ in range(calls):
            held["state"], out = executable(held["state"], batch)
        jax.block_until_ready(out)

    return run


def measured(side: int, rounds: int) -> list[dict]:
    """A record of each mechanism at this size, softmax beside it in every round."""
    chosen = mechanisms(side)
    base = program(*compiled(chosen[BASELINE], side))
    found = []
    for name, settings in chosen.items():
        executable, *arrays = compiled(settings, side)
        pair = {"own": program(executable, *arrays), "base": base}
        times = timing.interleave(pair, rounds=rounds, calls=1)
        ratio = timing.ratio(times["base"].cpu, times["own"].cpu)
        found.append(
            {
                "attention": name,
                "side": side,
                "milliseconds": 1e3 * times["own"].median,
                "images_per_second": PATCHES / side**2 / times["own"].median,
                "speed": ratio.median,
                "speed_low": ratio.low,
                "speed_high": ratio.high,
                "megabytes": executable.memory_analysis().temp_size_in_bytes / 1e6,
            }
        )
        print(f"{side} x {side} {name}: {ratio.median:.2f}", flush=True)
    return found


def table(records: list[dict]) -> str:
    """Markdown, a row a mechanism."""
    heads = [f"{side} x {side}" for side in SIDES]
    heads = [*(f"speed, {h}" for h in heads), *(f"MB, {h}" for h in heads)]
    lines = [f"| attention | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(record["attention"] for record in records):
        own = [record for record in records if record["attention"] == name]
        speeds = [
            f"{r['speed']:.2f} ({r['speed_low']:.2f} to {r['speed_high']:.2f})"
            for r in own
        ]
        sizes = [f"{r['megabytes']:,.0f}" for r in own]
        lines.append(f"| {name} | {' | '.join([*speeds, *sizes])} |")
    return "\n".join(lines) + "\n"


def draw(records: list[dict], path: Path) -> None:
    """Both against the side of the grid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(record["attention"] for record in records))
    figure, both = pyplot.subplots(1, 2, figsize=(11, 5.2), dpi=110)
    titles = ("times as fast as softmax", "MB of temporaries in a step")
    for axes, key, title in zip(both, ("speed", "megabytes"), titles, strict=True):
        for place, name in enumerate(names):
            own = [record for record in records if record["attention"] == name]
            axes.plot(
                [record["side"] for record in own],
                [record[key] for record in own],
                color=PALETTE[place % len(PALETTE)],
                linestyle=DASHES[place // len(PALETTE)],
                marker=MARKS[place % len(MARKS)],
                markersize=4,
                linewidth=2.5 if name == BASELINE else 1.2,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(SIDES, [str(side) for side in SIDES])
        axes.set_xlabel("side of the grid, patches (1,024 patches a step)")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    both[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    records = [one for side in SIDES for one in measured(side, options.rounds)]
    about = machine.line(machine.describe())
    said = (
        "One training step of the study's ViT over 1,024 patches. Speed: times as fast "
        "as softmax, by processor seconds of steps in turns (median of rounds, 95 % "
        "interval). MB: temporaries that XLA allots. "
    )
    text = f"{said}{about}.\n\n{table(records)}"
    (options.out / "grid_size.md").write_text(text)
    with open(options.out / "grid_size.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in one.items()}
            for one in records
        )
    draw(records, options.out / "grid_size.png")


if __name__ == "__main__":
    main()
