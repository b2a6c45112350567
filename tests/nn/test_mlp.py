"""The MLP and its activations against their formulas in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.core.errors import UserError


def erf_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


FORMULAS = {
    "gelu": erf_gelu,
    "gelu_tanh": tanh_gelu,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": silu,
    "swiglu": silu,
    "geglu": tanh_gelu,
}


def build(activation, **options):
    return nn.MLP(
        5, 11, activation=activation, std=0.5, out_std=0.5, rngs=nnx.Rngs(2), **options
    )


def test_every_activation_has_a_formula():
    assert set(FORMULAS) == set(nn.ACTIVATIONS)


@pytest.mark.parametrize("activation", FORMULAS)
def test_mlp_equals_its_formula(activation):
    mlp = build(activation, use_bias=True)
    x = np.random.default_rng(0).normal(size=(2, 3, 5))

    def apply(part, x):
        return x @ np.asarray(part.kernel[...], np.float64) + np.asarray(part.bias[...])

    for number, part in enumerate((mlp.up, mlp.gate, mlp.down)):
        if part is not None:
            part.bias.set_value(jnp.full_like(part.bias[...], 0.1 + number))
    act = FORMULAS[activation]
    up = apply(mlp.up, x)
    hidden = act(up) if mlp.gate is None else act(apply(mlp.gate, x)) * up
    found = mlp(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, apply(mlp.down, hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_gated_activations_have_a_third_map(activation):
    assert build(activation).gate.kernel[...].shape == (5, 11)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "silu"])
def test_plain_activations_have_two_maps(activation):
    assert build(activation).gate is None


def test_mlp_keeps_its_dtypes():
    mlp = build("swiglu", dtype=jnp.bfloat16)
    assert mlp.up.kernel[...].dtype == jnp.float32
    assert mlp(jnp.ones((2, 3, 5))).dtype == jnp.bfloat16


def test_only_the_last_map_takes_out_std():
    mlp = nn.MLP(101, 103, std=0.5, out_std=0.01, rngs=nnx.Rngs(2))
    for part, std in ((mlp.up, 0.5), (mlp.gate, 0.5), (mlp.down, 0.01)):
        np.testing.assert_allclose(np.std(part.kernel[...]), std, rtol=0.03)


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises(UserError, match=r"activation 'swigly'.*Did you mean swiglu"):
        build("swigly")
