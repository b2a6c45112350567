"""Crash the runs of a sweep, kill its driver twice, and compare the final table.

    python tests/reliability/sweep_matrix.py --points 60 \\
        --out docs/reliability/sweep_matrix.md

One sweep is left alone. In another, one run in ten gets SIGKILL at a random moment of
its first attempt, and the driver gets SIGKILL twice: first alone, so that its workers
live on, then together with its workers, as when a machine goes down. The third
invocation must begin nothing that is done, every run must end with the bits of its
twin in the sweep that was left alone, and `report --no_timing` must print the same
bytes. The crashes come from a `sitecustomize.py` in the workers' path.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import tiny_run

from attnjax.studies import ledger, sweep_file

MIXERS = ("attention", "linear_attention")
STEPS = 60
CONFIG = '''
"""A model of two thousand parameters on made-up words."""


def get_config():
    return {{
        "model": {{"layers": "attention", "num_layers": 2, "embed_dim": 16,
                   "num_heads": 2, "dropout": 0.1}},
        "data": {{"name": "text:{folder}/corpus/*.txt", "seq_len": 32,
                  "cache_dir": "{folder}/cache"}},
        "train": {{"steps": {steps}, "batch_size": 4, "log_every": 1,
                   "save_every": 20, "sample_tokens": 0, "tensorboard": False}},
        "eval": {{"every": 30, "batches": 4, "batch_size": 4}},
    }}
'''
SWEEP = '''
"""Two mixers, some learning rates, some seeds."""

from attnjax.studies import Table, grid, point, seeds


def sweep():
    rates = [round(1e-3 * (1 + i), 6) for i in range({rates})]
    rows = grid(
        point("config.py"),
        {{"model.layers": {mixers}, "optim.learning_rate": rates}},
        names={{"model.layers": "mixer"}},
    )
    return seeds(rows, {seeds}{more})


def table():
    return Table(rows=("mixer", "learning_rate"),
                 metrics=("eval/loss", "eval/accuracy"),
                 baseline={{"mixer": "attention", "learning_rate": 1e-3}})
'''
# Kills a worker of a chosen point once: when its metrics have so many lines, or, with
# none, so many seconds after it began.
CUSTOMIZE = """
import json, os, signal, sys, threading, time
from pathlib import Path

words = getattr(sys, "orig_argv", [])
plan = json.loads(Path(os.environ["SWEEP_MATRIX_PLAN"]).read_text())
point = words[words.index("--hash") + 1] if "--hash" in words else None
if point in plan["crashes"]:
    aim = plan["crashes"][point]
    mark = Path(plan["marks"]) / point
    metrics = Path(plan["workdir"]) / "points" / point / "metrics.jsonl"

    def lines():
        try:
            return metrics.read_bytes().count(b"\\n")
        except OSError:
            return 0

    def crash():
        if aim["lines"]:
            while lines() < aim["lines"]:
                time.sleep(0.001)
        else:
            time.sleep(aim["seconds"])
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if not mark.exists():
        threading.Thread(target=crash, daemon=True).start()
"""


@dataclasses.dataclass
class Result:
    """What a matrix found.

    Attributes:
        points: of the sweep.
        crashed: runs that got SIGKILL from inside, each once.
        killed_at: points done when the driver was killed, first and second time.
        begun: points that each of the three invocations began.
        rows: lines of the final table.
        seconds: of both sweeps.
        problems: what differed.
    """

    points: int
    crashed: int = 0
    killed_at: list[int] = dataclasses.field(default_factory=list)
    begun: list[int] = dataclasses.field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)


class Lab:
    """The sweep file, the code it runs and its two work directories.

    Args:
        folder: an empty one.
        points: of the sweep.
        jobs: workers at one time.
        together: whether one program trains the seeds of a mixer and rate.
        mixers: rows of the table.
    """

    def __init__(
        self,
        folder: Path,
        *,
        points: int,
        jobs: int,
        together: bool = False,
        mixers: tuple[str, ...] = MIXERS,
    ):
        self.folder, self.jobs = Path(folder).absolute(), jobs
        tiny_run.write_corpus(self.folder / "corpus")
        shutil.rmtree(self.folder / "code", ignore_errors=True)
        shutil.copytree(
            tiny_run.REPOSITORY / "attnjax",
            self.folder / "code" / "attnjax",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        seeds = 5 if points % 10 == 0 else 3
        rates, least = points // len(mixers) // seeds, 3 * len(mixers)
        if rates * len(mixers) * seeds != points:
            raise ValueError(
                f"points: must be a multiple of {least} or 10; got {points}."
            )
        config = CONFIG.format(folder=self.folder, steps=STEPS)
        (self.folder / "config.py").write_text(config)
        self.file = self.folder / "sweep.py"
        more = ", vectorize=True" if together else ""
        self.file.write_text(
            SWEEP.format(rates=rates, seeds=seeds, mixers=list(mixers), more=more)
        )
        (self.folder / "hooks").mkdir(exist_ok=True)
        (self.folder / "marks").mkdir(exist_ok=True)
        (self.folder / "hooks" / "sitecustomize.py").write_text(CUSTOMIZE)

    def study(self, name: str) -> sweep_file.Study:
        """The settled points of a sweep in the work directory `name`."""
        return sweep_file.load(self.file, self.folder / name)

    def inject(self, name: str, rng: random.Random) -> list[str]:
        """Choose one run in ten, at least one, and when each crashes."""
        hashes = sorted(point.hash for point in self.study(name).points)
        chosen = rng.sample(hashes, max(1, len(hashes) // 10))
        aims = {
            point: {
                "lines": rng.choice([0, rng.randrange(1, STEPS)]),
                "seconds": rng.uniform(0.5, 2.0),
            }
            for point in chosen
        }
        plan = {
            "crashes": aims,
            "marks": str(self.folder / "marks"),
            "workdir": str(self.folder / name),
        }
        self._plan().write_text(json.dumps(plan))
        return chosen

    def start(self, name: str, *, crashes: bool) -> subprocess.Popen:
        """A driver; its output is appended to NAME.log."""
        front = [sys.executable, "-m", "attnjax.sweep", "--sweep", str(self.file)]
        words = ["--workdir", str(self.folder / name), "--jobs", str(self.jobs)]
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [*front, *words, "--retries", "1"],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(crashes),
                cwd=self.folder,
            )

    def log(self, name: str) -> str:
        """What the drivers of a work directory have printed."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def report(self, name: str) -> bytes:
        """The table of a work directory without timing."""
        return subprocess.run(
            [sys.executable, "-m", "attnjax.report", name, "--no_timing"],
            stdout=subprocess.PIPE,
            env=self._environment(False),
            cwd=self.folder,
            check=True,
            timeout=tiny_run.PATIENCE,
        ).stdout

    def done(self, name: str) -> set[str]:
        """The points whose runs are finished."""
        runs = (self.folder / name / "points").glob("*")
        return {run.name for run in runs if ledger.is_done(run)}

    def _plan(self) -> Path:
        return self.folder / "plan.json"

    def _environment(self, crashes: bool) -> dict[str, str]:
        code = str(self.folder / "code")
        path = f"{self.folder / 'hooks'}{os.pathsep}{code}" if crashes else code
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "PYTHONPATH": path,
            "SWEEP_MATRIX_PLAN": str(self._plan()),
        }
        environment.pop("XLA_FLAGS", None)
        return environment


def sweep_matrix(
    folder: Path, *, points: int, jobs: int = 2, seed: int = 0, say=print
) -> Result:
    """Run the sweep twice, once disturbed, and compare."""
    begin, rng = time.monotonic(), random.Random(seed)
    lab, result = Lab(folder, points=points, jobs=jobs), Result(points)
    code = lab.start("alone", crashes=False).wait(timeout=tiny_run.PATIENCE * 4)
    if code != 0:
        raise RuntimeError(f"the sweep left alone: exit {code}\n{lab.log('alone')}")
    say(f"alone: {points} points, {time.monotonic() - begin:.0f} s")
    chosen = lab.inject("disturbed", rng)
    before = _disturb(lab, result, say)
    _check_invocations(lab, result, before)
    result.crashed = sum((lab.folder / "marks" / point).exists() for point in chosen)
    if result.crashed != len(chosen):
        result.problems.append(f"{result.crashed} of {len(chosen)} runs crashed")
    result.problems += _differences(lab)
    tables = [lab.report(name) for name in ("alone", "disturbed")]
    result.rows = tables[0].count(b"\n")
    if tables[0] != tables[1]:
        result.problems.append("report --no_timing: the tables differ")
    result.seconds = time.monotonic() - begin
    return result


def _disturb(lab: Lab, result: Result, say) -> list[dict[str, int]]:
    """Two drivers that are killed and one that finishes.

    Returns:
        Before each invocation: done point -> how many processes had begun it.
    """
    before = []
    for number in range(3):
        before.append({point: _starts(lab, point) for point in lab.done("disturbed")})
        told = len(lab.log("disturbed"))
        driver = lab.start("disturbed", crashes=True)
        if number < 2:
            goal = (number + 1) * result.points // 3
            tiny_run.wait_for(
                lambda goal=goal: len(lab.done("disturbed")) >= goal,
                process=driver,
                limit=tiny_run.PATIENCE * 4,
            )
            _kill(driver, with_workers=number == 1)
            result.killed_at.append(len(lab.done("disturbed")))
        code = driver.wait(timeout=tiny_run.PATIENCE * 4)
        log = lab.log("disturbed")[told:]
        if code != (-9 if number < 2 else 0):
            result.problems.append(f"invocation {number + 1}: exit {code}: {log}")
        begun = {
            line.split()[1] for line in log.splitlines() if line.startswith("start ")
        }
        result.begun.append(len(begun))
        result.problems += [
            f"invocation {number + 1} began {point}, which was done"
            for point in sorted(begun & set(before[number]))
        ]
        say(f"invocation {number + 1}: exit {code}, began {len(begun)} points")
    return before


def _kill(driver: subprocess.Popen, *, with_workers: bool) -> None:
    """SIGKILL for a driver, and for its workers if asked."""
    workers = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    for process in workers if with_workers else ():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _starts(lab: Lab, point: str) -> int:
    manifest = lab.folder / "disturbed" / "points" / point / "manifest.json"
    return len(json.loads(manifest.read_text())["starts"])


def _check_invocations(lab: Lab, result: Result, before: list[dict]) -> None:
    """Everything is done, and nothing that was done was begun again."""
    hashes = {point.hash for point in lab.study("disturbed").points}
    missing = hashes - lab.done("disturbed")
    result.problems += [f"{point}: not done" for point in sorted(missing)]
    for known in before:
        for point, starts in known.items():
            if _starts(lab, point) != starts:
                result.problems.append(f"{point}: begun again after it was done")
    for point in sorted(hashes):
        state = ledger.read(lab.folder / "disturbed", point)
        if state.state != "done" and point not in missing:
            result.problems.append(f"{point}: done, and its state is {state.state}")


def _differences(lab: Lab) -> list[str]:
    """Runs that did not end with the bits of their twins."""
    found = []
    for point in sorted(lab.done("alone")):
        twins = [
            lab.folder / name / "points" / point for name in ("alone", "disturbed")
        ]
        if all(ledger.is_done(run) for run in twins):
            found += [f"{point}: {what}" for what in tiny_run.differences(*twins)]
    return found


def table(result: Result, *, command: str) -> str:
    """The result as a page of Markdown."""
    begun = ", ".join(str(count) for count in result.begun)
    killed = " and ".join(str(count) for count in result.killed_at)
    lines = [
        "# Sweep matrix",
        "",
        f"`{command}`: {os.cpu_count()} cores, {result.seconds / 60:.0f} minutes, "
        f"{tiny_run.versions()}.",
        "",
        "| | |",
        "|---|---|",
        f"| points | {result.points} |",
        f"| runs crashed at a random moment (SIGKILL) | {result.crashed} |",
        f"| points done when the driver was killed (SIGKILL) | {killed} |",
        f"| points begun by the three invocations | {begun} |",
        f"| lines of `report --no_timing`, equal byte for byte | {result.rows} |",
        f"| **problems** | **{len(result.problems)}** |",
        "",
        "- The first kill hit the driver alone: its workers went on. The second hit "
        "the driver and its workers.",
        "- No invocation began a point that was done.",
        "- Compared bit for bit with the sweep left alone: every array of each last "
        "checkpoint, `metrics.jsonl` and `summary.json` without `time`, and the table.",
        *(f"  - {problem}" for problem in result.problems),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """The command line; exit 1 when anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = sweep_matrix(
            options.folder or Path(temporary),
            points=options.points,
            jobs=options.jobs,
            seed=options.seed,
        )
    command = f"python tests/reliability/sweep_matrix.py --points {options.points}"
    page = table(result, command=command)
    print(page)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
