"""python -m attnjax.train --config FILE --workdir RUN: train, or resume, a run."""

import dataclasses
from pathlib import Path

from attnjax.core.cli import run_main
from attnjax.core.errors import EXIT_SAVED, UserError
from attnjax.core.flags import CommandLine, parse_command_line
from attnjax.training.signals import StopRequested, StopSignal, leave


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train a model. The same command again resumes; --workdir RUN alone does too.

    Attributes:
        workdir: the run directory.
        extend: allow config.train.steps to be raised over that of the run.
    """

    workdir: str
    extend: bool = False


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    line = parse_command_line(argv, Flags, program="attnjax.train")
    with StopSignal() as signals:
        try:
            with signals.interrupting():
                config, train, sample, hosts = _prepare(line)
                hosts.join(signals, hosts.find())
        except StopRequested:
            print(f"{signals.requested}: nothing was begun; run the command again.")
            leave(EXIT_SAVED)
        with hosts.leaving_together():
            return train(
                config,
                line.flags.workdir,
                extend=line.flags.extend,
                sample=sample,
                signals=signals,
            )


def _prepare(line: CommandLine):
    """The resolved config, and what runs it; the imports take seconds."""
    from attnjax.core import config as configs
    from attnjax.decoding.run import read_config, sample
    from attnjax.training import experiment, hosts, run

    workdir = Path(line.flags.workdir)
    if line.config is not None:
        given = configs.load_file(line.config)
    elif (workdir / "config.json").is_file():
        given = read_config(workdir)
    else:
        raise UserError(
            "attnjax.train: without --config the run directory must hold a run; got "
            f"--workdir={workdir}, which has no config.json. Add --config FILE."
        )
    given = configs.apply_overrides(given, list(line.overrides))
    return experiment.resolve(given), run.train, sample, hosts


if __name__ == "__main__":
    run_main(main)
