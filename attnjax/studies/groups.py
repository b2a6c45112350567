"""Points that one program trains together: which they are, and the worker for them.

The worker of a point takes along every other point of the sweep that differs from it
in its seed or in numbers of the optimizer alone and that nobody runs; or, given a list,
what is left of that list. Launchers start it as they start the worker of a single
point; the points it took count as running and then as done.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from attnjax.core import cli
from attnjax.core.errors import EXIT_FAULT, EXIT_OK, EXIT_SAVED, EXIT_USER, UserError
from attnjax.core.flags import parse_command_line
from attnjax.studies import ledger, worker
from attnjax.studies.places import STUDY, run_directory
from attnjax.studies.worker import EXIT_BUSY
from attnjax.training import disk, members
from attnjax.training.signals import StopRequested, StopSignal, leave

LARGEST = 16  # points in one program
# Exit codes of points, from what asks for nothing to what asks for another start.
_GRAVITY = (EXIT_OK, EXIT_USER, EXIT_FAULT, EXIT_SAVED)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run a point of a sweep and those that one program can train with it.

    Attributes:
        workdir: the sweep's directory.
        hash: the point's, as in sweep.json.
        vectorize: always, or auto: measure first, and train one after another where
            that is faster.
        beside: the other points to run, by hash, with commas; none: whatever waits.
    """

    workdir: str
    hash: str
    vectorize: Literal["always", "auto"] = "auto"
    beside: tuple[str, ...] | None = None


def main(argv: list[str]) -> int:
    """The command line; returns an exit code as `studies.worker` does."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.studies.groups", config=False, overrides=False
    ).flags
    how = True if flags.vectorize == "always" else "auto"
    workdir = Path(flags.workdir).absolute()
    return work(workdir, flags.hash, vectorize=how, beside=flags.beside)


def command(
    workdir: Path,
    point_hash: str,
    *,
    vectorize: Literal[True, "auto"],
    beside: Sequence[str] = (),
) -> list[str]:
    """The words that run a point, and those like it, in a process of its own.

    Args:
        workdir: of the sweep.
        point_hash: which point.
        vectorize: as in `Flags`; True is "always".
        beside: the only other points to run; empty: whatever waits.
    """
    module = "attnjax.studies.groups"
    words = [sys.executable, "-m", module, "--workdir", str(workdir)]
    how = "always" if vectorize is True else "auto"
    words += ["--hash", point_hash, "--vectorize", how]
    return [*words, "--beside", ",".join(beside)] if beside else words


def split(configs: Mapping[str, dict]) -> list[list[str]]:
    """Names of runs, those that one program can train together in one list.

    Args:
        configs: name -> resolved config.
    """
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        groups.setdefault(members.common(config), []).append(name)
    return list(groups.values())


def check(configs: Mapping[str, dict]) -> None:
    """Raise UserError when no two of these runs can be trained together.

    Args:
        configs: name of the point for messages -> resolved config.
    """
    if len(configs) < 2:
        raise UserError("vectorize: needs two points or more; got one.")
    if all(len(group) == 1 for group in split(configs)):
        members.refuse(_closest(list(configs.values())))


def _closest(configs: Sequence[dict]) -> Sequence[dict]:
    """The first and the one that differs from it in the fewest settings."""
    first, *others = configs
    return first, min(others, key=lambda one: len(members.different([first, one])))


def work(
    workdir: Path,
    point_hash: str,
    *,
    vectorize: Literal[True, "auto"] = "auto",
    beside: Sequence[str] | None = None,
) -> int:
    """Run or resume a point and those like it.

    Args:
        workdir: of the sweep.
        point_hash: which point.
        vectorize: as in `train_group`.
        beside: the other points to run, done or failed before or not; None: what
            waits.

    Returns:
        `EXIT_BUSY` when another process runs the point; `EXIT_SAVED` when a signal
        ended it; the point's own exit code otherwise. With `beside`, that of all
        points: saved before a fault, and a fault before a mistake.
    """
    with StopSignal() as signals, contextlib.ExitStack() as stack:
        wanted = [point_hash, *(beside or ())]
        taken = [one for one in wanted if _take(workdir, one, stack)]
        if not taken:
            runs = [run_directory(workdir, one) for one in wanted]
            is_done = all(map(ledger.is_done, runs))
            what = "done" if is_done else "run by another process"
            print(f"{', '.join(wanted)}: {what}.", flush=True)
            return EXIT_OK if is_done else EXIT_BUSY
        if beside is None:
            taken += _take_along(workdir, point_hash, stack)
        states = [ledger.begun(ledger.read(workdir, one)) for one in taken]
        for state in states:
            ledger.write(workdir, state)
        ends = _end_all(workdir, taken, vectorize, signals)
        codes = _end(workdir, states, ends)
        return codes[0] if beside is None else max(codes, key=_GRAVITY.index)


def _take(workdir: Path, point_hash: str, stack, *, patience: float = 2.0) -> bool:
    """Hold a point to the end of the stack, if it is neither done nor run elsewhere."""
    try:
        stack.enter_context(ledger.hold(workdir, point_hash, patience=patience))
    except ledger.Busy:
        return False
    # Another worker may have ended it since somebody looked.
    return not ledger.is_done(run_directory(workdir, point_hash))


def _take_along(workdir: Path, point_hash: str, stack) -> list[str]:
    """Hold the points like this one that wait; their hashes."""
    content = disk.read_json(
        workdir / STUDY, owner="sweep", cure="Run the sweep again."
    )
    own = members.common(worker.config_of(workdir, point_hash))
    taken = []
    for one in (p["hash"] for p in content["points"] if p.get("vectorize")):
        if one == point_hash or len(taken) + 1 >= LARGEST:
            continue
        if not _is_like(workdir, one, own):
            continue
        if _state(workdir, one) != "pending":
            continue
        if _take(workdir, one, stack, patience=0):
            taken.append(one)
    return taken


def _is_like(workdir: Path, point_hash: str, common: str) -> bool:
    try:
        return members.common(worker.config_of(workdir, point_hash)) == common
    except UserError:
        return False  # the point's own worker says what is wrong


def _state(workdir: Path, point_hash: str) -> str:
    run = run_directory(workdir, point_hash)
    return ledger.settle(workdir, point_hash, run).state


def _end_all(workdir: Path, taken, vectorize, signals) -> list[tuple[int, str | None]]:
    """(exit code, error as one line) of each point, trained and evaluated."""
    runs = {one: run_directory(workdir, one) for one in taken}
    left = [one for one in taken if not ledger.is_trained(runs[one])]
    ends = dict.fromkeys(taken, (EXIT_OK, None))
    if left:
        trained = _train(workdir, left, vectorize, signals)
        ends.update(zip(left, trained, strict=True))
    for one, run in runs.items():
        if ends[one][0] == EXIT_OK and ledger.is_trained(run):
            ends[one] = worker.outcome_of(partial(worker.evaluate, run, signals))
    return list(ends.values())


def _train(workdir: Path, taken, vectorize, signals) -> list[tuple[int, str | None]]:
    """(exit code, error as one line) of each point's training."""
    try:
        try:
            with signals.interrupting():
                from attnjax.decoding.run import sample
                from attnjax.training.vectorized import train_group
        except StopRequested:
            print(f"{signals.requested}: nothing was begun.", flush=True)
            leave(EXIT_SAVED)
        outcomes = train_group(
            [worker.config_of(workdir, one) for one in taken],
            [run_directory(workdir, one) for one in taken],
            vectorize=vectorize,
            sample=sample,
            signals=signals,
        )
        return [(outcome.code, outcome.error) for outcome in outcomes]
    except Exception as error:
        code, told = cli.report(error), cli.as_user_error(error)
        text = str(told) if told else f"{type(error).__name__}: {error}"
        return [(code, " ".join(text.split()))] * len(taken)


def _end(workdir: Path, states, ends: list[tuple[int, str | None]]) -> list[int]:
    """Write how each point ended; their exit codes.

    A state that a full disk does not take leaves the others to be written, and is told
    once, unless the disk's fullness is what the points ended with.
    """
    codes, unwritten = [], None
    for state, (code, error) in zip(states, ends, strict=True):
        ended = worker.ended(workdir, state, code, error)
        code = ended.exit_code
        try:
            ledger.write(workdir, ended)
        except UserError as failure:
            unwritten, code = failure, code or EXIT_USER
        codes.append(code)
    if unwritten is not None and all(error is None for _, error in ends):
        print(f"error: {unwritten}", file=sys.stderr, flush=True)
    return codes


if __name__ == "__main__":
    cli.run_main(main)
