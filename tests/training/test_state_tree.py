import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnjax.training import state_tree


def test_optimizer_states_are_named_by_field_and_place():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    names = state_tree.named({"opt": optimizer.init({"w": jnp.zeros(3)})})
    assert set(names) == {"opt/1/0/count", "opt/1/0/mu/w", "opt/1/0/nu/w"}


def test_odd_keys_keep_apart_and_come_back():
    tree = {"a/b": {"c.d": 1}, "a": {"b": {"c": {"d": 2}}}, "100%": 3, "%2F": 4}
    names = state_tree.named(tree)
    assert len(names) == 4
    assert state_tree.unescaped(state_tree.nest(names)) == tree


def test_leaves_go_back_into_named_tuples():
    optimizer = optax.adamw(1e-3)
    state = optimizer.init({"w": jnp.arange(3.0), "b": {}})
    again = state_tree.like(jax.eval_shape(lambda: state), state_tree.named(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_empty_dicts_are_found():
    assert state_tree.empties({"a": {}, "b": {"c": {}, "d": 1}}) == ["a", "b/c"]


def test_differences_name_what_is_missing_unexpected_and_changed():
    saved = {"a": [[2], "float32"], "b": [[3], "float32"], "c": [[], "int32"]}
    wanted = {"b": [[5], "float32"], "c": [[], "int32"], "d": [[1], "bool"]}
    assert state_tree.differences(saved, wanted) == [
        "- a [2] float32",
        "- b [3] float32",
        "+ b [5] float32",
        "+ d [1] bool",
    ]


def test_leaves_that_are_not_arrays_are_refused_by_name():
    with pytest.raises(TypeError, match="every leaf must be an array; got a/b=int"):
        state_tree.check(state_tree.named({"a": {"b": 3}}))
    with pytest.raises(TypeError, match="typed PRNG keys are not stored; got k="):
        state_tree.check({"k": jax.random.key(0)})
    state_tree.check({"x": np.zeros(2), "y": jnp.zeros(2)})
