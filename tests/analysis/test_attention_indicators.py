"""The five indicators of attention maps against closed forms."""

import math

import jax
import numpy as np
import pytest

from attnjax.analysis import attention_indicators as analysis
from attnjax.core.errors import UserError
from attnjax.models import lm

T = 5


def uniform():
    rows = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    return np.broadcast_to(rows, (2, 3, T, T)).astype(np.float32)


def test_a_uniform_map_has_the_entropy_of_its_prefix():
    found = analysis.indicators(uniform())
    sizes = np.arange(1, T + 1)
    assert found["entropy"] == pytest.approx(np.log(sizes).mean(), rel=1e-5)
    assert found["concentration"] == pytest.approx(math.sqrt((1 / sizes).sum()))
    assert found["head_diversity"] == pytest.approx(0, abs=1e-6)
    assert found["sink"] == pytest.approx((1 / sizes).mean())
    assert found["local_focus_0"] == pytest.approx((1 / sizes).mean())
    assert found["local_focus_2"] == pytest.approx((1 / sizes[2:]).mean())


def test_maps_of_one_entry_are_concentrated_and_local():
    own = np.broadcast_to(np.eye(T, dtype=np.float32), (1, 2, T, T))
    found = analysis.indicators(own)
    assert found["entropy"] == 0 and found["local_focus_0"] == 1
    assert found["concentration"] == pytest.approx(math.sqrt(T))
    assert found["local_focus_1"] == 0
    first = np.zeros((1, 2, T, T), np.float32)
    first[..., 0] = 1
    assert analysis.indicators(first)["sink"] == 1


def test_head_diversity_is_the_deviation_over_heads_of_visible_entries():
    maps = np.zeros((1, 2, T, T), np.float32)
    maps[0, 0, 3, 1] = 1.0
    found = analysis.indicators(maps)["head_diversity"]
    assert found == pytest.approx(0.5 * 2 / (T * (T + 1)))


def test_a_short_map_has_fewer_diagonals():
    found = analysis.indicators(np.ones((1, 1, 2, 2), np.float32))
    assert {n for n in found if "local" in n} == {"local_focus_0", "local_focus_1"}


def test_indicators_are_brought_to_the_unit_interval_over_layers():
    table = {0: {"a": 2.0, "b": 1.0}, 1: {"a": 4.0, "b": 1.0}, 2: {"a": 3.0}}
    assert analysis.normalised(table) == {
        0: {"a": 0.0, "b": 0.0},
        1: {"a": 1.0, "b": 0.0},
        2: {"a": 0.5},
    }


def test_every_layer_with_a_map_has_indicators():
    variants = {
        name: {"type": "deconstructing_attention", "variant": name}
        for name in ("non_approximate", "mlp")
    }
    config = lm.Config(
        layers=("attention", "non_approximate", "mlp"),
        num_layers=None,
        embed_dim=8,
        num_heads=2,
        mlp_dim=8,
        max_len=8,
        mixers=variants,
    )
    model = lm.LM(config, vocab_size=5)
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda a: rng.normal(size=a.shape, scale=0.02).astype(a.dtype),
        jax.eval_shape(model.init, 0),
    )
    tokens = np.asarray([[1, 2, 3, 4, 0]], np.int32)
    found = analysis.by_layer(model, *arrays, tokens, layers=(0, 1))
    assert set(found) == {0, 1} and found[0]["entropy"] > 0
    # Small weights at the start: nearly uniform.
    assert found[1]["entropy"] == pytest.approx(
        np.log(np.arange(1, 6)).mean(), abs=0.01
    )
    with pytest.raises(UserError, match="unknown hook 'weights'"):
        analysis.by_layer(model, *arrays, tokens)
    assert jax.tree.all(jax.tree.map(np.isfinite, found))
