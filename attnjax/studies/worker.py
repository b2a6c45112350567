"""python -m attnjax.studies.worker --workdir DIR --hash H: run one point of a sweep.

What every launcher starts. It holds the point's lock, writes its state, and trains in
its run directory as `python -m attnjax.train` would.
"""

import dataclasses
import sys
from pathlib import Path

from attnjax.core import cli
from attnjax.core.errors import EXIT_FAULT, EXIT_OK, EXIT_SAVED
from attnjax.core.flags import parse_command_line
from attnjax.studies import ledger
from attnjax.studies.sweep_file import config_path, run_directory
from attnjax.training import disk, provenance
from attnjax.training.signals import StopSignal

EXIT_BUSY = 76  # another process runs the point


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run one point of a sweep; what launchers start.

    Attributes:
        workdir: the sweep's directory.
        hash: the point's, as in sweep.json.
    """

    workdir: str
    hash: str


def main(argv: list[str]) -> int:
    """The command line; returns the exit code of the training, or `EXIT_BUSY`."""
    line = parse_command_line(
        argv, Flags, program="attnjax.studies.worker", config=False, overrides=False
    )
    return work(Path(line.flags.workdir).absolute(), line.flags.hash)


def work(workdir: Path, point_hash: str) -> int:
    """Run or resume a point; see `main`."""
    cure = "Run `python -m attnjax.sweep` on this directory again."
    path = config_path(workdir, point_hash)
    config = disk.read_json(path, owner="sweep", cure=cure)
    run = run_directory(workdir, point_hash)
    with StopSignal() as signals:
        try:
            with ledger.hold(workdir, point_hash):
                state = ledger.begun(ledger.read(workdir, point_hash))
                ledger.write(workdir, state)
                code, error = _train(config, run, signals)
                ledger.write(workdir, _ended(state, code, error, run))
                return code
        except ledger.Busy:
            print(f"{point_hash}: another process runs it.", flush=True)
            return EXIT_BUSY


def _train(config: dict, run: Path, signals: StopSignal) -> tuple[int, str | None]:
    from attnjax.decoding.run import sample_text
    from attnjax.training.run import train

    try:
        code = train(config, run, sample=sample_text, signals=signals)
        return code, None
    except Exception as error:
        code = cli.report(error)
        told = cli.as_user_error(error)
        text = str(told) if told else f"{type(error).__name__}: {error}"
        return code, " ".join(text.split())


def _ended(
    state: ledger.State, code: int, error: str | None, run: Path
) -> ledger.State:
    if code == EXIT_OK and not ledger.is_done(run):
        code, error = EXIT_FAULT, "the training ended without a summary"
    word = {EXIT_OK: "done", EXIT_SAVED: "pending"}.get(code, "failed")
    return dataclasses.replace(
        state, state=word, ended=provenance.now(), exit_code=code, error=error
    )


def command(workdir: Path, point_hash: str) -> list[str]:
    """The words that run a point in a process of its own."""
    module = "attnjax.studies.worker"
    words = [sys.executable, "-m", module, "--workdir", str(workdir)]
    return [*words, "--hash", point_hash]


if __name__ == "__main__":
    cli.run_main(main)
