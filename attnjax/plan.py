"""python -m attnjax.plan --config FILE --target NAME: does it fit, and how fast?"""

import dataclasses
import json
import os
from pathlib import Path

from attnjax.core.cli import run_main
from attnjax.core.errors import UserError
from attnjax.core.flags import CommandLine, parse_command_line


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compile a config's training and decode step for devices that are not here.

    Attributes:
        target: cpu:N, h100:N, h200:N, b200:N, v5e:AxB, v5p:AxBxC or v6e:AxB.
        json: print JSON.
        sweep: plan every point of this sweep file instead of --config.
        search: try mesh shapes, remat policies and micro-batches; print the best.
        tries: programs that --search compiles at most.
        show: settings that --search prints.
        decode: plan one decode step too.
        decode_batch: sequences decoded at a time (none: one a shard of the batch).
        out: write to this file instead.
    """

    target: str
    json: bool = False
    sweep: str | None = None
    search: bool = False
    tries: int = 12
    show: int = 5
    decode: bool = True
    decode_batch: int | None = None
    out: str | None = None


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    line = parse_command_line(argv, Flags, program="attnjax.plan")
    _check(line)
    # XLA reads it when jax is imported; its warnings are no part of the report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from attnjax.planning import targets

    target = targets.parse(line.flags.target)
    targets.prepare(target)
    lacking = targets.missing_extra(target.platform)
    if lacking is not None:
        raise UserError(f"--target={target.name}: {lacking}")
    text = _report(line, target)
    if line.flags.out is None:
        print(text)
    else:
        _write(Path(line.flags.out), text)
    return 0


def _check(line: CommandLine) -> None:
    flags = line.flags
    if (line.config is None) == (flags.sweep is None):
        raise UserError(
            "attnjax.plan: takes one of --config FILE and --sweep FILE; got "
            f"--config={line.config}, --sweep={flags.sweep}."
        )
    if not flags.search and (flags.tries, flags.show) != (Flags.tries, Flags.show):
        raise UserError(
            "attnjax.plan: --tries and --show belong to --search; got "
            f"--tries={flags.tries}, --show={flags.show}. Add --search."
        )
    if flags.decode_batch is not None and (flags.search or not flags.decode):
        raise UserError(
            "attnjax.plan: --decode_batch needs a decode step, which --search and "
            f"--decode=false leave out; got --decode_batch={flags.decode_batch}."
        )
    if flags.out is not None:
        _check_out(Path(flags.out))
    if flags.sweep is not None and (flags.search or line.overrides):
        raise UserError(
            "attnjax.plan: --sweep takes neither --search nor --config.KEY=VALUE; got "
            f"--sweep={flags.sweep}. Plan a point's config by itself."
        )
    for name in ("tries", "show"):
        if getattr(flags, name) < 1:
            raise UserError(
                f"--{name}: must be at least 1; got {getattr(flags, name)}."
            )


def _check_out(path: Path) -> None:
    """Before minutes of compilation, not after."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"has no folder {str(path.parent)!r}"
        raise UserError(f"--out: {str(path)!r} {what}. Name a file in a folder.")


def _write(path: Path, text: str) -> None:
    from attnjax.training.disk import disk_errors

    try:
        with disk_errors("out"):
            path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out: cannot write {str(path)!r}: {error.strerror}."
        ) from None


def _report(line: CommandLine, target) -> str:
    from attnjax.core import config as configs
    from attnjax.planning import planner, search, text
    from attnjax.training import experiment

    flags = line.flags
    options = {"decode": flags.decode, "decode_batch": flags.decode_batch}
    if flags.sweep is not None:
        return _sweep(flags, target, options)
    given = configs.apply_overrides(
        configs.load_file(line.config), list(line.overrides)
    )
    config = experiment.resolve(given)
    if flags.search:
        found = search.search(config, target, tries=flags.tries, say=_say)
        if flags.json:
            return json.dumps(search.to_json(found, flags.show), indent=2)
        return "\n".join(search.lines(found, flags.show))
    plan = planner.plan(config, target, **options)
    if flags.json:
        return json.dumps(planner.to_json(plan), indent=2)
    return "\n".join(text.lines(plan))


def _sweep(flags: Flags, target, options: dict) -> str:
    """Plans of all points; those that differ in the seed alone share one."""
    from attnjax.planning import planner, text
    from attnjax.studies import sweep_file

    programs: dict[str, list] = {}
    for point in sweep_file.load(flags.sweep, ".").points:
        train = {k: v for k, v in point.config["train"].items() if k != "seed"}
        key = json.dumps({**point.config, "train": train}, sort_keys=True)
        programs.setdefault(key, []).append(point)
    found, lines = [], []
    for points in programs.values():
        names = ", ".join(point.name for point in points)
        _say(f"planning {names}")
        try:
            plan = planner.plan(points[0].config, target, **options)
        except UserError as error:
            raise UserError(f"--sweep: point {points[0].name}: {error}") from None
        for point in points:
            labels = {"labels": dict(point.labels), "hash": point.hash}
            found.append(
                {**labels, **planner.to_json(plan), "config": dict(point.config)}
            )
        lines += ([""] if lines else []) + [f"[{names}]", *text.lines(plan)]
    return json.dumps(found, indent=2) if flags.json else "\n".join(lines)


def _say(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
