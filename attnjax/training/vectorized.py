"""Several runs trained by one program: a vmap over seeds and optimizer settings.

Every run keeps a directory of its own, which is what training it alone would have
left: config, metrics, summary, and checkpoints from which it goes on, together or
alone. Its batches are those of its own seed. Times in its metrics are its share.

Resuming: runs that are finished stay as they are. The others go on together from the
newest step that all of them hold, when none loses more than one save by it: a kill in
the middle of saving leaves some runs one save ahead, which is dropped and trained
again. Otherwise those at the same step go on together, one part after another, and no
work is lost.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax

from attnjax.core import cli
from attnjax.core.errors import EXIT_OK, EXIT_SAVED, EXIT_USER, UserError
from attnjax.training import experiment as experiments
from attnjax.training import hosts, identity, members, run, source_run, start, together
from attnjax.training.checkpoints import Checkpointer
from attnjax.training.experiment import Experiment
from attnjax.training.loop import Services
from attnjax.training.progress import Reporter
from attnjax.training.record import BadSteps, Record
from attnjax.training.run_directory import CONFIG, RunDirectory
from attnjax.training.signals import StopRequested, StopSignal, leave


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run of a group ended.

    Attributes:
        code: the exit code that training it alone would have had.
        error: what went wrong as one line, or None.
    """

    code: int
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class _Seat:
    """One run of a group: what it trains and where."""

    index: int
    experiment: Experiment
    run: RunDirectory

    @property
    def name(self) -> str:
        """For lines that several runs share a terminal for."""
        return self.run.path.name


def train_group(
    configs: Sequence[dict],
    workdirs: Sequence[str | Path],
    *,
    vectorize: Literal[True, "auto"] = True,
    sample: Callable | None = None,
    signals: StopSignal | None = None,
) -> list[Outcome]:
    """Train or resume runs that one program can train together.

    Args:
        configs: from `experiment.resolve`; they may differ in `train.seed` and in
            numbers of `optim`.
        workdirs: the run directory of each.
        vectorize: "auto" measures a few steps of both ways and trains the runs one
            after another where that is faster.
        sample: (experiment, state) -> text kept at the end, or None.
        signals: already entered by the caller; None enters one here.

    Returns:
        How each run ended, in order. A run that fails leaves the others going.

    Raises:
        UserError: when the configs cannot be trained together, naming the settings.
    """
    if signals is None:
        with StopSignal() as own:
            return train_group(
                configs, workdirs, vectorize=vectorize, sample=sample, signals=own
            )
    if vectorize not in (True, "auto"):
        raise UserError(f"vectorize: must be True or 'auto'; got {vectorize!r}.")
    if not configs or len(configs) != len(workdirs):
        raise ValueError("train_group: needs as many directories as configs, not none.")
    members.refuse(configs)
    try:
        with signals.interrupting():
            pairs = zip(configs, workdirs, strict=True)
            configs = [source_run.completed(*pair) for pair in pairs]
            first = experiments.build(configs[0])
            group = [experiments.like(first, config) for config in configs]
    except StopRequested:
        print(f"{signals.requested}: nothing was begun; run the command again.")
        leave(EXIT_SAVED)
    outcomes: list[Outcome | None] = [None] * len(group)
    with contextlib.ExitStack() as stack:
        seats = _sit_down(group, workdirs, outcomes, stack)
        try:
            for step, part in _parts(seats, outcomes):
                codes = _train_part(part, step, vectorize, signals, sample)
                for seat, outcome in zip(part, codes, strict=True):
                    outcomes[seat.index] = outcome
        except StopRequested:
            print(f"{signals.requested}: nothing new to save.", flush=True)
            stack.close()
            leave(EXIT_SAVED)
    return outcomes


def _sit_down(group, workdirs, outcomes: list, stack) -> list[_Seat]:
    """Open the directories; those of finished runs and of mistakes get an outcome."""
    seats = []
    for index, (one, workdir) in enumerate(zip(group, workdirs, strict=True)):
        try:
            if not (Path(workdir) / CONFIG).exists():
                run.check_source(one)
            directory = stack.enter_context(
                RunDirectory.open(
                    workdir,
                    one.config,
                    resolve=experiments.resolve,
                    identity_excludes=identity.EXCLUDES,
                    primary=hosts.is_writer(),
                )
            )
        except UserError as error:
            outcomes[index] = _failed(error)
            continue
        if directory.finished:
            run.say_done(directory)
            outcomes[index] = Outcome(EXIT_OK)
            continue
        directory.set_phase("start")
        seats.append(_Seat(index, one, directory))
    return seats


def _parts(seats: list[_Seat], outcomes: list) -> list[tuple[int, list[_Seat]]]:
    """(step to go on from, runs) of each part; 0 is the beginning."""
    held: dict[int, list[int]] = {}
    for seat in seats:
        try:
            held[seat.index] = _newest(seat)
        except UserError as error:
            outcomes[seat.index] = _failed(error)
    seats = [seat for seat in seats if seat.index in held]
    if not seats:
        return []
    shared = set.intersection(*(set(held[seat.index]) for seat in seats))
    if shared:
        return [(max(shared), seats)]
    steps = sorted({held[seat.index][0] for seat in seats}, reverse=True)
    return [(step, [s for s in seats if held[s.index][0] == step]) for step in steps]


def _newest(seat: _Seat) -> list[int]:
    """The newest intact step of a run and the one before it; [0] for a new one."""
    settings = seat.experiment.train
    with Checkpointer(seat.run.checkpoints, keep_last=settings.keep_last) as saved:
        found = saved.latest()
        if found is None:
            return [0]
        for step, reason in found.skipped:
            print(
                f"{seat.name}: checkpoint of step {step} is damaged and was skipped: "
                f"{reason}"
            )
        older = [step for step in reversed(saved.steps()) if step < found.step]
        intact = next((step for step in older if not saved.verify(step)), None)
        return [found.step] + ([] if intact is None else [intact])


def _train_part(seats, step: int, vectorize, signals, sample) -> list[Outcome]:
    """Train runs that go on from one step."""
    if signals.requested is not None:
        return [Outcome(EXIT_SAVED)] * len(seats)
    if len(seats) > 1 and (vectorize is True or _is_faster(seats, signals)):
        try:
            return _train_together(seats, step, signals, sample)
        except Exception as error:
            return [_failed(error)] * len(seats)
    return [_train_alone(seat, signals, sample) for seat in seats]


def _is_faster(seats, signals: StopSignal) -> bool:
    with signals.interrupting():
        ratio = together.measure([seat.experiment for seat in seats])
    chosen = "together" if ratio < 1 else "one after another"
    print(
        f"vectorize: a step of {len(seats)} runs together takes {ratio:.2f} of the "
        f"time of {len(seats)} steps of single runs; training them {chosen}.",
        flush=True,
    )
    return ratio < 1


def _train_alone(seat: _Seat, signals: StopSignal, sample) -> Outcome:
    if signals.requested is not None:
        return Outcome(EXIT_SAVED)
    print(f"{seat.name}:", flush=True)
    try:
        return Outcome(run.go_on(seat.experiment, seat.run, signals, sample, ()))
    except Exception as error:
        return _failed(error)


def _train_together(seats, step: int, signals: StopSignal, sample) -> list[Outcome]:
    group = [seat.experiment for seat in seats]
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(run.opened(seat.experiment, seat.run)) for seat in seats
        ]
        state, pending = _first_state(seats, files, step, signals)
        step = int(state["step"][0])
        sinks = [
            run.begin(seat.experiment, seat.run, metrics, step)
            for seat, (metrics, _) in zip(seats, files, strict=True)
        ]
        _say_start(seats, step)
        with Reporter(group[0].train.steps, start=step) as reporter:
            records = []
            for seat, (metrics, saved), own, is_due in zip(
                seats, files, sinks, pending, strict=True
            ):
                services = Services(seat.run, metrics, saved, signals, reporter, own)
                is_due = is_due and not metrics.has(step, "eval")
                records.append(
                    Record(
                        seat.experiment, services, pending_eval=is_due, name=seat.name
                    )
                )
            loop = together.GroupLoop(group, state, records)
            code = _run(loop)
        return [
            _conclude(loop, index, code, sample, seat)
            for index, seat in enumerate(seats)
        ]


def _run(loop: together.GroupLoop) -> int:
    try:
        return loop()
    except BadSteps:
        return EXIT_USER  # every run has its own error
    except Exception:
        for _, record in loop.alive():
            record.services.run.end("failed", loop.step)
        raise


def _conclude(loop, index: int, code: int, sample, seat: _Seat) -> Outcome:
    record = loop.records[index]
    if record.error is not None:
        return _failed(record.error, told=True)
    print(f"\n{seat.name}:", flush=True)
    try:
        state = loop.member(index)
        run.conclude(seat.experiment, record.services, code, loop.step, state, sample)
    except Exception as error:
        return _failed(error)
    return Outcome(code)


def _first_state(seats, files, step: int, signals) -> tuple[dict, list[bool]]:
    """The stacked state, and for each run whether its evaluation is still due."""
    group = [seat.experiment for seat in seats]
    for seat, (_, saved) in zip(seats, files, strict=True):
        seat.run.set_phase("compile")
        for later in saved.drop_after(step):
            print(f"{seat.name}: step {later} goes; the runs meet at step {step}")
    with signals.interrupting():
        if step:
            print(f"resuming {len(seats)} runs from step {step}", flush=True)
            found = [
                start.restore(one, saved, step)
                for one, (_, saved) in zip(group, files, strict=True)
            ]
            state = together.stack(group[0], [state for state, _ in found])
            return state, [bool(meta["pending_eval"]) for _, meta in found]
        fresh = [False] * len(seats)
        if group[0].train.init_from is None:
            return together.new_states(group), fresh
        states = [run.state_from_source(one) for one in group]
        return together.stack(group[0], states), fresh


def _say_start(seats, step: int) -> None:
    one = seats[0].experiment
    values = members.values([seat.experiment.config for seat in seats])
    shown = "; ".join(f"{n} {', '.join(map(str, v))}" for n, v in values.items())
    print(
        f"{len(seats)} runs in one program ({shown}): "
        f"{one.model.parameter_count():,} parameters each, {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}; step {step} of {one.train.steps}",
        flush=True,
    )


def _failed(error: Exception, *, told: bool = False) -> Outcome:
    """The outcome of an error; it is printed unless it has been told."""
    mistake = cli.as_user_error(error)
    code = EXIT_USER if told else cli.report(error)
    text = str(mistake) if mistake else f"{type(error).__name__}: {error}"
    return Outcome(code, " ".join(text.split()))
