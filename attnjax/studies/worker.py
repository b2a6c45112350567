"""python -m attnjax.studies.worker --workdir DIR --hash H: run one point of a sweep.

What every launcher starts. It holds the point's lock, writes its state, and trains in
its run directory as `python -m attnjax.train` would.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attnjax.core import cli, mappings
from attnjax.core.errors import (
    EXIT_FAULT,
    EXIT_OK,
    EXIT_SAVED,
    EXIT_USER,
    UserError,
)
from attnjax.core.flags import parse_command_line
from attnjax.studies import evaluations, ledger
from attnjax.studies.places import config_path, run_directory
from attnjax.training import disk, identity, provenance
from attnjax.training.signals import StopRequested, StopSignal, leave

JUDGE_PATIENCE = 5.0  # seconds between looks at a judge that others train
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
    with StopSignal() as signals:
        try:
            return _work(workdir, point_hash, signals)
        except ledger.Busy:
            print(f"{point_hash}: another process runs it.", flush=True)
            return EXIT_BUSY


def _work(workdir: Path, point_hash: str, signals: StopSignal) -> int:
    with ledger.hold(workdir, point_hash):
        if ledger.is_done(run_directory(workdir, point_hash)):
            # By another driver, since ours looked.
            print(f"{point_hash}: is done.", flush=True)
            return EXIT_OK
        state = ledger.begun(ledger.read(workdir, point_hash))
        ledger.write(workdir, state)
        code, error = outcome_of(partial(_train, workdir, point_hash, signals))
        return _end(workdir, state, code, error)


def command(workdir: Path, point_hash: str) -> list[str]:
    """The words that run a point in a process of its own."""
    module = "attnjax.studies.worker"
    words = [sys.executable, "-m", module, "--workdir", str(workdir)]
    return [*words, "--hash", point_hash]


def _train(workdir: Path, point_hash: str, signals: StopSignal) -> int:
    """Train the point and evaluate it; the exit code.

    A signal before the first step ends the process in here. Whoever reads "running"
    then finds the lock free and takes the point for pending.
    """
    run = run_directory(workdir, point_hash)
    if not ledger.is_trained(run):
        try:
            with signals.interrupting():
                train = _prepare(workdir, point_hash)
        except StopRequested:
            print(f"{signals.requested}: nothing was begun.", flush=True)
            leave(EXIT_SAVED)
        code = train(signals=signals)
        if code != EXIT_OK or not ledger.is_trained(run):
            return code
    return evaluate(run, signals)


def evaluate(run: Path, signals: StopSignal) -> int:
    """Do the evaluations that a trained point misses; the exit code.

    A judge that is not trained yet is trained first: here, or by whoever has begun.

    Raises:
        UserError: an evaluation cannot be done (named).
    """
    try:
        for judge in evaluations.judges(run):
            _train_judge(run.parent.parent, judge, signals)
        evaluations.do_missing(run, signals)
    except StopRequested:
        print(f"{signals.requested}: run me again for the evaluations.", flush=True)
        return EXIT_SAVED
    return EXIT_OK


def _train_judge(workdir: Path, point_hash: str, signals: StopSignal) -> None:
    """Return when the point is trained.

    Raises:
        StopRequested: a signal came first.
        UserError: its training failed.
    """
    if not ledger.is_trained(run_directory(workdir, point_hash)):
        print(f"judge {point_hash}: not trained yet", flush=True)
    while not ledger.is_trained(run_directory(workdir, point_hash)):
        try:
            code = _work(workdir, point_hash, signals)
        except ledger.Busy:
            with signals.interrupting():
                time.sleep(JUDGE_PATIENCE)
            continue
        if code == EXIT_SAVED:
            raise StopRequested(signals.requested)
        if code != EXIT_OK:
            error = ledger.read(workdir, point_hash).error
            raise UserError(
                f"judge {point_hash}: could not be trained ({error}). Mend that; run "
                "the sweep again."
            )


def _prepare(workdir: Path, point_hash: str) -> Callable[..., int]:
    """What trains the point; the imports take seconds."""
    config = config_of(workdir, point_hash)
    from attnjax.decoding.run import sample
    from attnjax.training.run import train

    run = run_directory(workdir, point_hash)
    return partial(train, config, run, sample=sample)


def config_of(workdir: Path, point_hash: str) -> dict:
    """The resolved config of a point.

    Raises:
        UserError: the sweep has no such point, or the file is damaged or changed.
    """
    path = config_path(workdir, point_hash)
    if not path.is_file():
        raise UserError(
            f"--hash: the sweep in {str(workdir)!r} has no point {point_hash!r}. Begin "
            "it with `python -m attnjax.sweep`."
        )
    cure = "Delete it; run the sweep again."
    config = disk.read_json(path, owner="sweep", cure=cure)
    digest = mappings.digest(config, exclude=identity.EXCLUDES)
    if not digest.startswith(point_hash):
        raise UserError(
            f"sweep: {str(path)!r} is not the config of the point {point_hash!r}: it "
            f"was changed. {cure}"
        )
    return config


def outcome_of(train: Callable[[], int]) -> tuple[int, str | None]:
    """An exit code, and what went wrong as one line."""
    try:
        return train(), None
    except Exception as error:
        code = cli.report(error)
        told = cli.as_user_error(error)
        text = str(told) if told else f"{type(error).__name__}: {error}"
        return code, " ".join(text.split())


def ended(
    workdir: Path, state: ledger.State, code: int, error: str | None
) -> ledger.State:
    """The state of an attempt that ended with this exit code."""
    if code == EXIT_OK and not ledger.is_done(run_directory(workdir, state.hash)):
        code, error = EXIT_FAULT, "the training ended without a summary"
    word = {EXIT_OK: "done", EXIT_SAVED: "pending"}.get(code, "failed")
    now = provenance.now()
    return dataclasses.replace(
        state, state=word, ended=now, exit_code=code, error=error
    )


def _end(workdir: Path, state: ledger.State, code: int, error: str | None) -> int:
    """Write how the attempt ended; its exit code."""
    new = ended(workdir, state, code, error)
    try:
        ledger.write(workdir, new)
    except UserError as unwritten:
        if error is None:
            print(f"error: {unwritten}", file=sys.stderr, flush=True)
        return new.exit_code or EXIT_USER
    return new.exit_code


if __name__ == "__main__":
    cli.run_main(main)
