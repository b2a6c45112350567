"""The `slurm` launcher: points that are left, as a job array that requeues itself.

Two forms, one meaning: through submitit (which pickles a call into the study's
directory), or as a plain sbatch script, for sites that forbid pickles. Each element
runs one worker, with one point or with those that one program trains together. Before
its time limit, or when preempted, the worker saves, and the element goes back into the
queue and on from there.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

from attnjax.core import schema
from attnjax.core.errors import EXIT_OK, EXIT_SAVED, EXIT_USER, UserError
from attnjax.studies import ledger, worker
from attnjax.studies.launchers import Options
from attnjax.studies.sweep_file import Element, Study
from attnjax.training import disk

FOLDER = "slurm"
_SUBMITTED = "submitted.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a site needs to know; the content of the file given with --slurm.

    Attributes:
        form: submitit, or sbatch for a plain script without pickles.
        time: time limit of one element, minutes; a point may take many.
        signal_seconds: how long before the limit a point is told to save.
        max_requeues: how often an element may go back into the queue.
        partition, account, qos, constraint: as in sbatch; None leaves them out.
        cpus_per_task: cores of one point.
        gpus_per_node: GPUs of one point.
        mem: memory of one point, such as "16GB".
        setup: shell lines before the point begins, such as "module load cuda".
        sbatch: more options of sbatch: name without dashes -> value.
    """

    form: Literal["submitit", "sbatch"] = "submitit"
    time: int = 240
    signal_seconds: int = 180
    max_requeues: int = 1000
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.time < 1:
            raise UserError(
                f"--slurm: time must be at least 1 minute; got {self.time}."
            )
        if not 0 < self.signal_seconds <= self.time * 60:
            raise UserError(
                "--slurm: signal_seconds must be positive and within the time limit; "
                f"got signal_seconds={self.signal_seconds}, time={self.time} min."
            )
        if self.max_requeues < 0:
            raise UserError(
                f"--slurm: max_requeues must not be negative; got {self.max_requeues}."
            )


def launch(study: Study, options: Options) -> int:
    """Submit every point that is not done, running or queued; does not wait for them.

    Raises:
        UserError: SLURM or submitit is missing, the settings do not hold, or sbatch
            refuses the array (with its words).
    """
    _check(options)
    settings = read_settings(options.slurm)
    _need_programs("sbatch", "squeue", "scontrol", "srun")
    known = _read_submitted(study.workdir)
    queued = _queued() if known else set()
    left, waiting = [], 0
    for point in study.asked:
        state = ledger.current(study.workdir, point.hash).state
        if state in ("done", "running"):
            continue
        if known.get(point.hash) in queued:
            waiting += 1
        else:
            left.append(point)
    if waiting:
        print(f"{waiting} points are in the queue already.")
    if not left:
        print("nothing to submit.")
        return EXIT_OK
    submit = _SUBMITTERS[settings.form]
    elements = study.elements(left)
    ids = submit(study.workdir, elements, settings, options)
    jobs = {
        point.hash: one
        for one, element in zip(ids, elements, strict=True)
        for point in element.points
    }
    _write_submitted(study.workdir, {**known, **jobs})
    array, count = ids[0].partition("_")[0], len(elements)
    grouped = f" ({count} processes)" if count < len(left) else ""
    print(
        f"submitted {len(left)} of {len(study.asked)} points as job {array}{grouped}, "
        f"{min(options.jobs, count)} at a time. Watch: squeue -j {array}; logs: "
        f"{study.workdir / 'logs'}. The same command submits what is left."
    )
    return EXIT_OK


def read_settings(path: str | Path | None) -> Settings:
    """The settings in a JSON file; the defaults for None.

    Raises:
        UserError: the file is missing or no JSON object, or a setting does not hold.
    """
    if path is None:
        return Settings()
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"--slurm: cannot read {str(path)!r}: {error.strerror}."
        ) from None
    except ValueError as error:
        raise UserError(f"--slurm: {str(path)!r} is not JSON: {error}.") from None
    return schema.build(Settings, schema.resolve(Settings, value, path="--slurm"))


def _check(options: Options) -> None:
    if options.jobs < 1:
        raise UserError(f"--jobs: must be at least 1; got {options.jobs}.")
    if options.retries < 0:
        raise UserError(f"--retries: must not be negative; got {options.retries}.")


def _need_programs(*names: str) -> None:
    absent = [name for name in names if shutil.which(name) is None]
    if absent:
        raise UserError(
            f"--launcher slurm: needs SLURM's commands; got no {', '.join(absent)} in "
            "PATH. Run it on a login node, or use --launcher local or print."
        )


def _ask(*words: str) -> str:
    """What a command of SLURM prints; its complaint is the user's to mend."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"--launcher slurm: {words[0]} failed: {said}")
    return done.stdout


def _queued() -> set[str]:
    """Elements "job_index" that wait or run."""
    return set(_ask("squeue", "--noheader", "--array", "--format=%F_%K").split())


def _read_submitted(workdir: Path) -> dict[str, str]:
    path = workdir / FOLDER / _SUBMITTED
    if not path.exists():
        return {}
    return disk.read_json(path, owner="--launcher slurm", cure="Delete it.")


def _write_submitted(workdir: Path, jobs: dict[str, str]) -> None:
    with disk.disk_errors("workdir"):
        disk.write_json(workdir / FOLDER / _SUBMITTED, jobs)


def _name(element: Element) -> str:
    """What its log is called."""
    return element.points[0].hash


def _log(workdir: Path, element: Element) -> Path:
    return workdir / "logs" / f"{_name(element)}.slurm.log"


# The plain form.


def render(
    workdir: Path, lines_file: Path, count: int, settings: Settings, options: Options
) -> str:
    """The text of the sbatch script whose element i runs line i of `lines_file`.

    A line is a name for the log, a space and a shell command.
    """
    flags = {
        "job-name": "attnjax-sweep",
        "array": f"0-{count - 1}%{options.jobs}",
        "ntasks": 1,
        "time": settings.time,
        "signal": f"USR1@{settings.signal_seconds}",
        "requeue": True,
        "open-mode": "append",
        "output": str(workdir / FOLDER / "%A_%a.out"),
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "cpus-per-task": settings.cpus_per_task,
        "gpus-per-node": settings.gpus_per_node,
        "mem": settings.mem,
        **settings.sbatch,
    }
    lines = [_flag(name, value) for name, value in flags.items() if value is not None]
    logs = shlex.quote(str(workdir / "logs"))
    body = _BODY.format(
        setup="\n".join(settings.setup),
        lines=shlex.quote(str(lines_file)),
        retries=options.retries,
        log=f'{logs}/"${{line%% *}}.slurm.log"',
        max_requeues=settings.max_requeues,
    )
    return "\n".join(["#!/bin/bash", *lines, body])


def _flag(name: str, value: Any) -> str:
    return f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={value}"


_BODY = """\
set -u
{setup}
line="$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {lines})"

# Who stops the whole job (scancel, preemption) tells this shell too; the signal before
# the time limit reaches the worker alone. A handler, so that srun gets signals too.
stopped=0
trap 'stopped=1' TERM INT

for ((crashes = 0; crashes <= {retries}; crashes++)); do
    srun --ntasks=1 --open-mode=append --output={log} \\
        bash -c "exec ${{line#* }}"
    code=$?
    # 0 done, 2 a mistake, 75 saved, 76 another process runs it, 138 told by SIGUSR1
    # before Python could listen: not crashes.
    case $code in 0 | 76) exit 0 ;; 2 | 75 | 138) break ;; esac
    ((stopped)) && break
done

# SLURM itself requeues a preempted job. The element alone: SLURM_JOB_ID may stand for
# the whole array.
again=$((${{SLURM_RESTART_COUNT:-0}} < {max_requeues}))
if (((code == 75 || code == 138) && !stopped && again)); then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" || exit 1
fi
exit "$code"
"""


def _submit_plain(
    workdir: Path, elements: list[Element], settings: Settings, options: Options
) -> list[str]:
    """Submit; "job_index" of each element."""
    folder = workdir / FOLDER
    with disk.disk_errors("workdir"):
        folder.mkdir(exist_ok=True)
        stem = f"array-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        lines, script = folder / f"{stem}.txt", folder / f"{stem}.sbatch"
        lines.write_text(
            "".join(f"{_name(one)} {shlex.join(one.command)}\n" for one in elements)
        )
        script.write_text(render(workdir, lines, len(elements), settings, options))
    job = _ask("sbatch", "--parsable", str(script)).strip().partition(";")[0]
    return [f"{job}_{index}" for index in range(len(elements))]


# Through submitit.


class Call:
    """An element as submitit calls it; `checkpoint` is its request to save."""

    def __init__(self, command: list[str], log: Path, retries: int):
        self.command, self.log, self.retries = command, log, retries
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run the worker, again after a crash; its exit code.

        Raises:
            RuntimeError: when it failed, which makes the job FAILED.
        """
        for _ in range(self.retries + 1):
            with open(self.log, "ab") as log:
                self._process = subprocess.Popen(
                    self.command, stdout=log, stderr=subprocess.STDOUT
                )
            code = self._process.wait()
            if code in (EXIT_OK, worker.EXIT_BUSY, EXIT_SAVED):
                return code
            if code == EXIT_USER:
                break
        raise RuntimeError(f"exit code {code}; see {self.log}")

    def checkpoint(self):
        """Let the worker save and end; what to run when the queue allows again."""
        from submitit.helpers import DelayedSubmission

        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            _wait_beside(process.pid)
        return DelayedSubmission(Call(self.command, self.log, self.retries))


def _wait_beside(pid: int) -> None:
    """Wait for a child that the interrupted code below is waiting for already.

    Not Popen.wait: this runs in a signal handler, and the lock is taken.
    """
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _submit_submitit(
    workdir: Path, elements: list[Element], settings: Settings, options: Options
) -> list[str]:
    """Submit; "job_index" of each element."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError:
        raise UserError(
            "--launcher slurm: form=submitit needs the package submitit, which is not "
            'installed. Install it, or set "form": "sbatch" in the file of --slurm.'
        ) from None
    folder = workdir / FOLDER
    with disk.disk_errors("workdir"):
        folder.mkdir(exist_ok=True)
        executor = submitit.SlurmExecutor(
            folder / "submitit" / "%j", max_num_timeout=settings.max_requeues
        )
        executor.update_parameters(**_submitit_parameters(settings, options))
        try:
            with executor.batch():
                jobs = [
                    executor.submit(
                        Call(one.command, _log(workdir, one), options.retries)
                    )
                    for one in elements
                ]
        except (FailedJobError, FailedSubmissionError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"--launcher slurm: sbatch failed: {said}") from None
    # squeue shows a job that is no array with the index N/A.
    ids = [job.job_id for job in jobs]
    return [one if "_" in one else f"{one}_N/A" for one in ids]


def _submitit_parameters(settings: Settings, options: Options) -> dict[str, Any]:
    same = ("time", "partition", "account", "qos", "constraint")
    same += ("cpus_per_task", "gpus_per_node", "mem")
    given = {name: getattr(settings, name) for name in same}
    return {
        **{name: value for name, value in given.items() if value is not None},
        "job_name": "attnjax-sweep",
        "signal_delay_s": settings.signal_seconds,
        "array_parallelism": options.jobs,
        "setup": list(settings.setup),
        "additional_parameters": {"requeue": True, **settings.sbatch},
    }


_SUBMITTERS = {"submitit": _submit_submitit, "sbatch": _submit_plain}
