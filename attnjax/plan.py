"""python -m attnjax.plan --config FILE --target NAME: does it fit, and how fast?"""

import dataclasses
import json
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
        from attnjax.training.disk import disk_errors

        with disk_errors("out"):
            Path(line.flags.out).write_text(text + "\n", encoding="utf-8")
    return 0


def _check(line: CommandLine) -> None:
    flags = line.flags
    if (line.config is None) == (flags.sweep is None):
        raise UserError(
            "attnjax.plan: takes one of --config FILE and --sweep FILE; got "
            f"--config={line.config}, --sweep={flags.sweep}."
        )
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
    from attnjax.planning import planner, text
    from attnjax.studies import sweep_file

    study = sweep_file.load(flags.sweep, ".")
    found, lines = [], []
    for point in study.points:
        plan = _say(f"planning {point.name}") or planner.plan(
            point.config, target, **options
        )
        labels = {"labels": dict(point.labels), "hash": point.hash}
        found.append({**labels, **planner.to_json(plan)})
        lines += ([""] if lines else []) + [f"[{point.name}]", *text.lines(plan)]
    return json.dumps(found, indent=2) if flags.json else "\n".join(lines)


def _say(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
