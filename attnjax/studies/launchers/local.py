"""The `local` launcher: worker processes on this machine, so many at a time."""

import collections
import dataclasses
import signal
import subprocess
import time
from pathlib import Path
from typing import IO

from attnjax.core.errors import (
    EXIT_FAULT,
    EXIT_OK,
    EXIT_SAVED,
    EXIT_USER,
    UserError,
)
from attnjax.studies import ledger, worker
from attnjax.studies.launchers import Options
from attnjax.studies.live import Display
from attnjax.studies.sweep_file import Planned, Study
from attnjax.training.signals import StopSignal

POLL = 0.1
# Between two looks at a point that another driver runs.
ELSEWHERE = 1.0


@dataclasses.dataclass
class Job:
    """A worker that runs."""

    point: Planned
    process: subprocess.Popen
    log: Path
    began: float


def launch(study: Study, options: Options) -> int:
    """Run every point that is not done; `EXIT_SAVED` when asked to stop."""
    if options.jobs < 1:
        raise UserError(f"--jobs: must be at least 1; got {options.jobs}.")
    if options.retries < 0:
        raise UserError(f"--retries: must not be negative; got {options.retries}.")
    told = "the workers save and stop; the same command goes on (again: kill them)"
    with StopSignal(what_happens=told) as signals, Display(study) as display:
        driver = _Driver(study, options, display)
        try:
            while driver.unfinished and signals.requested is None:
                driver.turn()
                time.sleep(POLL)
            if signals.requested is not None:
                driver.stop()
        finally:
            driver.kill()
    if signals.requested is not None:
        print(f"{signals.requested}: {driver.summary()}. Run the same command again.")
        return EXIT_SAVED
    print(driver.summary() + ".")
    for point, error in driver.failed.items():
        print(f"failed: {study.by_hash[point].name}: {error}")
    return EXIT_FAULT if driver.failed else EXIT_OK


class _Driver:
    """The points of one invocation: waiting, running here or elsewhere, ended."""

    def __init__(self, study: Study, options: Options, display: Display):
        self.study, self.options, self.display = study, options, display
        self.waiting: collections.deque[Planned] = collections.deque()
        self.running: dict[str, Job] = {}
        self.elsewhere: dict[str, float] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.crashes: collections.Counter[str] = collections.Counter()
        for point in study.points:
            self._admit(point)
        self.display.begin(len(self.done))

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to do or to wait for."""
        return bool(self.waiting or self.running or self.elsewhere)

    def turn(self) -> None:
        """Start what fits, take in what has ended."""
        while self.waiting and len(self.running) < self.options.jobs:
            self._start(self.waiting.popleft())
        for job in list(self.running.values()):
            code = job.process.poll()
            if code is not None:
                del self.running[job.point.hash]
                self._ended(job, code)
        for point_hash, seen in list(self.elsewhere.items()):
            if time.monotonic() - seen > ELSEWHERE:
                del self.elsewhere[point_hash]
                self._admit(self.study.by_hash[point_hash])
        self.display.update(self.running, len(self.waiting), len(self.elsewhere))

    def stop(self) -> None:
        """Ask the workers to save, and wait for them."""
        for job in self.running.values():
            job.process.send_signal(signal.SIGTERM)
        for job in list(self.running.values()):
            code = job.process.wait()
            del self.running[job.point.hash]
            if code == EXIT_OK:
                self._ended(job, code)

    def kill(self) -> None:
        """End the workers that still run, on an exception or a second Ctrl-C."""
        for job in self.running.values():
            job.process.kill()
            job.process.wait()

    def summary(self) -> str:
        """How many points are where, in words."""
        total = len(self.study.points)
        left = total - len(self.done) - len(self.failed)
        parts = [f"{len(self.done)} of {total} points done"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{left} left"] if left else []
        return ", ".join(parts)

    def _admit(self, point: Planned) -> None:
        """Put a point where its state says it belongs."""
        state = ledger.current(self.study.workdir, point.hash)
        if state.state == "done" or ledger.is_done(self.study.run_directory(point)):
            self.done.add(point.hash)
        elif state.state == "running":
            self.elsewhere[point.hash] = time.monotonic()
        else:
            self.waiting.append(point)

    def _start(self, point: Planned) -> None:
        try:
            attempt = ledger.read(self.study.workdir, point.hash).attempt + 1
            log = self.study.workdir / "logs" / f"{point.hash}.{attempt}.log"
            with open(log, "ab") as file:
                process = self._process(point, file)
        except (OSError, UserError) as error:
            # A full disk, say: this point cannot run now; the others may.
            self._fail(point, " ".join(str(error).split()))
            return
        self.running[point.hash] = Job(point, process, log, time.monotonic())
        self.display.started(point, attempt)

    def _process(self, point: Planned, log: IO[bytes]) -> subprocess.Popen:
        return subprocess.Popen(
            worker.command(self.study.workdir, point.hash),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for the driver, which tells the workers.
            start_new_session=True,
        )

    def _ended(self, job: Job, code: int) -> None:
        point, took = job.point, time.monotonic() - job.began
        if code == EXIT_OK:
            self.done.add(point.hash)
            self.display.finished(point, took, len(self.done))
        elif code == worker.EXIT_BUSY:
            self.elsewhere[point.hash] = time.monotonic()
        elif code == EXIT_SAVED:
            self.waiting.appendleft(point)
        elif code == EXIT_USER:
            self._fail(point, self._error(job, code))
        else:
            self.crashes[point.hash] += 1
            error = self._error(job, code)
            if self.crashes[point.hash] > self.options.retries:
                self._fail(point, error)
            else:
                self.display.crashed(point, error, self.crashes[point.hash])
                self.waiting.append(point)

    def _error(self, job: Job, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name} (log: {job.log})"
        state = ledger.read(self.study.workdir, job.point.hash)
        words = state.error or ledger.last_words(job.log) or f"exit code {code}"
        return f"{words} (log: {job.log})"

    def _fail(self, point: Planned, error: str) -> None:
        self.failed[point.hash] = error
        self.display.failed(point, error)
        try:
            with ledger.hold(self.study.workdir, point.hash, patience=0):
                state = ledger.read(self.study.workdir, point.hash)
                if state.state != "failed":
                    ledger.write(
                        self.study.workdir,
                        dataclasses.replace(state, state="failed", error=error),
                    )
        except (ledger.Busy, OSError, UserError):
            # Nobody can be told on a full disk; the next driver sees "pending".
            self.display.note(f"{point.name}: its state could not be written")
