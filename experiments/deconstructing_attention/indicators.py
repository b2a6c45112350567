"""The attention indicators of every layer of the study's finished runs.

    python experiments/deconstructing_attention/indicators.py --workdir WORKDIR

WORKDIR is that of the sweep. Writes indicators.csv (means over seeds) and
indicators.svg beside this file.
"""

import argparse
import collections
import csv
import statistics
from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from attnjax import data
from attnjax.analysis import attention_indicators
from attnjax.decoding.run import load_run
from attnjax.studies.collect import collect
from attnjax.training import experiment

HERE = Path(__file__).parent
ROWS = 32  # held-out sequences
SHOWN = ("entropy", "concentration", "head_diversity", "sink", "local_focus_0")


def indicators(path: Path) -> dict[int, dict[str, float]]:
    """layer from 1 -> indicator -> value, of one run; layers without a map are left
    out."""
    run = load_run(path)
    here = experiment.build(run.config)
    settings = here.data
    batch = next(
        data.eval_batches(
            here.corpus.eval,
            batch_size=ROWS,
            seq_len=settings.seq_len,
            mode=settings.packing,
            isolate=settings.isolate,
        )
    )
    mixers = run.config["model"]["mixers"]
    layers = [
        layer
        for layer, name in enumerate(run.model.names)
        if mixers.get(name, {}).get("variant") != "mlp"
    ]
    if not layers:
        return {}
    tokens = jnp.asarray(batch["tokens"])
    found = attention_indicators.by_layer(
        run.model, run.params, run.buffers, tokens, layers=layers
    )
    return {layer + 1: values for layer, values in found.items()}


def mean(runs: list[dict[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    """The mean over seeds."""
    return {
        layer: {
            name: statistics.fmean(run[layer][name] for run in runs)
            for name in runs[0][layer]
        }
        for layer in runs[0]
    }


def plot(table: dict[str, dict[int, dict[str, float]]], file: Path) -> None:
    """One panel an indicator, a line a model: a colour and mark for each variant,
    dashed where it is a hybrid."""
    figure, panels = plt.subplots(1, len(SHOWN), figsize=(16, 3.4), sharex=True)
    variants = list(dict.fromkeys(model.rpartition(", ")[0] for model in table))
    for panel, name in zip(panels, SHOWN, strict=True):
        for model, layers in table.items():
            number = variants.index(model.rpartition(", ")[0])
            panel.plot(
                list(layers),
                [row[name] for row in layers.values()],
                color=f"C{number}",
                marker="osv^Dx*P"[number % 8],
                linestyle="--" if model.endswith("even") else "-",
                label=model,
                lw=1,
            )
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.set_xlabel("layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.22, 1, 1))
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args()
    runs, _ = collect(args.workdir)
    found = collections.defaultdict(list)
    for run in runs:
        if run.is_done and run.labels["schedule"] in ("uniform", "even"):
            found[run.labels["variant"], run.labels["schedule"]].append(
                indicators(run.path)
            )
    table = {
        f"{variant}, {schedule}": mean(seeds)
        for (variant, schedule), seeds in found.items()
        if seeds[0]
    }
    lines = [
        {"model": model, "layer": layer, **{k: f"{v:.5f}" for k, v in values.items()}}
        for model, layers in table.items()
        for layer, values in layers.items()
    ]
    with (HERE / "indicators.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    plot(table, HERE / "indicators.svg")


if __name__ == "__main__":
    main()
