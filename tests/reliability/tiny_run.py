"""A training run of a few seconds that uses everything a checkpoint must carry.

Dropout, an average of the parameters, evaluations and saves at steps that do not
coincide: whatever a resume forgets shows as another number.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402

from attnjax.training import metrics, provenance  # noqa: E402
from attnjax.training.checkpoint_reader import CheckpointReader  # noqa: E402

STEPS = 400
SAVE_EVERY = 70
EVAL_EVERY = 100
# Seconds that one process may take: ten on a quiet machine, minutes on a busy one.
PATIENCE = 1800
OPTIONS = {
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "data.seq_len": 32,
    "data.packing": "packed",
    "optim.ema_decay": 0.9,
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.save_every": SAVE_EVERY,
    "train.keep_last": 2,
    "train.keep_best": 1,
    "train.sample_tokens": 0,
    "eval.every": EVAL_EVERY,
    "eval.batch_size": 4,
}
_SYLLABLES = ["ka", "to", "mi", "re", "su", "no", "li", "ver", "dan", "o", "e"]


def write_corpus(folder: Path) -> None:
    """Sixty small documents of made-up words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(60):
        words = (
            "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in "x" * 60
        )
        (folder / f"{number:02d}.txt").write_text(" ".join(words) + ".\n")


@dataclasses.dataclass
class Bench:
    """Where runs of one matrix live, and how they are started.

    Attributes:
        folder: holds the corpus, its cache and the runs.
        cores: cores each process may use; results depend on their number.
        options: changes to `OPTIONS`.

    Each run has a compilation cache of its own, so its first process compiles and the
    later ones spend their time elsewhere; programs from the cache give the same bits.
    All run from a copy of the code, which nobody edits meanwhile.
    """

    folder: Path
    cores: int | None = None
    options: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.folder = Path(self.folder).absolute()
        write_corpus(self.folder / "corpus")
        self.code = self.folder / "code"
        shutil.rmtree(self.code, ignore_errors=True)
        for name in ("attnjax", "configs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, self.code / name, ignore=ignored)

    def command(self, run: str) -> list[str]:
        """The command line that trains or resumes the run of this name."""
        options = {
            "data.name": f"text:{self.folder}/corpus/*.txt",
            "data.cache_dir": str(self.folder / "cache"),
            **OPTIONS,
            **self.options,
        }
        words = [f"--config.{name}={value}" for name, value in options.items()]
        config = str(self.code / "configs" / "quickstart.py")
        front = [sys.executable, "-m", "attnjax.train", "--config", config]
        return [*front, *words, "--workdir", str(self.folder / run)]

    def start(self, run: str, command: list[str] | None = None) -> subprocess.Popen:
        """Start a process of a run; its output goes to RUN.log."""
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / f"{run}.compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(self.code),
        }
        environment.pop("XLA_FLAGS", None)
        with open(self.folder / f"{run}.log", "ab") as log:
            return subprocess.Popen(
                command or self.command(run),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.folder,
                preexec_fn=self._use_cores if self.cores else None,
            )

    def finish(self, run: str, *, limit: float = PATIENCE) -> int:
        """Start a process of a run and wait for its end; its exit code."""
        process = self.start(run)
        try:
            return process.wait(timeout=limit)
        finally:
            process.kill()

    def log(self, run: str) -> str:
        """Everything the processes of a run have printed."""
        path = self.folder / f"{run}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _use_cores(self) -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: self.cores])


def versions() -> str:
    """The code and the packages that a table was made with."""
    state = provenance.git_state(REPOSITORY) or {"commit": "no repository", "dirty": 0}
    edited = " with changes" if state["dirty"] else ""
    jax = provenance.package_versions()["jax"]
    return f"commit {state['commit'][:10]}{edited}, jax {jax}"


def phase(run: Path) -> str:
    """What a run's process is, or was last, doing: one word."""
    if list((run / "checkpoints").glob("*.saving")):
        return "save"
    try:
        return (run / "phase").read_text().strip() or "start"
    except OSError:
        return "start"


def last_step(run: Path) -> int:
    """The step of the newest whole line of metrics; 0 when there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            whole = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    return json.loads(whole[-1])["step"] if whole else 0


def newest_checkpoint(run: Path) -> int:
    """The newest step that was saved; -1 when there is none."""
    return max(CheckpointReader(run / "checkpoints").steps(), default=-1)


def differences(left: Path, right: Path) -> list[str]:
    """Where two finished runs differ in anything but measured time; [] if nowhere."""
    found = []
    ends = [CheckpointReader(run / "checkpoints").latest() for run in (left, right)]
    if None in ends or ends[0].step != ends[1].step:
        return [f"last checkpoints: {[end and end.step for end in ends]}"]
    states = [
        CheckpointReader(run / "checkpoints").restore_numpy(end.step)[0]
        for run, end in zip((left, right), ends, strict=True)
    ]
    found += _array_differences(*states)
    if ends[0].meta != ends[1].meta:
        found.append(f"checkpoint meta: {ends[0].meta} != {ends[1].meta}")
    lines = [metrics.comparable(_records(run)) for run in (left, right)]
    if lines[0] != lines[1]:
        found.append(f"metrics.jsonl: {_first_difference(*lines)}")
    summaries = [
        json.loads((run / "summary.json").read_text()) for run in (left, right)
    ]
    for summary in summaries:
        summary.pop("time", None)
    if summaries[0] != summaries[1]:
        found.append("summary.json")
    return found


def wait_for(condition, *, process: subprocess.Popen, limit: float = PATIENCE) -> bool:
    """Poll until `condition()`; False when the process ends first.

    Raises:
        TimeoutError: when neither happens within `limit` seconds.
    """
    until = time.monotonic() + limit
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > until:
            process.kill()
            raise TimeoutError(f"process {process.pid}: nothing for {limit} s")
        time.sleep(0.001)
    return True


def _records(run: Path) -> list[dict]:
    return metrics.read(run / "metrics.jsonl")


def _array_differences(left: dict, right: dict, *, prefix: str = "") -> list[str]:
    found = []
    for name in sorted(left.keys() | right.keys()):
        one, other, path = left.get(name), right.get(name), f"{prefix}{name}"
        if isinstance(one, dict) and isinstance(other, dict):
            found += _array_differences(one, other, prefix=f"{path}/")
        elif not _same_bits(one, other):
            found.append(f"array {path}")
    return found


def _same_bits(one, other) -> bool:
    return (
        isinstance(one, np.ndarray)
        and isinstance(other, np.ndarray)
        and (one.dtype, one.shape) == (other.dtype, other.shape)
        and one.tobytes() == other.tobytes()
    )


def _first_difference(left: list[dict], right: list[dict]) -> str:
    for number, (one, other) in enumerate(zip(left, right, strict=False), start=1):
        if one != other:
            return f"line {number}: {one} != {other}"
    return f"{len(left)} lines, {len(right)} lines"
