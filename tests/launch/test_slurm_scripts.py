"""What the slurm launcher writes, and its mistakes, without a SLURM."""

import dataclasses
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from attnjax.core.errors import EXIT_OK, UserError
from attnjax.studies.launchers import Options, printed, slurm
from attnjax.studies.sweep_file import Planned, Study
from attnjax.training import experiment, members

SCRIPTS = sorted((Path(__file__).parents[2] / "launch" / "slurm").glob("*.sbatch"))
FAKES = {
    "sbatch": 'cat "$2" >"$0.got"; echo 41',
    "squeue": "echo 41_0",
    "scontrol": "exit 0",
    "srun": "exit 0",
}


def script(**settings):
    return slurm.render(
        Path("/studies/a b"),
        Path("/studies/a b/slurm/points.txt"),
        5,
        slurm.Settings(form="sbatch", **settings),
        Options(jobs=2, retries=1),
    )


def bash_accepts(text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    return done.returncode == 0 and not done.stderr


def write_settings(folder, value):
    path = folder / "site.json"
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of fake SLURM commands, the only ones in PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def study(tmp_path):
    workdir = tmp_path / "study"
    for name in ("state", "logs", "points", "configs"):
        (workdir / name).mkdir(parents=True)
    points = tuple(
        Planned(f"{number:016x}", {"seed": number}, "c.py", {}, {"train": {"steps": 1}})
        for number in range(3)
    )
    return Study(workdir, tmp_path / "sweep.py", points, None)


def test_every_batch_script_is_bash():
    assert len(SCRIPTS) == 3
    for path in SCRIPTS:
        assert bash_accepts(path.read_text()), path
        assert os.access(path, os.X_OK), path


def test_every_batch_script_asks_for_a_signal_and_to_be_requeued():
    for path in SCRIPTS:
        text = path.read_text()
        assert "#SBATCH --signal=USR1@" in text and "#SBATCH --requeue" in text, path


def test_rendered_script_is_bash_and_carries_every_setting():
    text = script(
        time=30,
        signal_seconds=60,
        partition="gpu",
        account="lab",
        qos="low",
        constraint="h200",
        cpus_per_task=7,
        gpus_per_node=1,
        mem="11G",
        setup=("module load cuda",),
        sbatch={"exclusive": True, "mail-user": "me"},
        max_requeues=13,
    )
    assert bash_accepts(text)
    flags = [
        *("array=0-4%2", "time=30", "signal=USR1@60", "requeue", "partition=gpu"),
        *("account=lab", "qos=low", "constraint=h200", "cpus-per-task=7"),
        *("gpus-per-node=1", "mem=11G", "exclusive", "mail-user=me"),
    ]
    lines = text.splitlines()
    assert [flag for flag in flags if f"#SBATCH --{flag}" not in lines] == []
    assert "module load cuda" in lines
    assert "crashes <= 1" in text and "< 13" in text


def run_rendered(tmp_path, codes, *, restarts="0", retries=1):
    """Run a rendered script with an srun that ends with each of `codes` in turn."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\n'
        f"read -r code <{tmp_path}/codes; sed -i 1d {tmp_path}/codes; exit $code\n"
    )
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/requeued\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    (tmp_path / "points.txt").write_text(
        "aaa one --hash aaa\nbbb two 'a b' --hash bbb\n"
    )
    text = slurm.render(
        tmp_path,
        tmp_path / "points.txt",
        2,
        slurm.Settings(form="sbatch", max_requeues=3),
        Options(jobs=1, retries=retries),
    )
    done = subprocess.run(
        ["bash", "-c", text],
        env={
            "PATH": f"{folder}:/usr/bin:/bin",
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_ARRAY_JOB_ID": "9",
            "SLURM_RESTART_COUNT": restarts,
        },
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    requeued = tmp_path / "requeued"
    return done.returncode, calls, requeued.read_text() if requeued.exists() else ""


def test_element_runs_its_own_point(tmp_path):
    code, calls, requeued = run_rendered(tmp_path, [0])
    assert (
        code == 0 and len(calls) == 1 and calls[0].endswith("exec two 'a b' --hash bbb")
    )
    assert f"--output={tmp_path}/logs/bbb.slurm.log" in calls[0]
    assert requeued == ""


@pytest.mark.parametrize("ended", [75, 128 + signal.SIGUSR1])
def test_saved_element_requeues_itself_alone(tmp_path, ended):
    code, calls, requeued = run_rendered(tmp_path, [ended])
    assert (code, len(calls), requeued) == (ended, 1, "requeue 9_1\n")


def test_saved_element_stays_out_after_too_many_requeues(tmp_path):
    assert run_rendered(tmp_path, [75], restarts="3")[2] == ""


def test_crashed_element_is_begun_again_so_often(tmp_path):
    code, calls, requeued = run_rendered(tmp_path, [1, 137, 0])
    assert (code, len(calls), requeued) == (137, 2, "")


def test_mistake_is_not_begun_again(tmp_path):
    code, calls, requeued = run_rendered(tmp_path, [2, 0])
    assert (code, len(calls), requeued) == (2, 1, "")


def test_point_that_runs_elsewhere_is_no_failure(tmp_path):
    assert run_rendered(tmp_path, [76])[0] == 0


@pytest.mark.parametrize(
    ("index", "code", "said"),
    [
        (0, 0, "begun\n"),
        (1, 75, "saved; requeueing 9_1.\nrequeue 9_1\n"),
        (2, 0, ""),
        (3, 2, ""),
    ],
)
def test_array_script_runs_the_line_of_its_element(tmp_path, index, code, said):
    for name, body in {"srun": '"$@"', "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    lines = "echo begun  # seed=0\nsh -c 'exit 75'  # seed=1\nsh -c 'exit 76'\n"
    (tmp_path / "points.txt").write_text(lines)
    array = next(path for path in SCRIPTS if path.name == "sweep_array.sbatch")
    done = subprocess.run(
        [str(array), str(tmp_path / "points.txt")],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_ARRAY_JOB_ID": "9",
        },
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, said)
    assert ("has no line 4" in done.stderr) == (code == 2)


def test_launch_submits_what_is_left_and_remembers_it(study, programs, capsys):
    settings = write_settings(study.workdir, {"form": "sbatch", "time": 7})
    options = Options(jobs=2, retries=0, slurm=str(settings))
    assert slurm.launch(study, options) == EXIT_OK
    assert "submitted 3 of 3 points as job 41, 2 at a time" in capsys.readouterr().out
    text = (programs / "sbatch.got").read_text()
    assert "#SBATCH --array=0-2%2" in text and "#SBATCH --time=7" in text
    # The queue still holds the first element only.
    assert slurm.launch(study, options) == EXIT_OK
    said = capsys.readouterr().out
    assert "1 points are in the queue already" in said
    assert "submitted 2 of 3 points" in said


@pytest.fixture
def together(study):
    """Twenty points of one group, one of another, and one for itself."""
    base = study.points[0].config
    alone = experiment.resolve({"train": {"steps": 1}})

    def point(number, config, vectorize):
        labels = {"seed": number}
        return Planned(f"{number:016x}", labels, "c.py", {}, config, vectorize)

    def seeded(number, **model):
        given = {"train": {"steps": 1, "seed": number}, "model": model}
        return experiment.resolve(given)

    points = [point(number, seeded(number), True) for number in range(20)]
    points += [point(30, seeded(30, num_layers=1), True), point(40, base, False)]
    assert members.common(alone) == members.common(points[3].config)
    return dataclasses.replace(study, points=tuple(points))


def test_points_that_train_together_share_an_element(together, programs, capsys):
    settings = write_settings(together.workdir, {"form": "sbatch"})
    options = Options(jobs=9, slurm=str(settings))
    assert slurm.launch(together, options) == EXIT_OK
    said = capsys.readouterr().out
    assert "submitted 22 of 22 points as job 41 (4 processes), 4 at a time" in said
    (lines,) = together.workdir.glob("slurm/array-*.txt")
    words = [shlex.split(line) for line in lines.read_text().splitlines()]
    hashes = [point.hash for point in together.points]
    assert [line[0] for line in words] == [hashes[i] for i in (0, 16, 20, 21)]
    assert words[0][-2:] == ["--beside", ",".join(hashes[1:16])]
    assert words[1][-2:] == ["--beside", ",".join(hashes[17:20])]
    assert words[2][3:] == words[3][3:-1] + [hashes[20]]
    assert "attnjax.studies.worker" in words[3]
    printed.launch(together, options)
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line, comments=True) for line in lines] == [
        line[1:] for line in words
    ]
    # The queue holds the first element, so its sixteen points.
    assert slurm.launch(together, options) == EXIT_OK
    said = capsys.readouterr().out
    assert "16 points are in the queue already" in said
    assert "submitted 6 of 22 points" in said


@pytest.mark.filterwarnings("ignore:No submission happened")
def test_submitit_calls_an_element_for_its_points(together, programs, monkeypatch):
    submitit = pytest.importorskip("submitit")
    seen = []

    def submit(self, call):
        seen.append(call)
        return SimpleNamespace(job_id=f"41_{len(seen) - 1}")

    monkeypatch.setattr(submitit.SlurmExecutor, "submit", submit)
    assert slurm.launch(together, Options()) == EXIT_OK
    assert [call.command for call in seen] == [
        element.command for element in together.elements(together.points)
    ]
    submitted = json.loads((together.workdir / "slurm/submitted.json").read_text())
    assert sorted(submitted.values()).count("41_0") == 16


def test_refused_array_is_one_line_with_the_words_of_sbatch(study, programs):
    (programs / "sbatch").write_text(
        "#!/bin/bash\necho 'no such partition' >&2; exit 1"
    )
    settings = write_settings(study.workdir, {"form": "sbatch"})
    with pytest.raises(UserError, match="sbatch failed: no such partition"):
        slurm.launch(study, Options(slurm=str(settings)))


def test_refused_array_is_one_line_through_submitit_too(study, programs):
    pytest.importorskip("submitit")
    (programs / "sbatch").write_text(
        "#!/bin/bash\necho 'no such partition' >&2; exit 1"
    )
    with pytest.raises(UserError, match=r"sbatch failed: .*no such partition"):
        slurm.launch(study, Options())


def test_missing_slurm_is_one_line(study, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UserError, match="needs SLURM's commands; got no sbatch, squeue"
    ):
        slurm.launch(study, Options())


def test_missing_submitit_names_the_other_form(study, programs, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'not installed.*"form": "sbatch"'):
        slurm.launch(study, Options())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"time": 0}, "time must be at least 1 minute; got 0"),
        ({"time": 1, "signal_seconds": 61}, "within the time limit; got signal_sec"),
        ({"max_requeues": -1}, "max_requeues must not be negative; got -1"),
        ({"form": "pickle"}, "form"),
        ({"partitoin": "gpu"}, "partition"),
    ],
)
def test_wrong_setting_is_refused(tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        slurm.read_settings(write_settings(tmp_path, value))


def test_settings_file_must_be_there_and_json(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        slurm.read_settings(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        slurm.read_settings(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(jobs=0), "--jobs: must be at least 1; got 0"),
        (Options(retries=-1), "--retries: must not be negative; got -1"),
    ],
)
def test_wrong_option_is_refused(study, options, message):
    with pytest.raises(UserError, match=message):
        slurm.launch(study, options)


def element(tmp_path, code, *, retries=0):
    command = [sys.executable, "-c", code]
    return slurm.Call(command, tmp_path / "log", retries)


def test_element_gives_the_exit_code_of_a_point_that_saved(tmp_path):
    assert element(tmp_path, "raise SystemExit(75)")() == 75


def test_element_begins_a_crashed_point_again_then_fails(tmp_path):
    crash = "print('begun', flush=True); raise SystemExit(1)"
    with pytest.raises(RuntimeError, match="exit code 1; see"):
        element(tmp_path, crash, retries=2)()
    assert (tmp_path / "log").read_text().count("begun") == 3


def test_element_does_not_repeat_a_mistake(tmp_path):
    mistake = "print('begun', flush=True); raise SystemExit(2)"
    with pytest.raises(RuntimeError, match="exit code 2"):
        element(tmp_path, mistake, retries=2)()
    assert (tmp_path / "log").read_text().count("begun") == 1


def test_checkpoint_inside_a_signal_handler_waits_for_the_save(tmp_path):
    pytest.importorskip("submitit")
    save = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.5); print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    one = element(tmp_path, save)
    seen = {}

    def handle(number, frame):
        seen["next"] = one.checkpoint()
        seen["log"] = (tmp_path / "log").read_text()

    def ask():
        until = time.monotonic() + 300
        while time.monotonic() < until:
            if one.log.exists() and "ready" in one.log.read_text():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, handle)
    try:
        threading.Thread(target=ask).start()
        assert one() == 75
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen["log"].splitlines() == ["ready", "saved"]
    again = pickle.loads(pickle.dumps(seen["next"].function))
    assert again.command == one.command and again.retries == one.retries
