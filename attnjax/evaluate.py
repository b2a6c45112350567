"""python -m attnjax.evaluate --workdir RUN: a run on other data or other settings."""

import dataclasses
import json
from typing import Literal

from attnjax.core.cli import run_main
from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line
from attnjax.decoding import draw_flags


@dataclasses.dataclass(frozen=True)
class _RunFlags:
    """The run and its judge.

    Attributes:
        workdir: the run directory.
        step: the checkpoint (none: the newest intact one).
        keep_layers: layers that stay, from 0, e.g. 0,2,4; the others are left out
            (none: all).
        out: a JSON file for the metrics (none: the terminal alone).
        shifts: of a classifier: in how many circular shifts of each held-out image,
            drawn alike for all, its name is compared with that of the image itself,
            or all (none: not at all).
        within: accuracy under the worst shift is of those by at most so many pixels
            along each axis (none: of those that are compared).
        judge: of a denoiser: the run of a classifier of the same classes, which names
            images that are drawn and compares their features with the data's (none: no
            images are drawn).
        per_class: images of each class for the judge (none: 100).
    """

    workdir: str
    step: int | None = None
    keep_layers: tuple[int, ...] | None = None
    out: str | None = None
    shifts: int | Literal["all"] | None = None
    within: int | None = None
    judge: str | None = None
    per_class: int | None = None


@dataclasses.dataclass(frozen=True)
class Flags(draw_flags.DrawFlags, _RunFlags):
    """Evaluate a run on held-out data; --config.data... and --config.model... change
    the data, the context length or how the model is run."""


PER_CLASS = 100


def main(argv: list[str]) -> None:
    """The command line."""
    line = parse_command_line(
        argv, Flags, program="attnjax.evaluate", config=False, overrides=True
    )
    flags = line.flags
    _check_samples(flags)
    if flags.within is not None and flags.shifts is None:
        raise UserError(
            f"--within: belongs to --shifts; got within={flags.within} without it. "
            "Add --shifts=all, or leave it out."
        )
    from attnjax.decoding.evaluate import evaluate_run
    from attnjax.decoding.run import load_run, require_denoiser
    from attnjax.training import disk

    out = None if flags.out is None else disk.ready_out(flags.out)

    run = load_run(
        flags.workdir,
        step=flags.step,
        overrides=line.overrides,
        keep_layers=flags.keep_layers,
    )
    if flags.judge is not None:
        from attnjax.analysis.sample_quality import Judge, judged

        judge = load_run(flags.judge, owner="--judge")
        # Before the time is spent.
        Judge(judge, require_denoiser(run))
        drawn = draw_flags.given(flags)
        run.draw_settings(**drawn)
    if flags.shifts is not None:
        from attnjax.analysis import shift_consistency

        around = dict(shifts=flags.shifts, within=flags.within)
        shift_consistency.check(run, **around)
    metrics = evaluate_run(run)
    if flags.shifts is not None:
        metrics |= shift_consistency.measured(run, **around)
    if flags.judge is not None:
        per_class = flags.per_class or PER_CLASS
        metrics |= {"judge": flags.judge}
        metrics |= judged(run, judge, per_class=per_class, **drawn)
    for name, value in metrics.items():
        print(
            f"{name:16} {value:.6g}"
            if isinstance(value, float)
            else f"{name:16} {value}"
        )
    if out is not None:
        with disk.disk_errors("--out"):
            out.write_text(json.dumps(metrics, indent=2) + "\n")


def _check_samples(flags: Flags) -> None:
    """Raise UserError for settings of samples where none are drawn."""
    if flags.judge is None:
        draw_flags.refuse(
            flags,
            ("per_class", *draw_flags.FIELDS),
            lambda name, value: (
                f"--{name}: belongs to the samples that --judge looks at; got "
                f"{name}={value} without it. Add --judge RUN, the run of a classifier, "
                "or leave it out."
            ),
        )
    if flags.per_class is not None and flags.per_class < 2:
        raise UserError(
            f"--per_class: must be at least 2; got per_class={flags.per_class}."
        )


if __name__ == "__main__":
    run_main(main)
