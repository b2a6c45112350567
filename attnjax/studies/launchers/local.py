"""The `local` launcher: worker processes on this machine, so many at a time."""

import collections
import dataclasses
import shutil
import signal
import subprocess
import sys
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
from attnjax.studies.places import log_path
from attnjax.studies.sweep_file import Planned, Study
from attnjax.training.signals import StopSignal

POLL = 0.1
_NO_ROOM = 64 * 1024  # bytes
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
            driver.stop()
        except Exception:
            driver.stop()
            raise
        finally:
            driver.kill()
    if signals.requested is not None:
        print(f"{signals.requested}: {driver.summary()}. Run the same command again.")
        return EXIT_SAVED
    print(driver.summary() + ".", flush=True)
    for point, error in driver.failed.items():
        print(f"error: {study.by_hash[point].name}: {error}", file=sys.stderr)
    if driver.failed:
        return EXIT_USER if driver.failed.keys() <= driver.mistaken else EXIT_FAULT
    return EXIT_OK


class _Driver:
    """The points of one invocation: waiting, running here or elsewhere, ended."""

    def __init__(self, study: Study, options: Options, display: Display):
        self.study, self.options, self.display = study, options, display
        self.waiting: collections.deque[Planned] = collections.deque()
        self.running: dict[str, Job] = {}
        self.elsewhere: dict[str, float] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.mistaken: set[str] = set()
        self.crashes: collections.Counter[str] = collections.Counter()
        for point in study.asked:
            if self._is_free(point):
                self.waiting.append(point)
        self.display.begin(len(self.done))

    @property
    def unfinished(self) -> bool:
        """Whether anything is left to do or to wait for."""
        return bool(self.waiting or self.running or self.elsewhere)

    def turn(self) -> None:
        """Start what fits, take in what has ended."""
        while self.waiting and len(self.running) < self.options.jobs:
            point = self.waiting.popleft()
            # Another driver may have begun or finished it since.
            if self._is_free(point):
                self._start(point)
        for job in list(self.running.values()):
            code = job.process.poll()
            if code is not None:
                del self.running[job.point.hash]
                self._ended(job, code)
        for point_hash, seen in list(self.elsewhere.items()):
            if time.monotonic() - seen > ELSEWHERE:
                del self.elsewhere[point_hash]
                self._return(self.study.by_hash[point_hash])
        self.display.update(self.running, len(self.waiting), len(self.elsewhere))

    def stop(self) -> None:
        """Ask the workers to save, and wait for them."""
        for job in self.running.values():
            job.process.send_signal(signal.SIGTERM)
        for job in list(self.running.values()):
            code = job.process.wait()
            del self.running[job.point.hash]
            run = self.study.run_directory(job.point)
            state = ledger.settle(self.study.workdir, job.point.hash, run)
            if state.state == "done":
                self._ended(job, code)

    def kill(self) -> None:
        """End the workers that still run, on an exception or a second Ctrl-C."""
        for job in self.running.values():
            job.process.kill()
            job.process.wait()

    def summary(self) -> str:
        """How many points are where, in words."""
        total = len(self.study.asked)
        left = total - len(self.done) - len(self.failed)
        parts = [f"{len(self.done)} of {total} points done"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{left} left"] if left else []
        return ", ".join(parts)

    def _is_free(self, point: Planned) -> bool:
        """Whether a point is neither done nor run by somebody else; notes which."""
        run = self.study.run_directory(point)
        state = ledger.settle(self.study.workdir, point.hash, run).state
        if state == "done":
            self.done.add(point.hash)
        elif state == "running":
            self.elsewhere[point.hash] = time.monotonic()
        return state not in ("done", "running")

    def _return(self, point: Planned) -> None:
        """Look again at a point that another process has run."""
        if not self._is_free(point):
            if point.hash in self.done:
                self.display.note(f"done    {point.hash}  {point.name}  elsewhere")
            return
        state = ledger.read(self.study.workdir, point.hash)
        if state.state == "failed":
            self._failed(point, state.exit_code, state.error or "failed elsewhere")
        else:
            self.waiting.append(point)

    def _start(self, point: Planned) -> None:
        try:
            attempt = ledger.read(self.study.workdir, point.hash).attempt + 1
            log = log_path(self.study.workdir, point.hash, attempt)
            with open(log, "ab") as file:
                process = self._process(point, file)
        except (OSError, UserError) as error:
            # A full disk, say: this point cannot run now; the others may.
            self._give_up(point, EXIT_USER, " ".join(str(error).split()))
            return
        self.running[point.hash] = Job(point, process, log, time.monotonic())
        self.display.started(point, attempt)

    def _process(self, point: Planned, log: IO[bytes]) -> subprocess.Popen:
        return subprocess.Popen(
            self.study.command(point),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for the driver, which tells the workers.
            start_new_session=True,
        )

    def _ended(self, job: Job, code: int) -> None:
        point, took = job.point, time.monotonic() - job.began
        run = self.study.run_directory(point)
        # A full disk may take the run's last file, and no word about it after that.
        if code == EXIT_OK or ledger.is_done(run):
            self.done.add(point.hash)
            self.display.finished(point, took, len(self.done))
        elif code == worker.EXIT_BUSY:
            self.elsewhere[point.hash] = time.monotonic()
        elif code == EXIT_SAVED:
            self.waiting.appendleft(point)
        else:
            error = self._error(job, code)
            # A worker that cannot write a word does not end as it means to.
            mistake = code > 0 and self._is_full()
            self._failed(point, EXIT_USER if mistake else code, error)

    def _failed(self, point: Planned, code: int | None, error: str) -> None:
        """A worker failed: try again, unless it is a mistake or has been enough."""
        self.crashes[point.hash] += 1
        if code == EXIT_USER or self.crashes[point.hash] > self.options.retries:
            self._give_up(point, code, error)
        else:
            self.display.crashed(point, error, self.crashes[point.hash])
            self.waiting.append(point)

    def _error(self, job: Job, code: int) -> str:
        """What a worker that failed had to say, as one line."""
        log = f"(log: {job.log})"
        if code < 0:
            return f"killed by {signal.Signals(-code).name} {log}"
        state = ledger.read(self.study.workdir, job.point.hash)
        words = state.error if state.pid == job.process.pid else None
        words = words or (ledger.last_words(job.log) or "").removeprefix("error: ")
        if not words and self._is_full():
            words = "no space left on the disk, not even for a word of the worker"
        return f"{words or f'exit code {code}'} {log}"

    def _is_full(self) -> bool:
        return shutil.disk_usage(self.study.workdir).free < _NO_ROOM

    def _give_up(self, point: Planned, code: int | None, error: str) -> None:
        self.failed[point.hash] = error
        if code == EXIT_USER:
            self.mistaken.add(point.hash)
        self.display.failed(point, error)
        workdir = self.study.workdir
        try:
            with ledger.hold(workdir, point.hash, patience=0):
                state = ledger.read(workdir, point.hash)
                if state.state != "failed":
                    failed = {"state": "failed", "exit_code": code, "error": error}
                    ledger.write(workdir, dataclasses.replace(state, **failed))
        except (ledger.Busy, OSError, UserError):
            # Nobody can be told on a full disk; the next driver sees "pending".
            self.display.note(f"{point.name}: its state could not be written")
