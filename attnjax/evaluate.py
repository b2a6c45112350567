"""python -m attnjax.evaluate --workdir RUN: a run on other data or other settings."""

import dataclasses
import json
from pathlib import Path

from attnjax.core.cli import run_main
from attnjax.core.flags import parse_command_line


@dataclasses.dataclass(frozen=True)
class Flags:
    """Evaluate a run on held-out data; --config.data... and --config.model... change
    the data, the context length or how the model is run.

    Attributes:
        workdir: the run directory.
        step: the checkpoint (none: the newest intact one).
        keep_layers: layers that stay, from 0, e.g. 0,2,4; the others are left out
            (none: all).
        out: a JSON file for the metrics (none: the terminal alone).
    """

    workdir: str
    step: int | None = None
    keep_layers: tuple[int, ...] | None = None
    out: str | None = None


def main(argv: list[str]) -> None:
    """The command line."""
    line = parse_command_line(
        argv, Flags, program="attnjax.evaluate", config=False, overrides=True
    )
    flags = line.flags
    from attnjax.decoding.evaluate import evaluate_run
    from attnjax.decoding.run import load_run

    run = load_run(
        flags.workdir,
        step=flags.step,
        overrides=line.overrides,
        keep_layers=flags.keep_layers,
    )
    metrics = evaluate_run(run)
    for name, value in metrics.items():
        print(
            f"{name:16} {value:.6g}"
            if isinstance(value, float)
            else f"{name:16} {value}"
        )
    if flags.out is not None:
        Path(flags.out).write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
