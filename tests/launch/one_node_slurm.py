"""A SLURM cluster of one node on this machine: munge, controller and node daemon.

No systemd, no fixed ports, nothing outside the given folder; the daemons are children
of this process and end with the `running` block. Needs Debian's packages:

    apt-get install --no-install-recommends slurm-wlm munge

`python tests/launch/one_node_slurm.py FOLDER` keeps one up until Ctrl-C, for trying
scripts by hand.
"""

import contextlib
import dataclasses
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
TEMPLATE = Path(__file__).with_suffix(".conf")
# Debian puts the daemons where a plain user's PATH does not look.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
CPUS = 8  # promised to the scheduler, whatever the machine has


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)}"
    if os.getuid() != 0:
        return "the one-node SLURM is started by root"
    return None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        folder: of its configuration, state and logs.
        environment: variables with which its commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str, check: bool = True, **more) -> str:
        """Run a command of the cluster; what it printed.

        Raises:
            AssertionError: with its output, when it fails and `check` is set.
        """
        environment = {**self.environment, **more.pop("environment", {})}
        done = subprocess.run(
            words,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            **more,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}"
        return done.stdout

    def submit(self, *words: str, **more) -> str:
        """Run sbatch; the number of the job."""
        return self.run("sbatch", "--parsable", *words, **more).strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of one job or array element."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        words = text.strip().splitlines()[0].split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def state(self, job: str) -> str:
        """The state of a job, such as "RUNNING"."""
        return self.show(job)["JobState"]

    def wait(
        self, what: str, condition: Callable[[], bool], *, limit: float = 300
    ) -> None:
        """Poll until `condition()`.

        Raises:
            AssertionError: when it does not come true; with the queue.
        """
        until = time.monotonic() + limit
        while not condition():
            if time.monotonic() > until:
                queue = self.run("scontrol", "show", "job", check=False)
                raise AssertionError(f"not within {limit} s: {what}\n{queue}")
            time.sleep(0.2)

    def wait_for_state(self, job: str, *states: str, limit: float = 300) -> None:
        """Wait until a job is in one of these states."""
        self.wait(f"{job} {states}", lambda: self.state(job) in states, limit=limit)

    def cancel_everything(self) -> None:
        """Empty the queue, and wait until it is."""
        self.run("scancel", "--full", "--user", getpass.getuser(), check=False)
        self.wait("an empty queue", lambda: not self.run("squeue", "-h").strip())


@contextlib.contextmanager
def running(folder: Path, *, requeue_delay: int = 5) -> Iterator[Cluster]:
    """Start a cluster, and end it with the block.

    Args:
        folder: an empty folder; its path must be short, for a socket lies in it.
        requeue_delay: seconds before a requeued job may start again; at least 5.
    """
    folder = Path(folder).absolute()
    _prepare(folder, requeue_delay)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
        "PATH": SEARCH,
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    cluster = Cluster(folder, environment)
    with contextlib.ExitStack() as daemons:

        def start(name: str, *words: str) -> subprocess.Popen:
            return daemons.enter_context(_daemon(cluster, name, *words))

        munged = start(
            "munged",
            "--foreground",
            "--force",  # temporary folders are closed to other users: let them be
            *("--key-file", str(folder / "munge.key")),
            *("--socket", str(folder / "munge.socket")),
            *("--pid-file", str(folder / "munged.pid")),
            *("--seed-file", str(folder / "munge.seed")),
        )
        _wait(lambda: (folder / "munge.socket").exists(), munged, cluster)
        controller = start("slurmctld", "-D", "-c")
        _wait(lambda: "UP" in _ping(cluster), controller, cluster)
        node = start("slurmd", "-D", "-N", _host())
        _wait(lambda: "idle" in _nodes(cluster), node, cluster)
        try:
            yield cluster
        finally:
            with contextlib.suppress(AssertionError):
                cluster.cancel_everything()


def _prepare(folder: Path, requeue_delay: int) -> None:
    for name in ("controller", "node"):
        (folder / name).mkdir(parents=True)
    # The node's user reads its job scripts through this path.
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    (folder / "completed.log").touch()
    ports = _free_ports(2)
    text = TEMPLATE.read_text()
    for name, value in {
        "HOST": _host(),
        "USER": getpass.getuser(),
        "FOLDER": folder,
        "CONTROLLER_PORT": ports[0],
        "NODE_PORT": ports[1],
        "REQUEUE_DELAY": requeue_delay,
        "CPUS": CPUS,
    }.items():
        text = text.replace(f"@{name}@", str(value))
    (folder / "slurm.conf").write_text(text)


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def _daemon(cluster: Cluster, name: str, *words: str) -> Iterator[subprocess.Popen]:
    program = shutil.which(name, path=SEARCH)
    log = cluster.folder / f"{name}.out"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [program, *words],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cluster.folder,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(
    ready: Callable[[], bool], process: subprocess.Popen, cluster: Cluster
) -> None:
    until = time.monotonic() + 300
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            logs = sorted(cluster.folder.glob("*.out"))
            said = "\n".join(f"{log.name}: {log.read_text()}" for log in logs)
            raise RuntimeError(f"{process.args[0]} does not run:\n{said}")
        time.sleep(0.1)


def _ping(cluster: Cluster) -> str:
    return cluster.run("scontrol", "ping", check=False)


def _nodes(cluster: Cluster) -> str:
    return cluster.run("sinfo", "-h", "-o", "%T", check=False)


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(f"error: {reason}.")
    with running(Path(sys.argv[1])) as here, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={here.environment['SLURM_CONF']}", flush=True)
        signal.pause()
