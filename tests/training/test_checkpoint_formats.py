"""Checkpoints of every released format stay readable."""

import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from attnjax.training.checkpoint_reader import FORMAT, CheckpointReader

GOLDEN = Path(__file__).parents[1] / "golden"


def made_with(number):
    path = GOLDEN / f"make_checkpoint_format_{number}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.state()


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_checkpoint_of_an_older_version_is_read_exactly(number, tmp_path):
    shutil.copytree(GOLDEN / f"checkpoint_format_{number}", tmp_path / "checkpoints")
    reader = CheckpointReader(tmp_path / "checkpoints")
    found = reader.latest()
    assert (found.step, found.metric) == (3, 1.5)
    assert found.meta == {"layout": {"names": ["attention"]}}
    expected = made_with(number)
    state, _ = reader.restore(3, jax.eval_shape(lambda: expected))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    tree, _ = reader.restore_numpy(3)
    np.testing.assert_array_equal(tree["a/b.c%"], [0, 1, 2])
    assert tree["opt"] == {"0": {"count": np.int32(5)}, "1": {}}
