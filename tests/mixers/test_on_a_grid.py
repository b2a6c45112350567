"""Mixers made for sequences, on the tokens of a grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.core import discovery, schema
from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.models.mixer_choice import Choice

T = 6
ROPE = nn.Rope(theta=7.0)
DIMS = MixerDims(embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, init_std=0.5)
OPTIONS = {
    "attention": {},
    "attention, its own": {"positions": "rope", "rope": {"theta": 3.0}},
    "mla": {"rope_dim": 4},
    "complexformer": {"euler": "polar"},
    "linear_attention": {"rotary": True},
}


def output(name, options, dims, *, grid=None):
    """y [T, C] of a bidirectional layer on one input."""
    module = discovery.find(name)
    config = schema.build(module.Config, schema.resolve(module.Config, options))
    mixer = Choice(name, module, config).make(dims, rngs=nnx.Rngs(0))
    graph, arrays = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(1), (1, T, 16))

    @jax.jit
    def call(arrays, x):
        places = jnp.arange(T, dtype=jnp.int32)[None]
        ctx = Context(positions=places, causal=False, grid=grid)
        return nnx.merge(graph, arrays)(x, ctx)[0]

    return np.asarray(call(arrays, x))[0]


def on(grid):
    """The dimensions of a model whose tokens lie on a grid."""
    rope = nn.rope_on_grid(ROPE, grid, 0)
    return dataclasses.replace(DIMS, grid=grid, rope=rope)


@pytest.mark.parametrize("case", OPTIONS)
def test_rotary_positions_are_those_of_the_grid(case):
    """A line is a sequence; two rows of three are neither that nor three of two."""
    name, options = case.split(",")[0], OPTIONS[case]
    sequence = output(name, options, dataclasses.replace(DIMS, rope=ROPE))
    line = output(name, options, on((T,)), grid=(T,))
    np.testing.assert_allclose(line, sequence, atol=1e-5)
    rows, columns = (output(name, options, on(g), grid=g) for g in ((2, 3), (3, 2)))
    assert np.abs(rows - sequence).max() > 1e-3
    assert np.abs(rows - columns).max() > 1e-3


def test_a_layer_with_rotary_positions_of_its_own_has_them_on_the_grid():
    options = {"positions": "rope", "rope": {"theta": 7.0}}
    dims = dataclasses.replace(on((2, 3)), rope=None)
    alone = output("attention", options, dims, grid=(2, 3))
    given = output("attention", {}, on((2, 3)), grid=(2, 3))
    np.testing.assert_allclose(alone, given, atol=1e-6)


def test_complexformer_refuses_a_head_that_the_axes_do_not_share():
    dims = dataclasses.replace(on((2, 3)), head_dim=6)
    with pytest.raises(UserError, match=r"grid=\(2, 3\); got head_dim=6. Make it a mu"):
        output("complexformer", {}, dims, grid=(2, 3))
