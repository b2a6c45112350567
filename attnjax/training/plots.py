"""The loss curve of a run."""

import math
from pathlib import Path

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito's palette


def loss_curve(
    rows: list[dict],
    path: Path,
    *,
    title: str,
    levels: dict[str, float],
    measure: str = "nats per token",
) -> None:
    """Draw training and held-out loss against the step into a PNG.

    Args:
        rows: of metrics.jsonl.
        path: the PNG.
        title: above the picture.
        levels: horizontal lines by name.
        measure: what losses are counted in.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=130)
    for split, colour, mark in (("train", BLUE, None), ("eval", ORANGE, "o")):
        points = [
            (row["step"], row["loss"])
            for row in rows
            if row["split"] == split and math.isfinite(row["loss"])
        ]
        if points:
            name = "training" if split == "train" else "held out"
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, label=name)
    for name, level in levels.items():
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            name,
            (1.0, level),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(-4, 3),
            ha="right",
            fontsize=8,
            color=GREY,
        )
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({measure})")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
