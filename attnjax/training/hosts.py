"""One run on several processes: who they are, how they join, what each one does.

`find` is the one place that says where the number of processes, the number of this
one and the address of the first come from.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from attnjax.core import cli
from attnjax.core.errors import PeerError, UserError
from attnjax.training import agreement
from attnjax.training.signals import StopSignal, leave

# What launchers set, and what jax.distributed reads itself.
COORDINATOR = "JAX_COORDINATOR_ADDRESS"
NUM_PROCESSES = "JAX_NUM_PROCESSES"
PROCESS_ID = "JAX_PROCESS_ID"
# "auto": let jax ask the machine (the metadata server of a TPU VM).
HOSTS = "ATTNJAX_HOSTS"
TIMEOUT = "ATTNJAX_JOIN_SECONDS"

_TPU_PORT = 8476  # as jax uses on TPU hosts
_LEAVE_SECONDS = 5.0
# How the collectives of CPUs and GPUs, and jax's own service, tell of a lost process.
_GONE = re.compile(
    "gloo|nccl|connection (closed|reset)|peer|heartbeat|coordination", re.IGNORECASE
)
_HELP = (
    "Let launch/local/run.py start the processes, or see launch/README.md for clusters."
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run.

    Attributes:
        coordinator: "host:port" of process 0; None where jax finds all three.
        count: number of processes; None likewise.
        index: this one's number, 0 to count - 1; None likewise.
        source: what said so, for messages.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    source: str


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process among those of its run; None when it is the only one.

    The first of these that speaks of more than one process counts:

    1. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: launch/local,
       launch/slurm, launch/gke and launch/skypilot set them.
    2. SLURM, inside `srun` with several tasks and without a script of ours.
    3. TPU_WORKER_HOSTNAMES, TPU_WORKER_ID (and MEGASCALE_* for several slices), which
       GKE puts into the pods of TPU slices.
    4. ATTNJAX_HOSTS=auto, which launch/tpu_vm sets: jax asks the machine.

    Raises:
        UserError: when some of the variables of one source are missing or wrong.
    """
    for look in (_from_jax, _from_slurm, _from_tpu, _from_machine):
        place = look(environment)
        if place is not None:
            return place if place.count != 1 else None
    return None


def _from_jax(environment: Mapping[str, str]) -> Place | None:
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    given = {name: environment[name] for name in names if environment.get(name)}
    if not given or given.get(NUM_PROCESSES) == "1":
        return None
    if len(given) < len(names):
        shown = ", ".join(f"{n}={given[n]}" if n in given else f"no {n}" for n in names)
        raise UserError(
            f"hosts: {COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID} go together; got "
            f"{shown}. {_HELP}"
        )
    return _place(*(given[name] for name in names), source="JAX_*", names=names)


def _from_slurm(environment: Mapping[str, str]) -> Place | None:
    # Set in steps alone: a batch script itself is one process.
    nodes, count = (
        environment.get(f"SLURM_STEP_{name}") for name in ("NODELIST", "NUM_TASKS")
    )
    if not nodes or count in (None, "", "1"):
        return None
    job = environment.get("SLURM_JOB_ID", "0")
    port = 61440 + int(job) % 4096 if job.isdigit() else 61440
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    address = f"{_first_node(nodes)}:{port}"
    index = environment.get("SLURM_PROCID", "")
    return _place(address, count, index, source="SLURM", names=names)


def _first_node(nodes: str) -> str:
    """The first name of a SLURM node list, such as node[007-9,12],login1."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in found.groups())


def _from_tpu(environment: Mapping[str, str]) -> Place | None:
    workers = [w for w in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if w]
    slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
    if not workers or (len(workers) == 1 and slices == "1"):
        return None
    names = ("TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "TPU_WORKER_ID")
    numbers = [
        environment.get("TPU_WORKER_ID", ""),
        slices,
        environment.get("MEGASCALE_SLICE_ID") or "0",
    ]
    if not all(number.isdigit() for number in numbers):
        raise UserError(
            "hosts: TPU_WORKER_ID, MEGASCALE_NUM_SLICES and MEGASCALE_SLICE_ID must be "
            f"numbers; got {', '.join(map(repr, numbers))}. {_HELP}"
        )
    worker, count, number = map(int, numbers)
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    return _place(
        f"{first.split(':')[0]}:{_TPU_PORT}",
        str(count * len(workers)),
        str(number * len(workers) + worker),
        source="TPU_*",
        names=names,
    )


def _from_machine(environment: Mapping[str, str]) -> Place | None:
    value = environment.get(HOSTS, "")
    if value not in ("", "auto"):
        raise UserError(f"hosts: {HOSTS} must be auto or unset; got {HOSTS}={value}.")
    return Place(None, None, None, f"{HOSTS}=auto") if value else None


def _place(address: str, count: str, index: str, *, source: str, names) -> Place:
    """A checked Place; `names` are the variables the three values came from."""
    is_address = re.fullmatch(r".+:[0-9]{1,5}", address)
    if not count.isdigit() or not index.isdigit() or int(index) >= int(count):
        raise UserError(
            f"hosts: {names[2]} must be in [0, {names[1]}); got {names[2]}={index}, "
            f"{names[1]}={count}. {_HELP}"
        )
    if not is_address:
        raise UserError(
            f"hosts: {names[0]} must be HOST:PORT of process 0; got "
            f"{names[0]}={address}. {_HELP}"
        )
    return Place(address, int(count), int(index), source)


def join(signals: StopSignal, place: Place | None) -> None:
    """Join the processes of this run, before jax looks for devices.

    From here on they stop together: see `agreement`.

    Args:
        signals: entered; this process's own requests to stop.
        place: from `find`; None does nothing.

    Raises:
        PeerError: when the others cannot be reached in time.
    """
    if place is None:
        return
    # XLA's own handler would take SIGTERM away from `signals`, and knows no other.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Programs that wait in XLA's pool of CPU threads keep those from running that the
    # other processes wait for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    seconds = _timeout()
    failed: list[Exception] = []

    def connect():
        try:
            jax.distributed.initialize(
                coordinator_address=place.coordinator,
                num_processes=place.count,
                process_id=place.index,
                # Under SLURM jax would take one device of a process's many.
                cluster_detection_method=None if place.count is None else "deactivate",
                initialization_timeout=seconds,
            )
        except Exception as error:
            failed.append(error)

    # In a thread: signals reach Python only while its main thread runs Python.
    thread = threading.Thread(target=connect, name="join", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise PeerError(_could_not_join(place, seconds, failed[0])) from failed[0]
    signals.several = True
    agreement.begin(signals)


def _timeout() -> int:
    text = os.environ.get(TIMEOUT, "300")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"hosts: {TIMEOUT} must be seconds, at least 1; got {text!r}.")
    return int(text)


def _could_not_join(place: Place, seconds: int, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    if place.count is None:
        return f"hosts: jax found no cluster ({place.source}): {reason}"
    return (
        f"hosts: process {place.index} of {place.count} ({place.source}) could not "
        f"join the others at {place.coordinator} within {seconds} s: {reason}. See "
        f"that all {place.count} were started and that this address reaches process 0."
    )


def refuse_several(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError in a job of several processes that were not joined.

    Each would train the whole run by itself.
    """
    if jax.distributed.is_initialized():
        return
    place = find(environment)
    if place is not None:
        raise UserError(
            f"train: one of {place.count or 'several'} processes ({place.source}) must "
            "not train a run alone. Of several, only `python -m attnjax.train` joins "
            "the others: run it, or start one process."
        )


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """End this process at once on an error when it is one of several.

    Unwinding the interpreter would wait minutes for the others, which wait for this
    one in a collective.
    """
    try:
        yield
    except KeyboardInterrupt:
        if agreement.is_several():
            leave(cli.EXIT_INTERRUPTED)
        raise
    except Exception as error:
        if not agreement.is_several():
            raise
        code = cli.report(_of_a_peer(error) or error)
        agreement.gather(seconds=_LEAVE_SECONDS)
        if is_writer():
            # It serves the others: let them leave with their own code.
            time.sleep(0.5)
        leave(code)


def _of_a_peer(error: Exception) -> PeerError | None:
    """What a collective's error says when another process has gone."""
    text = " ".join(str(error).split())
    if not isinstance(error, jax.errors.JaxRuntimeError) or not _GONE.search(text):
        return None
    return PeerError(
        f"hosts: another process of this run has gone ({text[:160]}). Its own output "
        "says why. The same command again goes on from the last checkpoint."
    )


def host_rows(batch_size: int, place: jax.sharding.Sharding) -> slice | None:
    """The rows of a global batch that lie on this host's devices.

    Args:
        batch_size: B, rows of the global batch.
        place: of arrays [B, ...] on the mesh.

    Returns:
        None when this is the only host. Where devices of several hosts hold the same
        rows (an axis of the mesh that does not split the batch spans hosts), each of
        these hosts has them.
    """
    if jax.process_count() == 1:
        return None
    return _union(place.addressable_devices_indices_map((batch_size,)), batch_size)


def _union(indices: Mapping, batch_size: int) -> slice:
    """The rows of all devices, which must lie side by side."""
    starts = sorted({index[0].indices(batch_size)[:2] for index in indices.values()})
    for (_, stop), (start, _) in itertools.pairwise(starts):
        if start != stop:
            raise UserError(
                "config.mesh: the rows of one host must be neighbours; got rows "
                f"{', '.join(f'{a} to {b}' for a, b in starts)}. Let `data` come "
                "before `fsdp` over devices in their own order."
            )
    return slice(starts[0][0], starts[-1][1])


def is_writer() -> bool:
    """Whether this host writes metrics and summaries."""
    return jax.process_index() == 0


def on_this_host(tree):
    """A tree of arrays as this host's own, or None when some are split over hosts."""
    if jax.process_count() == 1:
        return tree
    if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return None
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)
