"""What a finished run leaves behind: summary, sample, loss curve, and a few lines."""

import dataclasses
import math
import platform
from typing import Any

import jax

from attnjax.core import chips
from attnjax.training import plots
from attnjax.training.experiment import Experiment
from attnjax.training.feeds.base import Reference


@dataclasses.dataclass(frozen=True)
class Ending:
    """What the last lines say.

    Attributes:
        summary: the content of summary.json.
        reference: what stands beside the held-out loss.
        unit: what a loss is the mean over: "token" or "image".
        measure: what it is counted in.
        plot: where the loss curve is, relative to the run.
        shown: final metrics to name beside the loss.
        picture: where its last samples are, relative to the run, or None.
    """

    summary: dict
    reference: Reference
    unit: str
    measure: str
    plot: str
    shown: tuple[str, ...] = ()
    picture: str | None = None


def finish(
    experiment: Experiment, run, rows: list[dict], *, picture: str | None = None
) -> Ending:
    """Write summary.json and the loss curve of a run that reached its last step.

    Args:
        experiment: what was trained.
        run: its RunDirectory.
        rows: of metrics.jsonl.
        picture: where its last samples are, relative to the run, if it drew any.
    """
    feed, reference = experiment.feed, experiment.feed.reference()
    summary = _summary(experiment, rows, reference)
    run.write_summary(summary)
    plot = "plots/loss.png"
    plots.loss_curve(
        rows,
        run.path / plot,
        title=f"{experiment.config['data']['name']}: {_layers(experiment)}",
        levels=reference.levels,
        measure=feed.loss_measure,
    )
    return Ending(
        summary, reference, feed.unit, feed.loss_measure, plot, feed.shown, picture
    )


def _layers(experiment: Experiment) -> str:
    layers = experiment.config["model"]["layers"]
    text = layers if isinstance(layers, str) else " ".join(layers)
    return text if len(text) < 50 else text[:47] + "..."


def _summary(experiment: Experiment, rows: list[dict], reference: Reference) -> dict:
    train, feed = experiment.train, experiment.feed
    evals = [row for row in rows if row["split"] == "eval"]
    keys = [k for k in evals[-1] if k not in ("step", "split", "time")] if evals else []
    flops = experiment.row_flops
    return {
        "steps": train.steps,
        "final": {k: evals[-1][k] for k in keys},
        "best": min(
            ({"step": r["step"], **{k: r[k] for k in keys}} for r in evals),
            key=lambda r: r["loss"] if math.isfinite(r["loss"]) else math.inf,
            default={},
        ),
        **reference.summary,
        f"{feed.unit}s_seen": train.steps * train.batch_size * feed.units_per_row,
        "parameters": experiment.model.parameter_count(),
        **_matched(experiment.model),
        f"forward_flops_per_{feed.unit}": flops / feed.units_per_row,
        **feed.more_summary(experiment.model),
        "time": _timing(experiment, rows, flops),
        "device": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "machine": platform.machine(),
        },
    }


def _matched(model: Any) -> dict[str, Any]:
    """How the FFN width was found, where config.model.params asked for it."""
    return {} if model.matched is None else {"matched": model.matched.to_json()}


def _timing(experiment: Experiment, rows: list[dict], flops: float) -> dict[str, Any]:
    """Throughput over the logged steps, and utilisation where the peak is known."""
    pace = [
        row["time"]["seconds_per_step"]
        for row in rows
        if row["split"] == "train" and "seconds_per_step" in row.get("time", {})
    ]
    if not pace:
        return {}
    # The median leaves out the line that waited for the compiler.
    seconds = sorted(pace)[len(pace) // 2]
    rows_per_second, feed = experiment.train.batch_size / seconds, experiment.feed
    timing = {
        "seconds_per_step": seconds,
        f"{feed.unit}s_per_second": rows_per_second * feed.units_per_row,
    }
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        timing["mfu"] = 3 * flops * rows_per_second / peak / experiment.mesh.size
    return timing


def lines(ending: Ending, run, sample: str | None) -> list[str]:
    """The end of a run for people."""
    final, unit = ending.summary["final"], ending.unit
    size = ending.reference.bytes_per_unit

    def line(name: str, nats: float) -> str:
        bits = f"  {nats / math.log(2) / size:.3f} bits/byte" if size else ""
        return f"  {name:<18}{nats:.4f}{bits}"

    text = ["", f"held-out loss, {ending.measure}"]
    if "loss" in final:
        text.append(line("this model", final["loss"]))
    levels = reversed(ending.reference.levels.items())
    text += [line(name, level) for name, level in levels]
    text += [f"{name:<18}{final[name]:.4f}" for name in ending.shown if name in final]
    speed = ending.summary["time"].get(f"{unit}s_per_second")
    if speed:
        text.append(f"speed             {speed:,.0f} {unit}s/s")
    text.append(f"parameters        {ending.summary['parameters']:,}")
    if sample is not None:
        text += ["", "sample:", *("  | " + line for line in sample.splitlines()), ""]
    if ending.picture is not None:
        text.append(f"samples           {run.path / ending.picture}")
    text += [
        f"loss curve        {run.path / ending.plot}",
        f"run directory     {run.path}",
    ]
    return text
