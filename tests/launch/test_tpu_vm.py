"""launch/tpu_vm with a gcloud that plays the cloud: workers are folders here."""

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from attnjax.training import hosts
from launch.tpu_vm import run

HERE = Path(__file__).parent
WORKERS = 2  # where they could differ; else one, which is quicker
WAITING = ["ABSENT", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
# Of a worker. Ends with the next of its codes, "wait" being 75 at SIGTERM.
PYTHON = """#!/bin/bash
me="$FAKE/worker-${HOME##*-}"
echo "$ATTNJAX_HOSTS $PWD $*" >>"$FAKE/started.${HOME##*-}"
codes="$FAKE/codes.${HOME##*-}"
[[ -s "$codes" ]] || exit 0
read -r code <"$codes"
sed -i 1d "$codes"
echo "training of worker ${HOME##*-}"
if [[ "$code" == wait ]]; then
    trap 'exit 75' TERM
    for ((n = 0; n < 400; n++)); do sleep 0.05; done
fi
exit "$code"
"""
UV = """#!/bin/bash
echo "$*" >>"$FAKE/uv.${HOME##*-}"
[[ ! -e "$FAKE/uv.fails" ]] || exit 1
if [[ "$1" == venv ]]; then
    mkdir -p "${*: -1}/bin" && cp "$FAKE/python" "${*: -1}/bin/python"
fi
"""


class Cloud:
    """What the fake gcloud is told, and what it was asked."""

    def __init__(self, folder):
        self.folder = folder

    def plays(self, *states, codes=(), ssh=(), workers=1):
        """Set the states of the resource, and how each start of the training ends."""
        (self.folder / "workers").write_text(f"{workers}\n")
        (self.folder / "states").write_text("".join(f"{s}\n" for s in states))
        for worker in range(workers):
            path = self.folder / f"codes.{worker}"
            path.write_text("".join(f"{code}\n" for code in codes))
        if ssh:
            (self.folder / "ssh.codes").write_text("".join(f"{c}\n" for c in ssh))

    def make_workers(self):
        for worker in range(int((self.folder / "workers").read_text())):
            (self.folder / f"worker-{worker}").mkdir()

    def calls(self, *verbs):
        """The calls of these verbs in order: the words after `gcloud compute tpus`."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [shlex.split(line)[2:] for line in lines]
        return [call for call in found if not verbs or call[1] in verbs]

    def verbs(self):
        """What was asked, without looks."""
        return [call[1] for call in self.calls() if call[1] != "describe"]

    def starts(self, worker=0):
        """A line for each start of the training on a worker."""
        path = self.folder / f"started.{worker}"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    shutil.copy(HERE / "fake_gcloud.sh", programs / "gcloud")
    for name, text in {"uv": UV, "../python": PYTHON}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(run, "pack", small_pack)
    return Cloud(tmp_path)


def small_pack(setup):
    """An archive of worker.sh alone."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w:gz") as archive:
        folder = Path(run.__file__).parent
        archive.add(folder / "worker.sh", "launch/tpu_vm/worker.sh")
        if setup:
            archive.add(setup, "launch/tpu_vm/site_setup.sh")
    return plain.getvalue()


OPTIONS = [
    *("--name", "big", "--zone", "here-1", "--accelerator_type", "v5litepod-16"),
    *("--workdir", "/shared/runs/big", "--poll", "0.01"),
]
TRAIN = ["--", "--config", "c.py", '--config.model.layers="(a*3 b)*2" $x']


def launch(*more, train=TRAIN):
    return run.main([*OPTIONS, *more, *train])


def test_first_time_creates_waits_installs_and_trains(cloud, capfd):
    cloud.plays(*WAITING, codes=[0], workers=WORKERS)
    assert launch("--spot", "--project", "lab", "--create_flags", "--network=n -q") == 0
    assert cloud.verbs() == ["create", "ssh", "scp", "ssh", "ssh"]
    place = ["--zone=here-1", "--project=lab"]
    assert cloud.calls("create") == [
        [
            *("queued-resources", "create", "big", *place, "--node-id=big"),
            *("--accelerator-type=v5litepod-16",),
            *("--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--network=n", "-q"),
        ]
    ]
    for call in cloud.calls("ssh", "scp"):
        assert call[0] == "tpu-vm" and {*place, "--worker=all", "--quiet"} <= set(call)
    words = '--workdir /shared/runs/big --config c.py --config.model.layers="(a*3 b)*2"'
    for worker in range(WORKERS):
        home = cloud.folder / f"worker-{worker}" / "attnjax-big"
        expected = f"auto {home} -u -m attnjax.train {words} $x"
        assert cloud.starts(worker) == [expected]
    shown = capfd.readouterr()
    assert "training of worker 0" in shown.out and "training of worker 1" in shown.out
    for state in ["not there", *WAITING[1:]]:
        assert f"tpu_vm: big is {state}." in shown.err


def test_workers_let_jax_find_each_other():
    text = (Path(run.__file__).parent / "worker.sh").read_text()
    assert f"{hosts.HOSTS}=auto" in text
    assert hosts.find({hosts.HOSTS: "auto"}) is not None


def test_saved_training_starts_again_without_installing_twice(cloud):
    cloud.plays("ACTIVE", codes=[75, 75, 0])
    cloud.make_workers()
    removed = cloud.folder / "worker-0/attnjax-big/attnjax/removed.py"
    removed.parent.mkdir(parents=True)
    removed.touch()
    assert launch() == 0
    assert not removed.exists()
    assert len(cloud.starts()) == 3
    assert len((cloud.folder / "uv.0").read_text().splitlines()) == 2
    assert "create" not in cloud.verbs() and "delete" not in cloud.verbs()


def test_preempted_training_goes_on_on_a_new_machine(cloud, capfd):
    # Killed by the machine's end; the resource says so a little later.
    cloud.plays(
        *("ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", *WAITING), codes=[1, 0]
    )
    cloud.make_workers()
    assert launch() == 0
    asked = [verb for verb in cloud.verbs() if verb in ("delete", "create")]
    assert asked == ["delete", "create"]
    assert cloud.calls("delete")[0][3:] == ["--zone=here-1", "--force", "--quiet"]
    assert len(cloud.starts()) == 2
    # Nothing of the first machine is on the second: it was set up anew.
    assert len((cloud.folder / "uv.0").read_text().splitlines()) == 4


def test_preempted_while_installing_is_no_error(cloud):
    cloud.plays("ACTIVE", "SUSPENDED", "SUSPENDED", *WAITING, codes=[0], ssh=[1, "run"])
    cloud.make_workers()
    assert launch() == 0


@pytest.mark.parametrize("code", [2, 1])
def test_other_ends_are_reported_and_not_repeated(cloud, capfd, code):
    cloud.plays("ACTIVE", codes=[code, 0])
    cloud.make_workers()
    assert launch() == code
    assert len(cloud.starts()) == 1
    # Of a mistake the training has said all there is to say.
    said = "error: tpu_vm: the training ended with" in capfd.readouterr().err
    assert said == (code == 1)
    assert "delete" not in cloud.verbs()


def test_delete_gives_the_machine_back_at_the_end(cloud):
    cloud.plays("ACTIVE", codes=[2])
    cloud.make_workers()
    assert launch("--delete") == 2
    assert cloud.verbs()[-1] == "delete"


def test_broken_connection_finds_the_training_again(cloud, capfd):
    # gcloud gave up on `run`; the training, which it had started, is followed.
    cloud.plays("ACTIVE", codes=["wait"], workers=WORKERS)
    cloud.make_workers()
    begun = [sys.executable, run.__file__, *OPTIONS, *TRAIN]
    with subprocess.Popen(begun, start_new_session=True) as first:
        until_started(cloud)
        os.killpg(first.pid, signal.SIGINT)
        assert first.wait(300) == run.EXIT_INTERRUPTED
    again = subprocess.Popen(begun)
    try:
        wait_for(lambda: "a training runs there" in capfd.readouterr().err)
        assert launch("--stop", train=[]) == 0
        assert again.wait(300) == 75
    finally:
        again.kill()
        again.wait()
    assert [len(cloud.starts(worker)) for worker in range(WORKERS)] == [1, 1]
    assert "saved and stopped" in capfd.readouterr().err
    # Stopped is not finished: the same command goes on.
    assert launch() == 0
    assert [len(cloud.starts(worker)) for worker in range(WORKERS)] == [2, 2]


def until_started(cloud):
    wait_for(lambda: all(cloud.starts(worker) for worker in range(WORKERS)))
    # The trap of the fake training is set.
    logs = [f"worker-{n}/attnjax-big.state/log" for n in range(WORKERS)]
    wait_for(lambda: all((cloud.folder / log).read_text() for log in logs))


def wait_for(condition):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, "nothing happened within 300 s"
        time.sleep(0.05)


def test_a_second_start_follows_the_first(cloud):
    cloud.plays("ACTIVE", codes=[0])
    cloud.make_workers()
    assert launch() == 0
    (cloud.folder / "codes.0").write_text("wait\n")
    home = cloud.folder / "worker-0"
    worker = home / "attnjax-big/launch/tpu_vm/worker.sh"
    environment = {**os.environ, "HOME": str(home)}

    def begin(*words):
        return subprocess.Popen(["bash", worker, *words], env=environment)

    processes = [begin("run", "one", "/runs", "--config", "c.py")]
    wait_for(lambda: len(cloud.starts(0)) == 2)
    processes.append(begin("run", "two", "/runs", "--config", "c.py"))
    time.sleep(0.3)
    assert begin("stop").wait(300) == 0
    assert [process.wait(300) for process in processes] == [run.STOPPED, run.STOPPED]
    assert len(cloud.starts(0)) == 2


def test_gcloud_may_repeat_the_command_that_starts(cloud):
    cloud.plays("ACTIVE", codes=[75, 0])
    cloud.make_workers()
    home = cloud.folder / "worker-0"
    worker = home / "attnjax-big/launch/tpu_vm/worker.sh"
    assert launch() == 0
    (cloud.folder / "codes.0").write_text("3\n")
    environment = {**os.environ, "HOME": str(home)}

    def start(name):
        words = ["bash", worker, "run", name, "/shared/runs/big", "--config", "c.py"]
        return subprocess.run(words, env=environment, timeout=300).returncode

    assert [start("a1"), start("a1"), start("a2")] == [3, 3, 0]
    assert len(cloud.starts(0)) == 4


def test_connection_that_never_works_is_an_error(cloud, capsys, monkeypatch):
    monkeypatch.setattr(run, "MOST_LOST", 3)
    cloud.plays("ACTIVE", ssh=[255])
    cloud.make_workers()
    assert launch() == 2
    assert len(cloud.calls("ssh")) == 3
    assert "the connection to the workers broke 3 times" in capsys.readouterr().err


def test_stop_that_does_not_reach_a_worker_is_an_error(cloud, capsys):
    cloud.plays("ACTIVE", ssh=[255])
    assert launch("--stop", "--delete", train=[]) == 2
    assert (
        "not every worker could be told to stop (exit 255)" in capsys.readouterr().err
    )
    assert "delete" not in cloud.verbs()


def test_worker_that_runs_no_command_is_an_error(cloud, capsys):
    cloud.plays("ACTIVE", ssh=[1])
    assert launch() == 2
    assert "no command runs on the workers (exit 1)" in capsys.readouterr().err


def test_stop_without_a_machine_does_nothing(cloud):
    cloud.plays("ABSENT")
    assert launch("--stop", train=[]) == 0
    assert cloud.verbs() == []


def test_failed_request_is_repeated_and_then_explained(cloud, capsys):
    failed = ["FAILED no such network", "ABSENT"]
    cloud.plays(*failed, *failed, *failed)
    assert launch() == 2
    assert cloud.verbs() == ["delete", "create", "delete", "create"]
    assert "the request failed 3 times: no such network" in capsys.readouterr().err


def test_bucket_becomes_a_folder_on_every_worker(cloud):
    gcsfuse = cloud.folder / "programs" / "gcsfuse"
    gcsfuse.write_text('#!/bin/bash\necho "$*" >>"$FAKE/mounted"\n')
    gcsfuse.chmod(0o755)
    cloud.plays("ACTIVE", codes=[0])
    cloud.make_workers()
    assert launch("--workdir", "gs://bucket/runs/big") == 0
    place = cloud.folder / "worker-0" / "gcs" / "bucket"
    assert f"--workdir {place}/runs/big --config" in cloud.starts()[0]
    mounted = (cloud.folder / "mounted").read_text()
    assert f"--implicit-dirs --rename-dir-limit 100000 bucket {place}\n" in mounted


def test_bucket_without_gcsfuse_is_a_mistake(cloud, capfd):
    if shutil.which("gcsfuse"):
        pytest.skip("gcsfuse is installed here")
    cloud.plays("ACTIVE", codes=[0])
    cloud.make_workers()
    assert launch("--workdir", "gs://bucket/runs/big") == 2
    assert "gcsfuse is not installed. Install it in --setup" in capfd.readouterr().err
    assert cloud.starts() == []


def test_setup_of_the_site_runs_once_on_every_worker(cloud, tmp_path):
    script = tmp_path / "site.sh"
    script.write_text('echo "$PWD" >>"$FAKE/site"\n')
    cloud.plays("ACTIVE", codes=[75, 0], workers=WORKERS)
    cloud.make_workers()
    assert launch("--setup", str(script)) == 0
    assert len((cloud.folder / "site").read_text().splitlines()) == WORKERS


def test_worker_that_cannot_be_set_up_is_an_error(cloud, capfd):
    (cloud.folder / "uv.fails").touch()
    cloud.plays("ACTIVE")
    cloud.make_workers()
    assert launch() == 2
    assert "a worker could not be set up (exit 1)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("states", "refusal", "text"),
    [
        (
            ["BROKEN You do not have an active account"],
            None,
            "gcloud cannot describe the queued resource: ERROR: (gcloud.describe) You",
        ),
        (
            ["ABSENT"],
            "Create request issued\nERROR: (gcloud.create) PERMISSION_DENIED: no\n",
            "gcloud refused the queued resource: ERROR: (gcloud.create) PERMISSION",
        ),
    ],
)
def test_words_of_gcloud_are_one_line(cloud, capsys, states, refusal, text):
    cloud.plays(*states)
    if refusal:
        (cloud.folder / "refuse").write_text(refusal)
    assert launch() == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
    assert len(errors) == 1 and text in errors[0]


def test_a_look_that_fails_once_is_repeated(cloud):
    cloud.plays("ACCEPTED", "BROKEN unavailable", "ACTIVE", codes=[0])
    cloud.make_workers()
    assert launch() == 0


def test_without_gcloud_the_error_says_so(cloud, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch() == 2
    assert "gcloud is not installed, or not in PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--name", "Big"], "--name must be lower-case letters, digits and -"),
        (
            ["--workdir", "runs/big"],
            "--workdir must be gs://BUCKET/PATH or an absolute",
        ),
        (["--workdir", "gs://bucket/"], "--workdir must be gs://BUCKET/PATH or"),
        (["--accelerator_type", "v4-8"], "Give --runtime_version."),
        (["--setup", "/nowhere.sh"], "--setup must be a shell script; got"),
        (["--", "--workdir=x"], "--workdir goes before `--`"),
        (["--"], "nothing to run: give attnjax.train's options"),
    ],
)
def test_mistake_is_one_readable_line(words, text, capsys):
    train = [] if "--" in words else TRAIN
    assert launch(*words, train=train) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: tpu_vm: ") and shown.count("\n") == 1
    assert text in shown


def test_commands_of_the_readme_parse(shown_commands):
    shown = shown_commands("tpu_vm/run.py")
    assert len(shown) == 2
    for words in shown:
        options, train = run.parse(words)
        assert options.name == "big" and train[0] == "--config"


def test_archive_holds_the_clone_as_it_is_and_is_the_same_each_time(
    tmp_path, monkeypatch
):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root, script = tmp_path / "clone", tmp_path / "site.sh"
    script.write_text("true\n")
    (root / "launch").mkdir(parents=True)
    for name in ("kept", "edited", "removed", "launch/new", "ignored.tmp"):
        (root / name).write_text("before\n")
    (root / ".gitignore").write_text("*.tmp\n")
    for words in (["init", "--quiet"], ["add", "kept", "edited", "removed"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    (root / "edited").write_text("after\n")
    (root / "removed").unlink()
    monkeypatch.setattr(run, "ROOT", root)
    packed = run.pack(script)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        names = archive.getnames()
        assert archive.extractfile("edited").read() == b"after\n"
    site = "launch/tpu_vm/site_setup.sh"
    assert sorted(names) == [".gitignore", "edited", "kept", "launch/new", site]
    os.utime(root / "kept", (1, 1))
    assert run.pack(script) == packed


def test_archive_of_no_clone_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(run.Mistake, match="is not a git clone: fatal: not a git"):
        run.pack(None)
