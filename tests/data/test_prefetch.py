import gc
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data.prefetch import Prefetch, dispatches, to_devices


def build(step):
    return {"tokens": np.full((2, 3), step, np.int32)}


def threads():
    return [t for t in threading.enumerate() if t.name == "attnjax-prefetch"]


@pytest.mark.parametrize(
    ("start", "stop", "per", "expected"),
    [
        (0, 6, 3, [(0, 3), (3, 3)]),
        (0, 7, 3, [(0, 3), (3, 3), (6, 1)]),
        (4, 9, 3, [(4, 2), (6, 3)]),
        (5, 5, 3, []),
        (2, 4, 1, [(2, 1), (3, 1)]),
    ],
)
def test_dispatches_end_at_multiples_wherever_they_start(start, stop, per, expected):
    assert list(dispatches(start, stop, steps_per_dispatch=per)) == expected


def test_steps_arrive_in_order_stacked_and_on_the_device():
    with Prefetch(build, dispatches(1, 6, steps_per_dispatch=2)) as batches:
        got = list(batches)
    assert [(item.step, item.count) for item in got] == [(1, 1), (2, 2), (4, 2)]
    assert all(isinstance(item.batch["tokens"], jax.Array) for item in got)
    assert got[1].batch["tokens"].shape == (2, 2, 3)
    assert got[1].batch["tokens"][:, 0, 0].tolist() == [2, 3]


def test_restarting_at_a_step_continues_the_sequence():
    with Prefetch(build, dispatches(0, 9), put=lambda batch: batch) as whole:
        late = [item.batch["tokens"].tolist() for item in whole][5:]
    with Prefetch(build, dispatches(5, 9), put=lambda batch: batch) as resumed:
        assert [item.batch["tokens"].tolist() for item in resumed] == late


def test_batches_are_built_ahead_but_not_without_bound():
    built = []

    def slow(step):
        built.append(step)
        return build(step)

    with Prefetch(slow, dispatches(0, 100), depth=2) as batches:
        deadline = time.monotonic() + 300
        while len(built) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(built) == 3  # two ready and one that waits for room
        next(batches)
        while len(built) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(built) == 4


def test_a_sharding_is_applied():
    mesh = jax.make_mesh((1,), ("data",))
    spec = jax.sharding.PartitionSpec(None, "data")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    with Prefetch(build, dispatches(0, 1), sharding=sharding) as batches:
        assert next(batches).batch["tokens"].sharding == sharding


def test_without_sharding_arrays_go_to_the_default_device():
    placed = to_devices(build(4), None)["tokens"]
    assert placed.devices() == {jax.devices()[0]} and placed[0, 0] == 4


def test_an_error_of_the_thread_reaches_the_reader_as_it_is():
    def fails(step):
        if step == 2:
            raise UserError("data: no more; got step=2.")
        return build(step)

    with Prefetch(fails, dispatches(0, 5)) as batches:
        assert [next(batches).step, next(batches).step] == [0, 1]
        for _ in range(2):
            with pytest.raises(UserError, match="no more; got step=2"):
                next(batches)


def test_the_end_stays_the_end():
    with Prefetch(build, dispatches(0, 1)) as batches:
        assert len(list(batches)) == 1
        assert list(batches) == []


def test_closing_stops_the_thread_whether_or_not_it_was_read():
    batches = Prefetch(build, dispatches(0, 10**9), depth=1)
    next(batches)
    assert threads()
    batches.close()
    batches.close()
    assert not threads()
    assert list(batches) == []


def test_an_abandoned_iterator_stops_its_thread():
    batches = Prefetch(build, dispatches(0, 10**9))
    next(batches)
    del batches
    gc.collect()
    assert not threads()


def test_python_ends_with_an_iterator_left_open():
    program = (
        "import numpy as np\n"
        "from attnjax.data.prefetch import Prefetch, dispatches\n"
        "build = lambda step: {'x': np.zeros((2, 2))}\n"
        "batches = Prefetch(build, dispatches(0, 10**9))\n"
        "next(batches)\n"
        "print('read')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


def test_put_and_sharding_exclude_each_other():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="put and sharding exclude each other"):
        Prefetch(build, [], put=lambda batch: batch, sharding=sharding)


def test_an_empty_queue_is_refused():
    with pytest.raises(ValueError, match="depth must be at least 1; got depth=0"):
        Prefetch(build, [], depth=0)
