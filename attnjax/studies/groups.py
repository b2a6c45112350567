"""Points that one program trains together: which they are, and the worker for them.

The worker of a point takes along every other point of the sweep that differs from it
in its seed or in numbers of the optimizer alone and that nobody runs. Launchers start
it as they start the worker of a single point; the points it took count as running and
then as done.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from attnjax.core import cli
from attnjax.core.errors import EXIT_FAULT, EXIT_OK, EXIT_SAVED, UserError
from attnjax.core.flags import parse_command_line
from attnjax.studies import ledger
from attnjax.studies.places import STUDY, config_path, run_directory
from attnjax.studies.worker import EXIT_BUSY
from attnjax.training import disk, members, provenance
from attnjax.training.signals import StopRequested, StopSignal, leave

LARGEST = 16  # points in one program


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run a point of a sweep and those that one program can train with it.

    Attributes:
        workdir: the sweep's directory.
        hash: the point's, as in sweep.json.
        vectorize: always, or auto: measure first, and train one after another where
            that is faster.
    """

    workdir: str
    hash: str
    vectorize: Literal["always", "auto"] = "auto"


def main(argv: list[str]) -> int:
    """The command line; returns an exit code as `studies.worker` does."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.studies.groups", config=False, overrides=False
    ).flags
    how = True if flags.vectorize == "always" else "auto"
    return work(Path(flags.workdir).absolute(), flags.hash, vectorize=how)


def command(
    workdir: Path, point_hash: str, *, vectorize: Literal[True, "auto"]
) -> list[str]:
    """The words that run a point, and those like it, in a process of its own."""
    module = "attnjax.studies.groups"
    words = [sys.executable, "-m", module, "--workdir", str(workdir)]
    how = "always" if vectorize is True else "auto"
    return [*words, "--hash", point_hash, "--vectorize", how]


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
    workdir: Path, point_hash: str, *, vectorize: Literal[True, "auto"] = "auto"
) -> int:
    """Run or resume a point and those like it.

    Returns:
        `EXIT_BUSY` when another process runs the point; `EXIT_SAVED` when a signal
        ended it; the point's own exit code otherwise.
    """
    with StopSignal() as signals, contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ledger.hold(workdir, point_hash))
        except ledger.Busy:
            print(f"{point_hash}: another process runs it.", flush=True)
            return EXIT_BUSY
        taken = [point_hash, *_take_along(workdir, point_hash, stack)]
        states = [ledger.begun(ledger.read(workdir, one)) for one in taken]
        for state in states:
            ledger.write(workdir, state)
        ends = _train(workdir, taken, vectorize, signals)
        for state, (code, error) in zip(states, ends, strict=True):
            ledger.write(workdir, _ended(workdir, state, code, error))
        return ends[0][0]


def _take_along(workdir: Path, point_hash: str, stack) -> list[str]:
    """Hold the points like this one that wait; their hashes."""
    content = disk.read_json(
        workdir / STUDY, owner="sweep", cure="Run the sweep again."
    )
    own = members.common(_config(workdir, point_hash))
    taken = []
    for one in (point["hash"] for point in content["points"]):
        if one == point_hash or len(taken) + 1 >= LARGEST:
            continue
        if members.common(_config(workdir, one)) != own:
            continue
        if _state(workdir, one) != "pending":
            continue
        with contextlib.suppress(ledger.Busy):
            stack.enter_context(ledger.hold(workdir, one, patience=0))
            # Another worker may have ended it between the look and the lock.
            if not ledger.is_done(run_directory(workdir, one)):
                taken.append(one)
    return taken


def _state(workdir: Path, point_hash: str) -> str:
    run = run_directory(workdir, point_hash)
    return ledger.settle(workdir, point_hash, run).state


def _config(workdir: Path, point_hash: str) -> dict:
    path = config_path(workdir, point_hash)
    if not path.is_file():
        raise UserError(
            f"--hash: the sweep in {str(workdir)!r} has no point {point_hash!r}. Begin "
            "it with `python -m attnjax.sweep`."
        )
    return disk.read_json(path, owner="sweep", cure="Delete it; run the sweep again.")


def _train(workdir: Path, taken, vectorize, signals) -> list[tuple[int, str | None]]:
    """(exit code, error as one line) of each point."""
    try:
        try:
            with signals.interrupting():
                from attnjax.decoding.run import sample_text
                from attnjax.training.vectorized import train_group
        except StopRequested:
            print(f"{signals.requested}: nothing was begun.", flush=True)
            leave(EXIT_SAVED)
        outcomes = train_group(
            [_config(workdir, one) for one in taken],
            [run_directory(workdir, one) for one in taken],
            vectorize=vectorize,
            sample=sample_text,
            signals=signals,
        )
        return [(outcome.code, outcome.error) for outcome in outcomes]
    except Exception as error:
        code, told = cli.report(error), cli.as_user_error(error)
        text = str(told) if told else f"{type(error).__name__}: {error}"
        return [(code, " ".join(text.split()))] * len(taken)


def _ended(workdir: Path, state: ledger.State, code: int, error) -> ledger.State:
    if code == EXIT_OK and not ledger.is_done(run_directory(workdir, state.hash)):
        code, error = EXIT_FAULT, "the training ended without a summary"
    word = {EXIT_OK: "done", EXIT_SAVED: "pending"}.get(code, "failed")
    now = provenance.now()
    return dataclasses.replace(
        state, state=word, ended=now, exit_code=code, error=error
    )


if __name__ == "__main__":
    cli.run_main(main)
