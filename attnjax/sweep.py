"""python -m attnjax.sweep --sweep FILE --workdir DIR: run the points of a study."""

import dataclasses

from attnjax.core.cli import run_main
from attnjax.core.errors import EXIT_OK
from attnjax.core.flags import parse_command_line


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run every point of a sweep file. The same command again does what is missing.

    Attributes:
        sweep: Python file with sweep() and, for the report, table().
        workdir: the sweep's directory.
        launcher: local, slurm or print.
        only: LABEL=VALUE,...: run the points with these labels; several values of one
            label are alternatives (none: all).
        jobs: points that run at one time.
        retries: how often a point that crashed is begun again.
        slurm: JSON file with settings of the slurm launcher.
        dry_run: show points, parameters, FLOPs and estimated time; run nothing.
    """

    sweep: str
    workdir: str
    launcher: str = "local"
    only: str | None = None
    jobs: int = 1
    retries: int = 2
    slurm: str | None = None
    dry_run: bool = False


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.sweep", config=False, overrides=False
    ).flags
    from attnjax.studies import forecast, launchers, sweep_file

    launch = launchers.find(flags.launcher)
    study = sweep_file.load(flags.sweep, flags.workdir, only=flags.only)
    if flags.dry_run:
        print("\n".join(forecast.lines(study)))
        return EXIT_OK
    study.write()
    options = launchers.Options(flags.jobs, flags.retries, flags.slurm)
    return launch(study, options)


if __name__ == "__main__":
    run_main(main)
