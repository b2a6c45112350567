"""Initial values depend on the seed, the path and the layer alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from attnjax import nn
from attnjax.nn.parameter import nest, path_key, path_text

KEY = jax.random.key(3)


class Pair(nnx.Module):
    """Two maps, built in either order, with or without a third."""

    def __init__(self, order, *, rngs):
        for name in order:
            setattr(self, name, nn.Linear(5, 7, use_bias=True, rngs=rngs))


def built(order, seed=0):
    return Pair(order, rngs=nnx.Rngs(seed))


def same(a, b):
    return jax.tree.map(np.testing.assert_array_equal, a, b)


def test_values_do_not_depend_on_the_order_of_building():
    one = nn.materialize(built(["left", "right"]), KEY)
    other = nn.materialize(built(["right", "left"], seed=9), KEY)
    same(one, other)


def test_values_do_not_depend_on_other_parameters():
    one = nn.materialize(built(["left", "right"]), KEY)
    more = nn.materialize(built(["extra", "left", "right"]), KEY)
    assert set(more) - set(one) == {"extra"}
    same(one, {name: more[name] for name in one})


def test_paths_seeds_and_layers_give_different_values():
    values = nn.materialize(built(["left", "right"]), KEY)
    assert np.any(values["left"]["kernel"] != values["right"]["kernel"])
    other = nn.materialize(built(["left", "right"]), jax.random.key(4))
    assert np.any(values["left"]["kernel"] != other["left"]["kernel"])
    layers = [
        nn.materialize(built(["left"]), KEY, index=i)["left"]["kernel"]
        for i in range(3)
    ]
    assert np.any(layers[0] != layers[1]) and np.any(layers[1] != layers[2])
    assert np.any(layers[0] != values["left"]["kernel"])


def test_a_vmap_over_layers_gives_what_each_layer_gives():
    module = built(["left"])
    stacked = jax.jit(jax.vmap(lambda index: nn.materialize(module, KEY, index=index)))(
        jnp.arange(3)
    )
    for i in range(3):
        # The same random bits; a mapped program may round the last bit otherwise.
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6),
            stacked,
            nn.materialize(module, KEY, index=i),
        )


def test_values_follow_the_declared_initializer_shape_and_dtype():
    module = nn.Linear(101, 103, std=0.25, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel = nn.materialize(module, KEY)["kernel"]
    assert kernel.shape == (101, 103) and kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.std(kernel.astype(np.float32)), 0.25, rtol=0.03)
    norm = nn.materialize(nn.LayerNorm(7, rngs=nnx.Rngs(0)), KEY)
    same(norm, {"scale": np.ones(7), "bias": np.zeros(7)})


def test_a_parameter_of_a_foreign_module_keeps_its_value():
    foreign = nnx.Linear(3, 5, rngs=nnx.Rngs(1))
    values = nn.materialize(foreign, KEY)
    np.testing.assert_array_equal(values["kernel"], foreign.kernel[...])


def test_buffers_are_no_parameters():
    module = nnx.Module()
    module.mean = nn.buffer(jnp.zeros(3))
    module.weight = nn.param(nnx.Rngs(0), (3,), initializers.ones, dtype=jnp.float32)
    assert set(nn.materialize(module, KEY)) == {"weight"}
    assert set(nnx.to_pure_dict(nnx.state(module, nn.Buffer))) == {"mean"}


def test_paths_read_as_text_and_nest():
    assert path_text(("mixer", "query", 0)) == "mixer/query/0"
    tree = nest([(("a", "b"), 1), (("a", "c"), 2), (("d",), 3)])
    assert tree == {"a": {"b": 1, "c": 2}, "d": 3}


def test_keys_of_paths_are_fixed_for_all_time():
    """Checkpoints are compared across versions by their seeds: these bits stay."""
    data = jax.random.key_data(
        path_key(jax.random.key(0), ("mixer", "query", "kernel"))
    )
    again = jax.random.key_data(path_key(jax.random.key(0), ("mixer/query", "kernel")))
    np.testing.assert_array_equal(data, again)
    np.testing.assert_array_equal(data, FIXED)


FIXED = np.array([4002368133, 3830486914], np.uint32)
