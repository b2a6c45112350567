"""Kill a training run at random moments, resume it, and compare the end bit for bit.

    python tests/reliability/kill_matrix.py --kills 100 \\
        --out docs/reliability/kill_matrix.md

One run is left alone. Others get SIGKILL again and again, aimed in turn at starting
up, compiling, stepping, evaluating and saving, each time after a random delay; after
their share of kills they finish. Parameters, optimizer state and everything else in
the last checkpoint, metrics.jsonl (every key but `time`) and summary.json must then be
those of the run that was left alone.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import tiny_run

# Aimed at -> the longest random delay after that phase was entered, in seconds.
DELAYS = {"start": 4.0, "compile": 4.0, "step": 0.1, "eval": 0.1, "save": 0.2}


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        run: the run's name.
        aim: the phase it was meant for.
        phase: the phase the run was in when it died.
        step: newest step in metrics.jsonl then.
        saved: newest checkpoint then, -1 for none.
    """

    run: str
    aim: str
    phase: str
    step: int
    saved: int


@dataclasses.dataclass
class Result:
    """What a matrix found: the kills, how runs ended, and what went wrong."""

    kills: list[Kill]
    runs: int
    seconds: float
    problems: list[str]


def kill_matrix(
    folder: Path,
    *,
    kills: int,
    per_run: int = 10,
    seed: int = 0,
    spread: float = 1.0,
    say=print,
) -> Result:
    """Kill runs `kills` times, `per_run` times each, and compare their ends.

    `spread` scales the random delays; with 0 a run dies in the phase aimed at.
    """
    begin, rng = time.monotonic(), random.Random(seed)
    bench = tiny_run.Bench(folder)
    result = Result([], 0, 0.0, [])
    code = bench.finish("alone")
    if code != 0:
        raise RuntimeError(
            f"the run left alone ended with {code}:\n{bench.log('alone')}"
        )
    while len(result.kills) < kills:
        run = f"run_{result.runs:03d}"
        share = min(per_run, kills - len(result.kills))
        done = _kill_one_run(
            bench, run, share, rng, first=len(result.kills), spread=spread
        )
        result.kills += done
        result.runs += 1
        result.problems += _check(bench, run, done)
        say(
            f"{run}: {len(done)} kills, {len(result.kills)} of {kills} in all, "
            f"{len(result.problems)} problems, {time.monotonic() - begin:.0f} s"
        )
        if not result.problems:
            shutil.rmtree(bench.folder / run)
        if not done:
            result.problems.append(f"{run}: finished before it could be killed")
            break
    result.seconds = time.monotonic() - begin
    return result


def _kill_one_run(
    bench, run: str, share: int, rng, *, first: int, spread: float
) -> list[Kill]:
    """Start and kill a run `share` times; fewer if it finishes before."""
    aims = list(DELAYS)
    done: list[Kill] = []
    for number in range(share):
        aim = aims[(first + number) % len(aims)]
        process = bench.start(run)
        killed = _kill_in(aim, process, bench.folder / run, rng, spread=spread)
        if killed is None:
            break
        done.append(dataclasses.replace(killed, run=run, aim=aim))
    return done


def _kill_in(aim: str, process, folder: Path, rng, *, spread: float) -> Kill | None:
    """Kill `process` in a phase after a random delay; None when it ended by itself."""
    # "start" is reached at once: the word of the process before must not count.
    (folder / "phase").unlink(missing_ok=True)
    # Not always at the first visit of a phase: they repeat over the run.
    floor = tiny_run.last_step(folder) + rng.randrange(0, tiny_run.SAVE_EVERY)

    def reached() -> bool:
        if aim == "start":
            return True
        if tiny_run.phase(folder) != aim:
            return False
        late = tiny_run.STEPS - tiny_run.SAVE_EVERY
        return aim == "compile" or tiny_run.last_step(folder) >= min(floor, late)

    def held() -> bool:
        """Reached, and stopped before it can leave the phase."""
        if not reached():
            return False
        process.send_signal(signal.SIGSTOP)
        if reached():
            return True
        process.send_signal(signal.SIGCONT)
        return False

    if tiny_run.wait_for(reached if spread else held, process=process):
        time.sleep(spread * rng.uniform(0, DELAYS[aim]))
    process.kill()
    if process.wait() != -9:
        return None
    return Kill(
        "",
        "",
        tiny_run.phase(folder),
        tiny_run.last_step(folder),
        tiny_run.newest_checkpoint(folder),
    )


def _check(bench, run: str, kills: list[Kill]) -> list[str]:
    """Let the run finish, and list what is not as in the run left alone."""
    code = bench.finish(run)
    if code != 0:
        return [f"{run}: ended with {code}: {bench.log(run)[-2000:]}"]
    problems = tiny_run.differences(bench.folder / "alone", bench.folder / run)
    manifest = json.loads((bench.folder / run / "manifest.json").read_text())
    starts = [start["step"] for start in manifest["starts"]]
    if starts != sorted(starts):
        problems.append(f"a start went back behind an earlier one: {starts}")
    return [f"{run}: {problem}" for problem in problems]


def lost_steps(kills: list[Kill]) -> int:
    """The most steps a kill cost: from the newest checkpoint to the newest step."""
    return max((kill.step - max(kill.saved, 0) for kill in kills), default=0)


def table(result: Result, *, command: str) -> str:
    """The result as a page of Markdown."""
    by_phase = collections.Counter(kill.phase for kill in result.kills)
    aimed = collections.Counter((kill.aim, kill.phase) for kill in result.kills)
    lines = [
        "# Kill matrix",
        "",
        f"`{command}`: {os.cpu_count()} cores, {result.seconds / 60:.0f} minutes, "
        f"{tiny_run.versions()}.",
        "",
        "| killed while | kills | aimed there |",
        "|---|---|---|",
    ]
    for word in [*DELAYS, *sorted(by_phase.keys() - DELAYS.keys())]:
        lines.append(f"| {word} | {by_phase[word]} | {aimed[word, word]} |")
    saved = sum(kill.saved >= 0 for kill in result.kills)
    lines += [
        f"| **all** | **{len(result.kills)}** | |",
        "",
        f"- Runs killed and resumed to the end: {result.runs}; kills survived: "
        f"{len(result.kills)} of {len(result.kills)}"
        if not result.problems
        else f"- Problems: {len(result.problems)}",
        f"- Kills that found a checkpoint: {saved}; most steps lost by a kill: "
        f"{lost_steps(result.kills)} (a save every {tiny_run.SAVE_EVERY} of "
        f"{tiny_run.STEPS} steps).",
        "- Compared bit for bit with the run left alone: every array of the last "
        "checkpoint (parameters, optimizer, average, step, health), its meta, every "
        "line of metrics.jsonl without `time`, summary.json without `time`. No start "
        "went back behind an earlier one.",
        f"- Different: {len(result.problems)}.",
        *(f"  - {problem}" for problem in result.problems),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """The command line; exit 1 when anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per_run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = kill_matrix(
            options.folder or Path(temporary),
            kills=options.kills,
            per_run=options.per_run,
            seed=options.seed,
        )
    command = f"python tests/reliability/kill_matrix.py --kills {options.kills}"
    page = table(result, command=command)
    print(page)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
