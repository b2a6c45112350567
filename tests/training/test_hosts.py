import jax
import pytest

from attnjax.core.errors import UserError
from attnjax.training import hosts, run


def test_one_of_several_processes_does_not_train_alone(monkeypatch, tmp_path):
    monkeypatch.setenv(hosts.NUM_PROCESSES, "4")
    with pytest.raises(UserError, match="one process must train a run; got JAX_NUM"):
        run.train({}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(hosts.NUM_PROCESSES, "1")
    hosts.refuse_several()
    monkeypatch.delenv(hosts.NUM_PROCESSES)
    hosts.refuse_several()


def test_rows_of_a_host_are_its_share_in_order(monkeypatch):
    assert hosts.host_rows(8) is None
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert hosts.host_rows(8) == slice(4, 6)
    assert not hosts.is_writer()
