"""Damage every file of a checkpoint in many ways; each damage must be seen.

    python tests/reliability/corruption_matrix.py --flips 200 \\
        --out docs/reliability/corruption_matrix.md

A short run makes checkpoints. In the newest one, every file in turn gets single
flipped bits (all places of small files, `--flips` random ones of large files),
truncations, growth, zero-fill and deletion. Verification must name the file each
time, and `latest()` must fall back to the checkpoint before it. After that the training
command itself is started on `--starts` damaged copies of the run.
"""

import argparse
import collections
import dataclasses
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tiny_run

from attnjax.training.checkpoint_reader import CheckpointReader

_SMALL = 256  # bytes: files up to this size get a flip at every byte
_OPTIONS = {"train.steps": 40, "train.save_every": 20, "eval.every": 20}


@dataclasses.dataclass
class Result:
    """What a matrix found.

    Attributes:
        tried: (kind of file, kind of damage) -> how many.
        missed: descriptions of damage that was not seen.
        starts: how many starts of the command were tried.
    """

    tried: collections.Counter
    missed: list[str]
    starts: int = 0


def corruption_matrix(
    folder: Path, *, flips: int, starts: int = 0, seed: int = 0, say=print
) -> Result:
    """Damage the newest checkpoint of a new run in every way; see the module."""
    rng = random.Random(seed)
    bench = tiny_run.Bench(folder, options=_OPTIONS)
    if bench.finish("run") != 0:
        raise RuntimeError(f"the run failed:\n{bench.log('run')}")
    reader = CheckpointReader(bench.folder / "run" / "checkpoints")
    older, newest = reader.steps()[-2:]
    result = Result(collections.Counter(), [])
    files = sorted(p for p in reader.path(newest).rglob("*") if p.is_file())
    damages = []
    for path in files:
        whole = path.read_bytes()
        for kind, change in _damages(path, whole, rng, flips):
            change()
            result.tried[_kind_of_file(path), kind] += 1
            if not _seen(reader, path, older, newest):
                result.missed.append(f"{path.relative_to(reader.directory)}: {kind}")
            path.write_bytes(whole)
            damages.append((path, kind))
        if reader.verify(newest):
            raise RuntimeError(f"{path}: not repaired by the test itself")
    say(f"{sum(result.tried.values())} damages, {len(result.missed)} missed")
    for path, _ in rng.sample(damages, min(starts, len(damages))):
        result.starts += 1
        result.missed += _start(bench, reader, path, older, newest, result.starts)
    return result


def _seen(reader: CheckpointReader, path: Path, older: int, newest: int) -> bool:
    """Whether verification names the file, and the older checkpoint is taken."""
    problems = reader.verify(newest)
    if not any(path.name in line for line in problems):
        return False
    found = CheckpointReader(reader.directory).latest()
    return found.step == older and found.skipped[0][0] == newest


def _damages(path: Path, whole: bytes, rng, flips: int) -> Iterator[tuple]:
    """(kind, what does it) for every damage of one file."""
    size = len(whole)
    places = (
        range(size) if size <= _SMALL else rng.sample(range(size), min(flips, size))
    )
    for place in places:
        bit = 1 << rng.randrange(8)
        changed = bytearray(whole)
        changed[place] ^= bit
        yield "one bit flipped", lambda b=bytes(changed): path.write_bytes(b)
    for length in sorted({0, 1, size // 2, size - 1} & set(range(size))):
        yield "truncated", lambda n=length: path.write_bytes(whole[:n])
    yield "grown", lambda: path.write_bytes(whole + b"\0")
    if whole.strip(b"\0"):
        yield "zeros", lambda: path.write_bytes(bytes(size))
    yield "deleted", path.unlink


def _kind_of_file(path: Path) -> str:
    return "array data" if path.parent.name == "d" else path.name


def _start(bench, reader, path, older, newest, number) -> list[str]:
    """Flip a bit, start the command: it must resume from the older one and say so."""
    run = f"start_{number}"
    shutil.copytree(bench.folder / "run", bench.folder / run)
    copied = bench.folder / run / path.relative_to(bench.folder / "run")
    content = bytearray(copied.read_bytes())
    content[len(content) // 2] ^= 1
    copied.write_bytes(content)
    manifest = bench.folder / run / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"finished_step"', '"finished_step_of_old"')
    )
    code, told = bench.finish(run), bench.log(run)
    problems = [f"{run}: ended with {code}"] if code else []
    if f"resuming from step {older}" not in told:
        problems.append(f"{run}: did not resume from step {older}")
    if path.name not in told or f"step {newest}" not in told:
        problems.append(f"{run}: did not name step {newest} and {path.name}")
    left, right = bench.folder / "run", bench.folder / run
    problems += [f"{run}: {d}" for d in tiny_run.differences(left, right)]
    return [] if not problems else [*problems, told[-2000:]]


def table(result: Result, *, command: str) -> str:
    """The result as a page of Markdown."""
    kinds = list(dict.fromkeys(kind for _, kind in result.tried))
    files = sorted({name for name, _ in result.tried})
    total = sum(result.tried.values())
    return "\n".join(
        [
            "# Corruption matrix",
            "",
            f"`{command}`: {tiny_run.versions()}.",
            "",
            "Damages tried, by kind of file of a checkpoint:",
            "",
            f"| file | {' | '.join(kinds)} |",
            "|---|" + "---|" * len(kinds),
            *(
                f"| {name} | "
                + " | ".join(str(result.tried[name, kind]) for kind in kinds)
                + " |"
                for name in files
            ),
            "",
            f"- Seen, with the file named and the step before it used: "
            f"{total - len(result.missed)} of {total}.",
            f"- Starts of the command on a damaged checkpoint: {result.starts};"
            " each named the step and the file, resumed from the step before it and "
            "ended with the same bits.",
            *(f"- Missed: {line}" for line in result.missed),
            "",
        ]
    )


def main() -> int:
    """The command line; exit 1 when a damage was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200, help="per large file")
    parser.add_argument("--starts", type=int, default=5, help="of the command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = corruption_matrix(
            options.folder or Path(temporary),
            flips=options.flips,
            starts=options.starts,
            seed=options.seed,
        )
    command = (
        f"python tests/reliability/corruption_matrix.py --flips {options.flips} "
        f"--starts {options.starts}"
    )
    page = table(result, command=command)
    print(page)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page)
    return 1 if result.missed else 0


if __name__ == "__main__":
    sys.exit(main())
