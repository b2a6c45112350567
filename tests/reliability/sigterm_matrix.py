"""Ask a training run to stop in every phase; it must save, say so, and exit with 75.

    python tests/reliability/sigterm_matrix.py --signals 20 \\
        --out docs/reliability/sigterm_matrix.md

SIGTERM and SIGINT are sent in turn while the run starts up, compiles, steps,
evaluates and saves. Each process must end by itself with the exit code for "saved, run
me again", having said how, after at most one more dispatch or evaluation batch; and
the resumed run must end with the bits of a run that was left alone.
"""

import argparse
import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import tiny_run

from attnjax.core.errors import EXIT_SAVED

PHASES = ("start", "compile", "step", "eval", "save")
SIGNALS = ("SIGTERM", "SIGINT")
# Steps that may still be counted: the dispatch under way and the one before it,
# whose metrics had not been written when the signal came.
_STEPS_AFTER = 2
_SPREAD = {"start": 1.0, "compile": 1.0, "step": 0.05, "eval": 0.05, "save": 0.05}


@dataclasses.dataclass(frozen=True)
class Stop:
    """One signal and what came of it.

    Attributes:
        run: the run's name.
        phase: the phase it was sent in.
        name: of the signal.
        code: exit code of the process.
        seconds: from the signal to the end of the process.
        steps: how many steps were written after it.
        problems: what was not as promised.
    """

    run: str
    phase: str
    name: str
    code: int
    seconds: float
    steps: int
    problems: tuple[str, ...] = ()


def sigterm_matrix(
    folder: Path, *, signals: int, per_run: int = 5, seed: int = 0, say=print
) -> tuple[list[Stop], list[str]]:
    """Stop runs `signals` times; (every stop, where finished runs differ)."""
    rng = random.Random(seed)
    bench = tiny_run.Bench(folder)
    if bench.finish("alone") != 0:
        raise RuntimeError(f"the run left alone failed:\n{bench.log('alone')}")
    stops: list[Stop] = []
    differences: list[str] = []
    while len(stops) < signals:
        run = f"run_{len(stops):03d}"
        for _ in range(min(per_run, signals - len(stops))):
            phase = PHASES[len(stops) % len(PHASES)]
            name = SIGNALS[(len(stops) // len(PHASES)) % len(SIGNALS)]
            stops.append(_stop(bench, run, phase, name, rng))
            say(_row(stops[-1]))
        code = bench.finish(run)
        if code != 0:
            differences.append(f"{run}: ended with {code}: {bench.log(run)[-2000:]}")
            continue
        left, right = bench.folder / "alone", bench.folder / run
        differences += [f"{run}: {d}" for d in tiny_run.differences(left, right)]
    return stops, differences


def _stop(bench, run: str, phase: str, name: str, rng) -> Stop:
    folder, before = bench.folder / run, len(bench.log(run))
    (folder / "phase").unlink(missing_ok=True)
    process = bench.start(run)
    floor = tiny_run.last_step(folder) + rng.randrange(0, 40)

    def reached() -> bool:
        if phase == "start":
            return catches_sigterm(process.pid)
        if tiny_run.phase(folder) != phase:
            return False
        return phase == "compile" or tiny_run.last_step(folder) >= floor

    if not tiny_run.wait_for(reached, process=process):
        return Stop(run, phase, name, process.returncode, 0, 0, ("ended before it",))
    time.sleep(rng.uniform(0, _SPREAD[phase]))
    # A phase of milliseconds may be over: the table tells where the signal came.
    # Held meanwhile, so that what is counted after the signal came after it.
    process.send_signal(signal.SIGSTOP)
    phase = tiny_run.phase(folder)
    at, begin = tiny_run.last_step(folder), time.perf_counter()
    process.send_signal(getattr(signal, name))
    process.send_signal(signal.SIGCONT)
    code = process.wait(timeout=tiny_run.PATIENCE)
    seconds = time.perf_counter() - begin
    steps = tiny_run.last_step(folder) - at
    told = bench.log(run)[before:]
    return Stop(
        run, phase, name, code, seconds, steps, _problems(name, code, steps, told)
    )


def _problems(name: str, code: int, steps: int, told: str) -> tuple[str, ...]:
    problems = []
    if code != EXIT_SAVED:
        problems.append(f"exit code {code}")
    if f"{name} received" not in told:
        problems.append("the signal was not announced")
    if "--workdir" not in told and "run the command again" not in told:
        problems.append("nothing says how to go on")
    if "Traceback" in told:
        problems.append("a traceback")
    if steps > _STEPS_AFTER:
        problems.append(f"{steps} more steps")
    return tuple(problems)


def catches_sigterm(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(row for row in status.splitlines() if row.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _row(stop: Stop) -> str:
    result = "; ".join(stop.problems) or "saved"
    return (
        f"| {stop.run} | {stop.phase} | {stop.name} | {stop.code} | "
        f"{stop.seconds:.2f} | {stop.steps} | {result} |"
    )


def table(stops: list[Stop], differences: list[str], *, command: str) -> str:
    """The result as a page of Markdown."""
    good = sum(not stop.problems for stop in stops)
    return "\n".join(
        [
            "# SIGTERM matrix",
            "",
            f"`{command}`: {os.cpu_count()} cores, {tiny_run.versions()}.",
            "",
            "| run | in phase | signal | exit | seconds to exit | steps after it | |",
            "|---|---|---|---|---|---|---|",
            *map(_row, stops),
            "",
            f"- Saved and left with {EXIT_SAVED}: {good} of {len(stops)}.",
            "- Every run was then finished and compared bit for bit with a run left "
            f"alone; different: {len(differences)}.",
            *(f"  - {line}" for line in differences),
            "",
        ]
    )


def main() -> int:
    """The command line; exit 1 when anything was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        stops, differences = sigterm_matrix(
            options.folder or Path(temporary),
            signals=options.signals,
            seed=options.seed,
        )
    command = f"python tests/reliability/sigterm_matrix.py --signals {options.signals}"
    page = table(stops, differences, command=command)
    print(page)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page)
    return 1 if differences or any(stop.problems for stop in stops) else 0


if __name__ == "__main__":
    sys.exit(main())
