import errno
import json
import os
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.core.errors import UserError
from attnjax.training import checkpoints, digests
from attnjax.training.checkpoints import Checkpointer, CheckpointReader


def make_state(value=0.0):
    params = {"kernel": jnp.full((3, 5), float(value)), "norm": {"scale": jnp.ones(7)}}
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "buffers": {},
        "half": jnp.full((5,), value, jnp.bfloat16),
        "none": jnp.zeros((0, 3)),
        "step": jnp.int32(value),
        "flag": jnp.array(True),
    }


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saver(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as made:
        yield made


def save(saver, *steps, **options):
    for step in steps:
        assert saver.save(step, make_state(step), {"run": "x"}, **options)
    saver.wait()


def flip(path, place=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_state_and_meta_come_back_exactly(saver):
    save(saver, 3)
    found = saver.latest()
    assert (found.step, found.meta, found.skipped) == (3, {"run": "x"}, ())
    state, meta = saver.restore(3, jax.eval_shape(make_state))
    assert_same(state, make_state(3))
    assert meta == {"run": "x"}


def test_a_reader_without_devices_gets_numpy(saver):
    save(saver, 3)
    tree, _ = CheckpointReader(saver.directory).restore_numpy(3)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(tree))
    assert tree["half"].dtype == jnp.bfloat16
    assert tree["buffers"] == {}
    assert tree["none"].shape == (0, 3)
    np.testing.assert_array_equal(tree["opt"]["0"]["mu"]["kernel"], np.zeros((3, 5)))


def test_groups_can_be_read_alone(saver):
    save(saver, 3)
    tree, _ = saver.restore_numpy(3, only=("params", "buffers"))
    assert set(tree) == {"params", "buffers"}
    with pytest.raises(UserError, match="no group 'ema'. Known: .*params"):
        saver.restore_numpy(3, only=("ema",))


def test_nothing_saved_is_none_and_makes_no_directory(saver):
    assert saver.latest() is None
    assert not saver.directory.exists()


@pytest.mark.parametrize("source", [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("target", [(2, 4), (1, 1)])
def test_a_save_under_one_mesh_restores_under_another(saver, source, target):
    def place(sizes):
        mesh = jax.make_mesh(sizes, ("data", "tensor"))
        return NamedSharding(mesh, P("data", "tensor"))

    values = jnp.arange(256.0).reshape(16, 16)
    saver.save(1, {"w": jax.device_put(values, place(source))}, {})
    saver.wait()
    wanted = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=place(target))
    state, _ = saver.restore(1, {"w": wanted})
    assert state["w"].sharding == place(target)
    np.testing.assert_array_equal(state["w"], values)
    alone, _ = saver.restore_numpy(1)
    np.testing.assert_array_equal(alone["w"], values)


def test_state_may_be_donated_as_soon_as_save_returns(saver):
    advance = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {str(i): jnp.full((257, 263), 7.0) for i in range(11)}
    saver.save(1, state, {})
    for _ in range(5):
        state = advance(state)
    saver.wait()
    tree, _ = saver.restore_numpy(1)
    assert all((x == 7.0).all() for x in tree.values())


def test_host_arrays_may_change_as_soon_as_save_returns(saver):
    array = np.zeros((1001, 101), np.float32)
    saver.save(1, {"a": array}, {})
    array += 1
    saver.wait()
    assert (saver.restore_numpy(1)[0]["a"] == 0).all()


def test_saving_a_step_again_changes_nothing(saver):
    save(saver, 3)
    before = (saver.path(3) / digests.NAME).read_bytes()
    assert saver.save(3, make_state(9), {}) is False
    saver.wait()
    assert (saver.path(3) / digests.NAME).read_bytes() == before
    with Checkpointer(saver.directory) as other:
        assert other.save(3, make_state(9), {}) is False


def test_a_damaged_step_is_saved_anew(saver):
    save(saver, 2, 3)
    flip(saver.path(3) / "meta.json")
    with Checkpointer(saver.directory) as other:
        assert other.latest().step == 2
        assert other.save(3, make_state(8), {})
        other.wait()
        assert other.latest().step == 3
        assert int(other.restore_numpy(3)[0]["step"]) == 8
    assert names(saver.directory) == ["2", "3"]


def test_the_newest_intact_step_is_used_and_the_skipped_one_named(saver):
    save(saver, 2, 3)
    flip(saver.path(3) / "meta.json")
    found = CheckpointReader(saver.directory).latest()
    assert found.step == 2
    assert found.skipped == ((3, "meta.json: content changed (sha256 differs)"),)


@pytest.mark.parametrize("damage", ["empty step", "no digests", "empty digests"])
def test_no_intact_checkpoint_refuses_to_start(saver, damage):
    save(saver, 2, 3)
    for step in (2, 3):
        if damage == "empty step":
            shutil.rmtree(saver.path(step))
            saver.path(step).mkdir()
        elif damage == "no digests":
            (saver.path(step) / digests.NAME).unlink()
        else:
            (saver.path(step) / digests.NAME).write_bytes(b"")
    with (
        Checkpointer(saver.directory) as other,
        pytest.raises(UserError, match="refuses to start") as caught,
    ):
        other.latest()
    assert "step 3: digests.json" in str(caught.value)
    assert "step 2: digests.json" in str(caught.value)
    assert "choose another --workdir" in str(caught.value)


def test_a_reason_lists_a_few_files_and_counts_the_rest(saver):
    save(saver, 2)
    shutil.rmtree(saver.path(2) / "state")
    with pytest.raises(UserError, match=r"missing; .*and \d+ more"):
        saver.latest()


def test_damage_after_verification_of_another_process_is_seen_at_restore(saver):
    save(saver, 3)
    reader = CheckpointReader(saver.directory)
    flip(saver.path(3) / "meta.json", place=5)
    with pytest.raises(UserError, match="damaged: meta.json: content changed"):
        reader.restore_numpy(3)


def test_a_step_that_was_never_saved_is_refused_with_those_that_were(saver):
    save(saver, 2, 3)
    with pytest.raises(UserError, match=r"no step 4 in .* Saved steps: 2, 3"):
        saver.restore(4, jax.eval_shape(make_state))
    assert saver.verify(4) == ["4: missing"]


def test_other_arrays_than_saved_are_refused_with_the_difference(saver):
    save(saver, 3)
    wanted = jax.eval_shape(make_state)
    wanted["params"]["kernel"] = jax.ShapeDtypeStruct((3, 7), jnp.float32)
    wanted["extra"] = jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(UserError, match="not those of this config") as caught:
        saver.restore(3, wanted)
    assert "- params/kernel [3, 5] float32\n+ params/kernel [3, 7]" in str(caught.value)
    assert "+ extra [] int32" in str(caught.value)


def test_another_dtype_is_refused_rather_than_cast(saver):
    save(saver, 3)
    wanted = jax.eval_shape(make_state)
    wanted["half"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    with pytest.raises(UserError, match=r"\+ half \[5\] float32"):
        saver.restore(3, wanted)


def test_a_newer_format_is_refused_by_name_even_with_an_older_one_there(
    saver, monkeypatch
):
    save(saver, 2)
    monkeypatch.setattr(checkpoints, "FORMAT", 7)
    save(saver, 3)
    with pytest.raises(UserError, match=r"written in format 7 by attnjax .*Update"):
        CheckpointReader(saver.directory).latest()


def test_the_last_ones_are_kept(saver):
    save(saver, 1, 2, 3, 4)
    assert names(saver.directory) == ["3", "4"]


def test_the_best_and_the_regular_ones_are_kept_beside_the_last(tmp_path):
    with Checkpointer(tmp_path, keep_last=1, keep_best=2, keep_every=4) as saver:
        for step, metric in enumerate([5, 1, float("nan"), 9, 2, None, 8, 7, 6]):
            saver.save(step, make_state(step), {}, metric=metric)
        saver.wait()
        assert saver.steps() == [0, 1, 4, 8]
        assert saver.latest().metric == 6
    # Another process ranks by what is on the disk.
    with Checkpointer(tmp_path, keep_last=1, keep_best=1) as saver:
        saver.save(9, make_state(9), {}, metric=3)
        saver.wait()
        assert saver.steps() == [1, 9]


def test_a_damaged_one_does_not_count_among_the_kept(saver):
    save(saver, 1, 2)
    flip(saver.path(2) / "meta.json")
    with Checkpointer(saver.directory) as other:
        assert other.latest().step == 1
        other.save(3, make_state(3), {})
        other.wait()
        assert other.steps() == [1, 3]


def test_the_previous_one_stays_until_the_new_one_is_sealed(saver, monkeypatch):
    save(saver, 1, 2)

    def fails(_):
        assert saver.steps() == [1, 2]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digests, "write", fails)
    saver.save(3, make_state(3), {})
    with pytest.raises(UserError, match=r"^checkpoints: .*no space left"):
        saver.wait()
    assert saver.latest().step == 2


def test_a_failure_in_the_background_is_raised_by_the_next_save(saver, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(digests, "write", lambda _: 1 / 0)
        saver.save(3, make_state(3), {})
        with pytest.raises(ZeroDivisionError):
            saver.save(4, make_state(4), {})
    save(saver, 5)
    assert saver.latest().step == 5


def test_a_disk_without_room_is_refused_before_anything_is_written(saver, monkeypatch):
    save(saver, 1)
    usage = types.SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"no space left .*step 2 takes 0\.0 MB"):
        saver.save(2, make_state(2), {})
    assert names(saver.directory) == ["1"]


def test_a_read_only_disk_is_one_line(saver, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "x")

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(UserError, match=r"^checkpoints: 'x': the file system is read"):
        saver.save(1, make_state(), {})


def test_torn_saves_are_cleared_and_named(saver):
    save(saver, 1)
    torn = saver.directory / "2.saving" / "state.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    (saver.directory / "0.deleting").mkdir()
    (saver.directory / "mine").mkdir()
    (saver.directory / "mine.saving").mkdir()
    (saver.directory / "notes.txt").write_text("keep")
    CheckpointReader(saver.directory).latest()
    assert torn.exists()
    assert saver.latest().step == 1
    assert saver.cleared == ("2.saving",)
    assert names(saver.directory) == ["1", "mine", "mine.saving", "notes.txt"]


def test_a_first_save_that_was_torn_is_no_checkpoint(saver):
    (saver.directory / "5.saving" / "state").mkdir(parents=True)
    assert saver.latest() is None
    assert saver.cleared == ("5.saving",)
    save(saver, 5)
    assert saver.latest().step == 5


def test_torn_saves_stay_when_nothing_else_can_be_read(saver):
    save(saver, 1)
    flip(saver.path(1) / "meta.json")
    (saver.directory / "2.saving").mkdir()
    with pytest.raises(UserError, match="refuses to start"):
        saver.latest()
    assert (saver.directory / "2.saving").exists()


def test_every_change_of_any_file_of_a_checkpoint_is_seen(saver):
    save(saver, 3)
    files = sorted(p for p in saver.path(3).rglob("*") if p.is_file())
    assert len(files) > 6
    for path in files:
        whole = path.read_bytes()
        last = len(whole) - 1
        for place in sorted({0, last // 3, last // 2, last} & set(range(len(whole)))):
            flip(path, place)
            assert saver.verify(3), (path, place)
            path.write_bytes(whole)
        for length in {0, len(whole) // 2, last} & set(range(len(whole))):
            path.write_bytes(whole[:length])
            assert saver.verify(3), (path, length)
        path.unlink()
        assert saver.verify(3), path
        path.write_bytes(whole)
    assert saver.verify(3) == []


def test_meta_must_be_json(saver):
    with pytest.raises(ValueError, match="JSON"):
        saver.save(1, make_state(), {"loss": float("nan")})
    with pytest.raises(TypeError, match="JSON"):
        saver.save(1, make_state(), {"x": object()})
    assert saver.latest() is None


@pytest.mark.parametrize("option", ["keep_last", "keep_every"])
def test_keeping_nothing_is_refused(tmp_path, option):
    with pytest.raises(UserError, match=f"{option}=0"):
        Checkpointer(tmp_path, **{option: 0})


def test_shapes_are_known_without_reading_arrays(saver):
    save(saver, 3)
    assert saver.signature(3)["params/kernel"] == [[3, 5], "float32"]
    assert saver.meta(3) == {"run": "x"}
    content = json.loads((saver.path(3) / "meta.json").read_text())
    assert content["step"] == 3


def test_a_small_models_state_is_saved_quickly(saver):
    state = {str(i): jnp.ones((3, 1000, 1000)) for i in range(3)}  # 36 MB
    save(saver, 1)  # the first save also loads Orbax
    taken = []
    for step in (2, 3, 4):
        begin = time.perf_counter()
        saver.save(step, state, {})
        saver.wait()
        taken.append(time.perf_counter() - begin)
    # 0.2 s on two idle cores; the bound leaves room for busy ones.
    assert min(taken) < 1.5, taken
