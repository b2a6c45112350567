"""Train one run on a Cloud TPU VM slice; the same command again goes on with it.

    python launch/tpu_vm/run.py --name big --zone us-central2-b --spot \
        --accelerator_type v5litepod-16 --workdir gs://BUCKET/runs/big \
        -- --config configs/quickstart.py --config.mesh.data=-1

Asks for a queued resource unless there is one, waits for it, asks again when it was
preempted, brings this clone onto every worker, starts `python -m attnjax.train` there
with the words after `--`, and shows its output. The training does not hang on this
connection: Ctrl-C leaves it alone, the same command finds it again, --stop saves and
ends it.

Exit codes are the training's: 0 finished, 2 a mistake, others a fault; what was saved
(75) is started again.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import secrets
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

EXIT_OK, EXIT_FAULT, EXIT_MISTAKE, EXIT_SAVED = 0, 1, 2, 75
EXIT_INTERRUPTED = 130
# Of worker.sh: a training runs there; it was ended by --stop.
RUNNING, STOPPED = 10, 79
LOST = 255  # ssh's own, and gcloud's for a worker that it could not reach
MOST_LOST = 20  # connections in a row that broke
MOST_FAILED = 3  # requests in a row that ended in FAILED
ROOT = Path(__file__).resolve().parents[2]
# "TPU software versions" in Google's documentation.
RUNTIMES = {
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


class Mistake(Exception):
    """What the person at the keyboard can mend; the text is one line."""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    try:
        options, rest = parse(argv)
        tpu = Tpu(options)
        code = stop(tpu, options) if options.stop else train(tpu, options, rest)
        if options.delete:
            tpu.delete()
        return code
    except (Mistake, OSError) as error:
        print(f"error: tpu_vm: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        say("leaving. A training that runs goes on; the same command finds it again.")
        return EXIT_INTERRUPTED


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the words after `--`."""
    parser = argparse.ArgumentParser(
        prog="python launch/tpu_vm/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the queued resource and of its TPU VM")
    add("--zone", required=True)
    add("--project", help="default: gcloud's")
    add("--accelerator_type", required=True, help="v5litepod-16, v5p-32, v6e-8, ...")
    add("--runtime_version", help="default: by accelerator type")
    add("--spot", action="store_true", help="cheaper, may be preempted at any time")
    add(
        "--workdir", required=True, help="gs://BUCKET/PATH, or a path all workers share"
    )
    add("--setup", help="shell script to run on every worker after installing")
    add("--create_flags", default="", help="more for queued-resources create")
    add("--ssh_flags", default="", help="more for tpu-vm ssh and scp")
    add("--poll", type=float, default=30.0, help="seconds between looks (default 30)")
    add("--delete", action="store_true", help="delete the TPU when the training ended")
    add("--stop", action="store_true", help="save and end the training that runs")
    own, rest = argv, []
    if "--" in argv:
        cut = argv.index("--")
        own, rest = argv[:cut], argv[cut + 1 :]
    options = parser.parse_args(own)
    check(options, rest)
    return options, rest


def check(options: argparse.Namespace, train: list[str]) -> None:
    """Refuse options that cannot work; fill the runtime version."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", options.name):
        raise Mistake(
            "--name must be lower-case letters, digits and -, a letter first; got "
            f"name={options.name}."
        )
    if not re.match(r"gs://[^/]+/.|/", options.workdir):
        raise Mistake(
            "--workdir must be gs://BUCKET/PATH or an absolute path that all workers "
            f"share and that outlives them; got workdir={options.workdir}."
        )
    if not train and not options.stop:
        raise Mistake("nothing to run: give attnjax.train's options after `--`.")
    if any(word.partition("=")[0] == "--workdir" for word in train):
        raise Mistake("--workdir goes before `--`: its bucket is mounted.")
    if options.setup is not None and not Path(options.setup).is_file():
        raise Mistake(f"--setup must be a shell script; got setup={options.setup}.")
    family = options.accelerator_type.partition("-")[0]
    options.runtime_version = options.runtime_version or RUNTIMES.get(family)
    if options.runtime_version is None:
        raise Mistake(
            f"--runtime_version is known for {', '.join(RUNTIMES)} alone; got "
            f"accelerator_type={options.accelerator_type}. Give --runtime_version."
        )


class Tpu:
    """A queued resource and the TPU VM it stands for, through gcloud.

    Args:
        options: from `parse`.
    """

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._place = [f"--zone={options.zone}"]
        if options.project:
            self._place.append(f"--project={options.project}")
        self._ssh_flags = [*self._place, *shlex.split(options.ssh_flags)]
        self._seen = False

    def look(self) -> tuple[str | None, str]:
        """The state of the queued resource, None when there is none; and its words.

        Raises:
            Mistake: when gcloud cannot say, at the first look or ten times in a row.
        """
        for _ in range(10):
            done = self._queue("describe", "--format=json")
            if done.returncode == 0:
                self._seen = True
                state = json.loads(done.stdout).get("state", {})
                error = state.get("failedData", {}).get("error", {})
                return state.get("state", "UNKNOWN"), error.get("message", "")
            if "NOT_FOUND" in done.stderr:
                self._seen = True
                return None, ""
            if not self._seen:
                break
            time.sleep(self._options.poll)
        raise Mistake(f"gcloud cannot describe the queued resource: {words(done)}")

    def create(self) -> None:
        """Ask for the resource; does not wait for it."""
        options = self._options
        done = self._queue(
            "create",
            f"--node-id={options.name}",
            f"--accelerator-type={options.accelerator_type}",
            f"--runtime-version={options.runtime_version}",
            *(["--spot"] if options.spot else []),
            *shlex.split(options.create_flags),
        )
        if done.returncode and "ALREADY_EXISTS" not in done.stderr:
            raise Mistake(f"gcloud refused the queued resource: {words(done)}")

    def delete(self) -> None:
        """Delete the resource and its VM, and wait for it."""
        say(f"deleting {self._options.name}.")
        done = self._queue("delete", "--force", "--quiet")
        if done.returncode and "NOT_FOUND" not in done.stderr:
            raise Mistake(f"gcloud could not delete it: {words(done)}")

    def wait_until_active(self) -> None:
        """Return when the VM is there; create and re-create it as needed.

        Raises:
            Mistake: when the request fails again and again.
        """
        failed, shown = 0, ""
        while True:
            state, message = self.look()
            if state != shown:
                say(f"{self._options.name} is {state or 'not there'}.")
                shown = state
            if state == "ACTIVE":
                return
            if state is None:
                self.create()
            elif state in ("SUSPENDED", "FAILED"):
                failed += state == "FAILED"
                if failed == MOST_FAILED:
                    raise Mistake(f"the request failed {failed} times: {message}")
                self.delete()
            else:
                time.sleep(self._options.poll)

    def is_active(self) -> bool:
        """Whether the VM is there now."""
        return self.look()[0] == "ACTIVE"

    def ssh(self, command: str) -> int:
        """Run a shell command on all workers; the first code that is not 0, or LOST."""
        return self._show("ssh", self._options.name, f"--command={command}")

    def copy(self, source: Path, target: str) -> int:
        """Copy a file into the home of every worker."""
        return self._show("scp", str(source), f"{self._options.name}:{target}")

    def _show(self, verb: str, *more: str) -> int:
        head = ["gcloud", "compute", "tpus", "tpu-vm", verb]
        # Quiet: the first connection ever makes a key instead of asking for one.
        command = [*head, *more, "--worker=all", "--quiet", *self._ssh_flags]
        return subprocess.run(command, stdin=subprocess.DEVNULL).returncode

    def _queue(self, verb: str, *more: str) -> subprocess.CompletedProcess:
        head = ["gcloud", "compute", "tpus", "queued-resources", verb]
        command = [*head, self._options.name, *self._place, *more]
        try:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise Mistake(
                "gcloud is not installed, or not in PATH: it comes with the Google "
                "Cloud CLI."
            ) from None


def train(tpu: Tpu, options: argparse.Namespace, words: list[str]) -> int:
    """Train until the run is finished or cannot go on; the training's exit code."""
    # Once: what is edited here while it trains stays here.
    packed = pack(Path(options.setup) if options.setup else None)
    lost = 0
    while True:
        tpu.wait_until_active()
        code = one_start(tpu, options, words, packed)
        lost = lost + 1 if code == LOST else 0
        if code in (EXIT_OK, EXIT_MISTAKE):
            return code
        if code == STOPPED:
            say("saved and stopped. The same command goes on.")
            return EXIT_SAVED
        # A VM that is taken away takes its processes with it, and is gone a bit later.
        time.sleep(options.poll)
        if code == EXIT_SAVED:
            say("saved; starting it again.")
        elif lost >= MOST_LOST:
            raise Mistake(f"the connection to the workers broke {lost} times in a row.")
        elif code != LOST and tpu.is_active():
            print(f"error: tpu_vm: the training ended with {code}.", file=sys.stderr)
            return code


def one_start(
    tpu: Tpu, options: argparse.Namespace, words: list[str], packed: bytes
) -> int:
    """Follow the training that runs, or install and start one; its exit code."""
    worker = worker_script(options)
    code = tpu.ssh(f"if [ -f {worker} ]; then bash {worker} alive; fi")
    if code == RUNNING:
        say("a training runs there: following it.")
        return tpu.ssh(f"bash {worker} follow")
    if code not in (EXIT_OK, LOST) and tpu.is_active():
        raise Mistake(f"no command runs on the workers (exit {code}); see above.")
    code = LOST if code else install(tpu, options, packed)
    if code != EXIT_OK:
        return code
    # gcloud runs a command again when the connection broke: the start has a name.
    name = secrets.token_hex(4)
    return tpu.ssh(shlex.join(["bash", worker, "run", name, options.workdir, *words]))


def stop(tpu: Tpu, options: argparse.Namespace) -> int:
    """Let the training save and end; 0 also when none runs."""
    if not tpu.is_active():
        say("nothing runs: there is no active TPU VM.")
        return EXIT_OK
    worker = worker_script(options)
    code = tpu.ssh(f"if [ -f {worker} ]; then bash {worker} stop; fi")
    if code != EXIT_OK:
        raise Mistake(f"not every worker could be told to stop (exit {code}).")
    say("nothing runs any more. The same command without --stop goes on.")
    return code


def install(tpu: Tpu, options: argparse.Namespace, packed: bytes) -> int:
    """Bring an archive from `pack` onto every worker, with what its code needs.

    Raises:
        Mistake: when a worker that is there could not be set up.
    """
    folder = f"attnjax-{options.name}"
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / f"{folder}.tar.gz"
        archive.write_bytes(packed)
        code = tpu.copy(archive, archive.name)
    if code == EXIT_OK:
        # Anew: a file that was removed here must not be found there.
        unpack = f"rm -rf {folder} && mkdir {folder} && tar -xzf {folder}.tar.gz"
        unpack += f" -C {folder}"
        digest = hashlib.sha256(packed).hexdigest()
        code = tpu.ssh(f"{unpack} && bash {worker_script(options)} setup {digest}")
    if code not in (EXIT_OK, LOST) and tpu.is_active():
        raise Mistake(
            f"a worker could not be set up (exit {code}); its words are above."
        )
    return LOST if code else EXIT_OK


def worker_script(options: argparse.Namespace) -> str:
    """Where worker.sh lies on a worker, under its home."""
    return f"attnjax-{options.name}/launch/tpu_vm/worker.sh"


def pack(setup: Path | None) -> bytes:
    """This clone's files as they are, without what git ignores; equal for equal files.

    Args:
        setup: a script of the site, which worker.sh runs after installing.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode:
        raise Mistake(f"{ROOT} is not a git clone: {listed.stderr.decode().strip()}")
    files = {name: ROOT / name for name in sorted(listed.stdout.decode().split("\0"))}
    if setup is not None:
        files["launch/tpu_vm/site_setup.sh"] = setup
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, path in files.items():
            if path.is_file():
                info = archive.gettarinfo(path, arcname=name)
                info.mtime = info.uid = info.gid = 0
                info.uname = info.gname = ""
                with path.open("rb") as content:
                    archive.addfile(info, content)
    return gzip.compress(plain.getvalue(), mtime=0)


def words(done: subprocess.CompletedProcess) -> str:
    """What gcloud said of an error, as one line."""
    said = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")] or said[-1:]
    return " ".join(" ".join(errors).split()) or f"exit {done.returncode}"


def say(text: str) -> None:
    """A line about what happens, apart from the training's output."""
    print(f"tpu_vm: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
