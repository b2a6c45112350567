"""Real jobs on a SLURM of one node: limits, requeues, arrays, several tasks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "reliability")]

import one_node_slurm  # noqa: E402
import tiny_run  # noqa: E402

from attnjax.training import metrics  # noqa: E402

pytestmark = pytest.mark.slurm

SCRIPTS = REPOSITORY / "launch" / "slurm"
# The first start of a job lasts, whatever the machine: seconds of sleep after a step.
PACED = {"PACE": "0.25"}
PACING = """

_train = train


def train(*words, **more):
    import os
    import time

    pace = float(os.environ.get("PACE", "0"))
    if pace and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        pause = Hook()
        pause.on_step = lambda step, metrics: time.sleep(pace)
        more["hooks"] = (pause,)
    return _train(*words, **more)
"""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "MPLBACKEND": "agg",
    "PYTHON": sys.executable,
}
OPTIONS = {
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "train.steps": 240,
    "train.save_every": 50,
    "train.tensorboard": False,
    "eval.every": 80,
    "eval.batches": 2,
}
SWEEP = """
from attnjax.studies import point, seeds

def sweep():
    return seeds(point({config!r}, {options!r}), {count}{more})
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = one_node_slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    with one_node_slurm.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = tiny_run.Bench(tmp_path_factory.mktemp("bench"), options=OPTIONS)
    with open(bench.code / "attnjax" / "training" / "run.py", "a") as file:
        file.write(PACING)
    return bench


@pytest.fixture(scope="module")
def undisturbed(cluster, bench):
    """The losses of a run that nothing happened to."""
    job = submit(cluster, bench, "undisturbed")
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED", output(bench, job)
    return bench.folder / "undisturbed"


@pytest.fixture(scope="module")
def limited(cluster, bench, undisturbed):
    """A job with a limit of one minute, and one that waits for its success."""
    short = ["--time=1", "--signal=USR1@8"]
    job = submit(cluster, bench, "limited", sbatch=short, environment=PACED)
    needs = ["--dependency", f"afterok:{job}", "--kill-on-invalid-dep=yes"]
    return job, cluster.submit("--output=/dev/null", *needs, "--wrap=true")


@pytest.fixture(scope="module")
def limited_sweep(cluster, bench, undisturbed):
    """A sweep through submitit under such a limit, begun before the other tests."""
    return launch_sweep(
        cluster,
        bench,
        "pickled",
        count=2,
        # submitit itself cannot be told before it has started: leave it a minute.
        settings={"form": "submitit", "time": 2, "signal_seconds": 8},
        environment={"PACE": "0.6"},
    )


@pytest.fixture(autouse=True)
def begun(limited, limited_sweep):
    """Let what takes a minute run beside everything else."""


def environment(bench, more=None):
    return {
        **ENVIRONMENT,
        "PYTHONPATH": str(bench.code),
        "JAX_COMPILATION_CACHE_DIR": str(bench.folder / "compiled"),
        **(more or {}),
    }


def submit(cluster, bench, run, *, sbatch=(), script="train.sbatch", words=(), **more):
    """Submit the training of a run; the number of the job."""
    command = bench.command(run)
    arguments = command[command.index("--config") :]
    return cluster.submit(
        *("--output", str(bench.folder / "%j.out")),
        *sbatch,
        str(SCRIPTS / script),
        *arguments,
        *words,
        cwd=bench.folder,
        environment=environment(bench, more.get("environment")),
    )


def output(bench, job):
    path = bench.folder / f"{job}.out"
    return path.read_text() if path.exists() else ""


def step(bench, run):
    return tiny_run.last_step(bench.folder / run)


def launch_sweep(cluster, bench, name, *, count, settings, jobs=2, **more):
    """Run `attnjax.sweep --launcher slurm`; what it printed."""
    options = {
        "data.name": f"text:{bench.folder}/corpus/*.txt",
        "data.cache_dir": str(bench.folder / "cache"),
        **tiny_run.OPTIONS,
        **OPTIONS,
        **more.get("options", {}),
    }
    config = str(bench.code / "configs" / "quickstart.py")
    how = ", vectorize=True" if more.get("together") else ""
    text = SWEEP.format(config=config, options=options, count=count, more=how)
    (bench.folder / f"{name}.py").write_text(text)
    (bench.folder / f"{name}.json").write_text(json.dumps(settings))
    return cluster.run(
        *(sys.executable, "-m", "attnjax.sweep", "--launcher", "slurm"),
        *("--sweep", f"{name}.py", "--workdir", str(bench.folder / name)),
        *("--jobs", str(jobs), "--slurm", f"{name}.json"),
        cwd=bench.folder,
        environment=environment(bench, more.get("environment")),
    )


def elements(folder):
    """hash -> element of the newest array."""
    return json.loads((folder / "slurm" / "submitted.json").read_text())


def states(folder):
    """hash -> content of its state file."""
    files = (folder / "state").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in files}


def all_done(folder, count):
    found = states(folder).values()
    return len(found) == count and all(one["state"] == "done" for one in found)


def test_killed_job_resumes_when_submitted_again(cluster, bench, undisturbed):
    job = submit(cluster, bench, "killed", environment=PACED)
    cluster.wait("steps", lambda: step(bench, "killed") >= 55)
    # Nothing catches it: the process dies as it stands.
    cluster.run("scancel", "--signal=HUP", job)
    cluster.wait_for_state(job, "FAILED", "COMPLETED", "CANCELLED")
    assert cluster.state(job) == "FAILED"
    again = submit(cluster, bench, "killed")
    cluster.wait_for_state(again, "COMPLETED", "FAILED")
    assert "resuming from step" in output(bench, again)
    assert tiny_run.differences(undisturbed, bench.folder / "killed") == []


def test_failed_dependency_never_starts(cluster, bench):
    failing = submit(cluster, bench, "failing", words=["--config.train.steps=-1"])
    after = ["--dependency", f"afterok:{failing}", "--kill-on-invalid-dep=yes"]
    dependent = submit(cluster, bench, "dependent", sbatch=after)
    cluster.wait_for_state(failing, "FAILED")
    assert cluster.show(failing)["ExitCode"] == "2:0"
    cluster.wait_for_state(dependent, "CANCELLED")
    assert not (bench.folder / "dependent").exists()


def test_cancelled_job_saves_and_is_not_requeued(cluster, bench):
    job = submit(cluster, bench, "cancelled", environment=PACED)
    cluster.wait("steps", lambda: step(bench, "cancelled") >= 5)
    cluster.run("scancel", job)
    cluster.wait("the job's end", lambda: not cluster.run("squeue", "-h", "-j", job))
    assert cluster.state(job) == "CANCELLED"
    assert cluster.show(job)["Restarts"] == "0"
    reached = step(bench, "cancelled")
    assert 5 <= tiny_run.newest_checkpoint(bench.folder / "cancelled") <= reached + 1


def test_array_runs_two_at_a_time_and_requeues_one_alone(cluster, bench):
    folder = bench.folder / "plain"
    settings = {"form": "sbatch", "time": 10, "signal_seconds": 30}
    said = launch_sweep(
        cluster,
        bench,
        "plain",
        count=3,
        settings=settings,
        options={"train.steps": 60},
        environment=PACED,
    )
    assert "submitted 3 of 3 points" in said and "2 at a time" in said
    jobs = elements(folder)
    again = launch_sweep(
        cluster,
        bench,
        "plain",
        count=3,
        settings=settings,
        options={"train.steps": 60},
    )
    assert "in the queue already" in again and "nothing to submit" in again
    array = next(iter(jobs.values())).partition("_")[0]
    seen, signalled = [], None

    def watch():
        nonlocal signalled
        running = cluster.run(
            *("squeue", "-h", "-r", "-j", array, "-t", "RUNNING", "-o", "%F_%K"),
            check=False,
        ).split()
        seen.append(len([one for one in running if one.startswith(array)]))
        for one, job in jobs.items():
            if signalled is None and tiny_run.last_step(folder / "points" / one) > 3:
                cluster.run("scancel", "--signal=USR1", job)
                signalled = one
        return all_done(folder, 3)

    cluster.wait("three points", watch)
    assert max(seen) == 2
    attempts = {name: state["attempt"] for name, state in states(folder).items()}
    assert attempts == {name: 2 if name == signalled else 1 for name in jobs}
    restarts = {name: cluster.show(job)["Restarts"] for name, job in jobs.items()}
    assert restarts == {name: "1" if name == signalled else "0" for name in jobs}


def test_preempted_job_saves_and_goes_on_when_there_is_room(
    cluster, bench, undisturbed
):
    low = ["--partition=spot", "--cpus-per-task=4"]
    job = submit(cluster, bench, "preempted", sbatch=low, environment=PACED)
    cluster.wait("steps", lambda: step(bench, "preempted") >= 5)
    # Beside four of the node's eight cores there is no room for five.
    high = ["--partition=high", "--cpus-per-task=5", "--output=/dev/null"]
    urgent = cluster.submit(*high, "--wrap=sleep 1")
    cluster.wait_for_state(urgent, "COMPLETED")
    saved = tiny_run.newest_checkpoint(bench.folder / "preempted")
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    said = output(bench, job)
    assert cluster.state(job) == "COMPLETED", said
    assert cluster.show(job)["Restarts"] == "1"
    assert "SIGTERM received" in said and "saved; requeueing" not in said
    assert saved >= 5 and "resuming from step" in said
    assert tiny_run.differences(undisturbed, bench.folder / "preempted") == []


def test_points_that_train_together_are_one_element(cluster, bench):
    folder = bench.folder / "together"
    said = launch_sweep(
        cluster,
        bench,
        "together",
        count=2,
        settings={"form": "sbatch", "time": 10, "signal_seconds": 30},
        options={"train.steps": 400},
        together=True,
    )
    assert "submitted 2 of 2 points" in said and "(1 processes), 1 at a time" in said
    (job,) = set(elements(folder).values())
    first = min(elements(folder), key=list(elements(folder)).index)
    cluster.wait("steps", lambda: tiny_run.last_step(folder / "points" / first) > 3)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait("two points", lambda: all_done(folder, 2))
    assert {state["attempt"] for state in states(folder).values()} == {2}
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert cluster.show(job)["Restarts"] == "1"
    (log,) = folder.glob("logs/*.slurm.log")
    assert "resuming 2 runs from step" in log.read_text()


def test_time_limit_saves_requeues_and_finishes_the_same(
    cluster, bench, undisturbed, limited
):
    limited, follower = limited
    cluster.wait_for_state(limited, "COMPLETED", "FAILED", "TIMEOUT", limit=400)
    said = output(bench, limited)
    assert cluster.state(limited) == "COMPLETED", said
    assert int(cluster.show(limited)["Restarts"]) >= 1
    # Its requeues are no failures to who depends on it.
    cluster.wait_for_state(follower, "COMPLETED", "CANCELLED")
    assert cluster.state(follower) == "COMPLETED"
    assert "SIGUSR1 received" in said and "resuming from step" in said
    assert tiny_run.differences(undisturbed, bench.folder / "limited") == []


def test_submitit_array_goes_on_after_its_time_limit(cluster, bench, limited_sweep):
    folder = bench.folder / "pickled"
    assert "submitted 2 of 2 points" in limited_sweep
    cluster.wait("two points", lambda: all_done(folder, 2), limit=400)
    for name, job in elements(folder).items():
        cluster.wait_for_state(job, "COMPLETED", "FAILED")
        assert int(cluster.show(job)["Restarts"]) >= 1
        log = (folder / "logs" / f"{name}.slurm.log").read_text()
        assert "resuming from step" in log
    said = launch_sweep(cluster, bench, "pickled", count=2, settings={})
    assert "nothing to submit" in said


def test_two_tasks_train_one_run_and_are_requeued_together(cluster, bench, undisturbed):
    job = submit(
        cluster,
        bench,
        "two tasks",
        script="train_multinode.sbatch",
        sbatch=["--nodes=1", "--ntasks-per-node=2", "--signal=USR1@60"],
        words=["--config.mesh.data=2"],
        environment=PACED,
    )
    cluster.wait("steps", lambda: step(bench, "two tasks") >= 55)
    # To the tasks alone, as before the time limit.
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for_state(job, "COMPLETED", "FAILED", limit=400)
    said = output(bench, job)
    assert cluster.state(job) == "COMPLETED", said
    assert cluster.show(job)["Restarts"] == "1"
    assert "resuming from step" in said and "2 x cpu" in said
    runs = [bench.folder / name for name in ("undisturbed", "two tasks")]
    losses = [
        [line["loss"] for line in metrics.read(run / "metrics.jsonl")] for run in runs
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
