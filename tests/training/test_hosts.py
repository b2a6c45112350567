from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.core import cli
from attnjax.core.errors import EXIT_FAULT, PeerError, UserError
from attnjax.training import hosts, run

JAX = {
    hosts.COORDINATOR: "first:1234",
    hosts.NUM_PROCESSES: "4",
    hosts.PROCESS_ID: "3",
}
SLURM = {
    "SLURM_STEP_NODELIST": "node[07-09,12]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_JOB_ID": "4099",
}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "slice0:8080",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (JAX, ("first:1234", 4, 3)),
        (SLURM, ("node07:61443", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "login1,b2"}, ("login1:61443", 4, 2)),
        (TPU, ("a:8476", 2, 1)),
        (TPU | SLICES, ("slice0:8476", 6, 5)),
        ({hosts.HOSTS: "auto"}, (None, None, None)),
        # What the launcher says comes before what the cluster says.
        (JAX | SLURM, ("first:1234", 4, 3)),
    ],
)
def test_a_process_finds_its_place(environment, expected):
    place = hosts.find(environment)
    assert (place.coordinator, place.count, place.index) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {hosts.NUM_PROCESSES: "1"},
        # A batch script has no step yet; its one process is alone.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    ],
)
def test_a_process_that_is_alone_has_no_place(environment):
    assert hosts.find(environment) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({hosts.NUM_PROCESSES: "4"}, "go together; got no JAX_COORDINATOR_ADDRESS, "),
        (JAX | {hosts.PROCESS_ID: "4"}, r"must be in \[0, JAX_NUM_PROCESSES\); got "),
        (JAX | {hosts.PROCESS_ID: "x"}, "got JAX_PROCESS_ID=x, JAX_NUM_PROCESSES=4"),
        (JAX | {hosts.COORDINATOR: "first"}, "must be HOST:PORT of process 0; got"),
        (TPU | {"TPU_WORKER_ID": "one"}, "must be numbers; got 'one', '1', '0'"),
        ({hosts.HOSTS: "yes"}, "must be auto or unset; got ATTNJAX_HOSTS=yes"),
    ],
)
def test_half_a_place_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        hosts.find(environment)


def test_seconds_to_join_in_must_be_a_number(monkeypatch):
    monkeypatch.setenv(hosts.TIMEOUT, "soon")
    signals = SimpleNamespace(several=False)
    with pytest.raises(UserError, match="must be seconds, at least 1; got 'soon'"):
        hosts.join(signals, hosts.find(JAX))


def test_a_process_that_is_missing_is_no_mistake(monkeypatch):
    def never(**options):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out")

    monkeypatch.setattr(jax.distributed, "initialize", never)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setenv(hosts.TIMEOUT, "7")
    signals = SimpleNamespace(several=False)
    with pytest.raises(
        PeerError, match="process 3 of 4 .* within 7 s: DEADLINE"
    ) as got:
        hosts.join(signals, hosts.find(JAX))
    assert cli.report(got.value) == EXIT_FAULT
    assert not signals.several


def test_errors_of_collectives_name_a_lost_process():
    lost = jax.errors.JaxRuntimeError("INTERNAL: Gloo AllReduce failed: closed by peer")
    assert "another process of this run has gone" in str(hosts._of_a_peer(lost))
    assert hosts._of_a_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")) is None
    assert hosts._of_a_peer(ValueError("gloo")) is None


def test_one_of_several_processes_does_not_train_alone(monkeypatch, tmp_path):
    for name, value in JAX.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"one of 4 processes \(JAX_\*\) must not"):
        run.train({}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    hosts.refuse_several({})


def test_rows_of_a_host_are_those_of_its_devices():
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    assert hosts.host_rows(8, NamedSharding(mesh, P("data"))) is None
    halves = {"d0": (slice(4, 6),), "d1": (slice(6, 8),), "d2": (slice(6, 8),)}
    assert hosts._union(halves, 8) == slice(4, 8)
    assert hosts._union({"d0": (slice(None),)}, 8) == slice(0, 8)


def test_rows_of_a_host_must_be_neighbours():
    apart = {"d0": (slice(0, 2),), "d1": (slice(4, 6),)}
    with pytest.raises(UserError, match="neighbours; got rows 0 to 2, 4 to 6"):
        hosts._union(apart, 8)


def test_a_tree_on_one_host_is_itself():
    tree = {"a": jax.numpy.ones(3)}
    assert hosts.on_this_host(tree) is tree
    assert hosts.is_writer()
