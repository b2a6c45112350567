"""Measurements: python -m attnjax.bench kernels|mixers|train|seeds [--filter RE].

`device_kernels` is for a machine with a GPU: it goes on where its results file ends, so
that everything is made in parts of 8 minutes, whatever happens to one of them, by

    for part in $(seq 30); do python -m attnjax.bench device_kernels; done

`device_table` shows what it found as the README does.
"""

import dataclasses
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from attnjax.core.cli import run_main
from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line, positional


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure speed on this machine.

    Attributes:
        what: kernels (attention against the implementations of other libraries),
            mixers (every mechanism against plain attention), train (a training
            step against PyTorch and against plain JAX), seeds (several seeds in
            one program against separate runs), device_kernels (the fused kernels
            on a GPU: correctness, then times; it goes on where its file ends), or
            device_table (its newest results, or those of --json, in Markdown;
            measures nothing).
        filter: regular expression of the rows to measure (none: all).
        json: a file for the results with machine and versions (none: the table
            alone; device_kernels: benchmarks/results/DEVICE-DATE.json).
        minutes: how long device_kernels begins new rows.
        without: implementations that device_kernels leaves out, with commas between.
        retry: device_kernels also makes rows again that failed or never finished.
        bandwidth: of the device's memory in TB/s, of which device_kernels shows
            steps of decoding as a share (none: unknown).
        tune: with kernels: measure block sizes and implementations on this device
            and write the table that the choice of kernels goes by (--json: into
            another file).
    """

    what: Literal[
        "kernels", "mixers", "train", "seeds", "device_kernels", "device_table"
    ] = positional()
    filter: str | None = None
    json: str | None = None
    minutes: float = 8.0
    without: str | None = None
    retry: bool = False
    bandwidth: float | None = None
    tune: bool = False


def main(argv: list[str]) -> None:
    """The command line."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.bench", config=False, overrides=False
    ).flags
    _check_filter(flags.filter)
    if flags.tune:
        _tune(flags)
        return
    if flags.what == "device_kernels":
        _measure_on_device(flags)
        return
    if flags.what == "device_table":
        from attnjax.benchmarks import device_table as table

        report = table.read(Path(flags.json)) if flags.json else table.newest()
        print(table.render(report))
        return
    out = None if flags.json is None else _writable(Path(flags.json))
    report = measure(flags.what, flags.filter)
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {out}")


def measure(what: str, pattern: str | None) -> dict[str, Any]:
    """Run one of the benchmarks, print its table, return its results."""
    module = importlib.import_module(f"attnjax.benchmarks.{what}")
    report = module.run(pattern)
    module.print_report(report)
    return report


def _measure_on_device(flags: Flags) -> None:
    """Make the rows that the results file lacks."""
    from attnjax.benchmarks import device_kernels, device_peers, device_report

    if flags.bandwidth is not None and not flags.bandwidth > 0:
        raise UserError(
            f"bench: --bandwidth must be above 0 (TB/s); got {flags.bandwidth}."
        )
    device_peers.share_memory(os.environ)
    report = device_kernels.run(
        flags.filter,
        path=None if flags.json is None else Path(flags.json),
        minutes=flags.minutes,
        settings=device_kernels.settings_without(flags.without),
        retry=flags.retry,
        bandwidth=flags.bandwidth,
    )
    device_report.print_report(report)


def _tune(flags: Flags) -> None:
    """Write this device's table."""
    from attnjax.benchmarks import tuning

    if flags.what != "kernels":
        raise UserError(f"bench: --tune is for kernels; got {flags.what}.")
    path = None if flags.json is None else Path(flags.json)
    tuning.print_report(tuning.run(flags.filter, path=path))


def _check_filter(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(
            f"bench: --filter must be a regular expression; got {pattern!r} ({error})."
        ) from error


def _writable(path: Path) -> Path:
    """The path, known to be writable before minutes are spent measuring."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"bench: --json must be a file; got the directory {path}.")
    with path.open("a", encoding="utf-8"):
        pass
    return path


if __name__ == "__main__":
    run_main(main)
