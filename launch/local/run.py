"""Train one run with several processes of this machine.

    python launch/local/run.py --processes 2 --devices_per_process 4 -- \
        --config configs/quickstart.py --config.mesh.data=-1 --workdir runs/two

What follows `--` goes to `python -m attnjax.train`. The output of process 0 is shown,
that of every other one is kept in a file (--logs, default WORKDIR.logs).

One request to stop (Ctrl-C, SIGTERM, SIGUSR1) is passed to process 0: all of them save
and end with exit code 75, and the same command goes on. When a process dies, the others
get --wait seconds to end by themselves.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

EXIT_OK, EXIT_MISTAKE, EXIT_SAVED = 0, 2, 75
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(argv: list[str]) -> int:
    """Start the processes, wait for them, and answer with one exit code."""
    options, rest = parse(argv)
    logs = Path(options.logs or f"{workdir_of(rest)}.logs")
    logs.mkdir(parents=True, exist_ok=True)
    asked: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    port = options.port or free_port()
    started = []
    try:
        for index in range(options.processes):
            started.append(start(index, port, options, rest, logs))
        return wait(started, asked, options.wait, logs)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the words after `--`."""
    parser = argparse.ArgumentParser(
        prog="python launch/local/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--processes", type=int, required=True, help="how many")
    add("--devices_per_process", type=int, help="CPU devices of each (no accelerator)")
    add("--gpus_per_process", type=int, help="GPUs of each, in their order")
    add("--logs", help="folder for the output of each process")
    add("--port", type=int, help="where process 0 listens (default: a free one)")
    add("--wait", type=float, default=60.0, help="seconds for the others to end")
    own, rest = argv, []
    if "--" in argv:
        cut = argv.index("--")
        own, rest = argv[:cut], argv[cut + 1 :]
    options = parser.parse_args(own)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1; got {options.processes}.")
    for name in ("devices_per_process", "gpus_per_process"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1; got {value}.")
    if options.devices_per_process and options.gpus_per_process:
        parser.error("--devices_per_process and --gpus_per_process exclude each other.")
    if not rest:
        parser.error("nothing to run: give attnjax.train's options after `--`.")
    if options.logs is None and workdir_of(rest) is None:
        parser.error("give --workdir after `--` (or --logs before it).")
    return options, rest


def workdir_of(words: list[str]) -> str | None:
    """The value of --workdir among the words for attnjax.train."""
    for index, word in enumerate(words):
        if word == "--workdir" and index + 1 < len(words):
            return words[index + 1].rstrip("/")
        if word.startswith("--workdir="):
            return word.partition("=")[2].rstrip("/")
    return None


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(index: int, port: int, options, rest: list[str], logs: Path):
    """Start one process; the output of process 0 is ours."""
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(options.processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if options.devices_per_process:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["JAX_NUM_CPU_DEVICES"] = str(options.devices_per_process)
    if options.gpus_per_process:
        first = index * options.gpus_per_process
        own = range(first, first + options.gpus_per_process)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
    command = [sys.executable, "-m", "attnjax.train", *rest]
    with contextlib.ExitStack() as stack:
        log = None
        if index > 0:
            path = logs / f"process_{index}.log"
            log = stack.enter_context(open(path, "ab"))
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C reaches us alone: we pass it on once.
            start_new_session=True,
        )


def wait(started: list, asked: list[int], patience: float, logs: Path) -> int:
    """Wait for all; pass on what we are asked; the code that says most."""
    deadline, ended_by_us = None, set()
    while any(process.poll() is None for process in started):
        while asked:
            number = asked.pop(0)
            # They agree among themselves; the first to live tells the others.
            for process in started:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(number)
                    break
        if deadline is None and any(process.poll() for process in started):
            deadline = time.monotonic() + patience
        if deadline is not None and time.monotonic() > deadline:
            for index, process in enumerate(started):
                if process.poll() is None:
                    ended_by_us.add(index)
                    process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in started]
    for index, code in enumerate(codes):
        if code not in (EXIT_OK, EXIT_SAVED) and index not in ended_by_us:
            say_end(index, code, logs)
    if ended_by_us:
        names = ", ".join(map(str, sorted(ended_by_us)))
        say(f"process {names}: waited {patience:g} s for it, then ended it.")
    code = together(codes)
    if code == 1:
        say("the same command goes on from the last checkpoint.")
    return code


def say_end(index: int, code: int, logs: Path) -> None:
    """How one process ended, and where it says why."""
    how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    where = "above" if index == 0 else logs / f"process_{index}.log"
    say(f"process {index}: ended by {how}; its output: {where}")


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def together(codes: list[int]) -> int:
    """One exit code for all: a mistake, else a fault, else saved, else done."""
    if EXIT_MISTAKE in codes:
        return EXIT_MISTAKE
    faults = [code for code in codes if code not in (EXIT_OK, EXIT_SAVED)]
    if faults:
        return 1
    return EXIT_SAVED if EXIT_SAVED in codes else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
