"""MBConv against plain numpy, its parameters and its refusals."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn

B, SIDE, IN, DIM = 3, 4, 5, 7
EPS, MOMENTUM = 0.3, 0.25  # of norms, away from the defaults


def made(in_dim=IN, dim=DIM, *, dtype="float64", **options):
    """A module whose parameters and buffers are away from their constant starts."""
    told = {key: options.pop(key) for key in ("stride", "use_bias") if key in options}
    module = nn.MBConv(
        in_dim,
        dim,
        config=nn.MBConvConfig(**options),
        dtype=dtype,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
        **told,
    )
    rng = np.random.default_rng(0)
    graph, params, buffers = nnx.split(module, nnx.Param, nn.Buffer)

    def one(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    params = jax.tree.map(one, params)
    buffers = jax.tree.map(lambda leaf: jnp.exp(0.3 * one(leaf)), buffers)
    return nnx.merge(graph, params, buffers)


def normed(x, p, running, *, train):
    axes = tuple(range(x.ndim - 1))
    mean, variance = (x.mean(axes), x.var(axes)) if train else running
    return (x - mean) / np.sqrt(variance + EPS) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(module, x, *, train, stride):
    """The description in float64, [B, H, W, I] -> [B, H / stride, ..., C]."""
    p, b = (
        nnx.to_pure_dict(nnx.state(module, kind)) for kind in (nnx.Param, nn.Buffer)
    )
    p, b = jax.tree.map(np.asarray, (p, b))

    def norm(name, x):
        running = (b[name]["mean"], b[name]["variance"])
        return normed(x, p[name], running, train=train)

    y = gelu(norm("norm_expanded", norm("norm_in", x) @ p["expand"]["kernel"]))
    # Zeros on both sides, or below and to the right where every second place is taken.
    before = 1 if stride == 1 else 0
    outer = np.pad(y, ((0, 0), (before, 1), (before, 1), (0, 0)))
    kernel = p["depthwise"]["conv_kernel"].reshape(3, 3, -1)
    count = x.shape[1] // stride
    y = np.zeros((len(x), count, count, y.shape[-1]))
    for i, j in np.ndindex(count, count):
        rows, columns = (slice(n * stride, n * stride + 3) for n in (i, j))
        y[:, i, j] = np.einsum("bijc,ijc->bc", outer[:, rows, columns], kernel)
    y = gelu(norm("norm_convolved", y))
    s = y.mean((1, 2)) @ p["squeeze"]["kernel"] + p["squeeze"]["bias"]
    s = (s * sigmoid(s)) @ p["excite"]["kernel"] + p["excite"]["bias"]
    y = y * sigmoid(s)[:, None, None]
    y = y @ p["project"]["kernel"] + p["project"]["bias"]
    x = x.reshape(len(x), count, stride, count, stride, -1).mean((2, 4))
    if "shortcut" in p:
        x = x @ p["shortcut"]["kernel"] + p["shortcut"]["bias"]
    return x + y


@pytest.mark.parametrize(("stride", "train"), [(1, True), (2, False)])
def test_it_is_its_description(stride, train):
    """At stride 1 with equal widths, at stride 2 with others."""
    with jax.enable_x64(True):
        in_dim = DIM if stride == 1 else IN
        norms = dict(norm_eps=EPS, norm_momentum=MOMENTUM)
        module = made(in_dim, stride=stride, expansion=3, squeeze=0.5, **norms)
        x = np.random.default_rng(1).normal(size=(B, SIDE, SIDE, in_dim))
        wanted = by_hand(module, x, train=train, stride=stride)
        graph, params, buffers = nnx.split(module, nnx.Param, nn.Buffer)

        @jax.jit
        def run(params, buffers, x):
            own = nnx.merge(graph, params, buffers)
            return own(x, train=train), nnx.state(own, nn.Buffer)

        out, after = run(params, buffers, x)
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, wanted, rtol=1e-9, atol=1e-9)
        before, after = (nnx.to_pure_dict(b) for b in (buffers, after))
        if not train:
            jax.tree.map(np.testing.assert_array_equal, after, before)
            return
        # The first norm reads x itself: its means move by a quarter of the way.
        first = np.asarray(before["norm_in"]["mean"])
        moved = first + MOMENTUM * (x.mean((0, 1, 2)) - first)
        np.testing.assert_allclose(after["norm_in"]["mean"], moved, rtol=1e-9)
        same = jax.tree.map(lambda a, b: bool(np.any(a == b)), before, after)
        assert not any(jax.tree.leaves(same))


@pytest.mark.parametrize(("in_dim", "has_shortcut"), [(8, False), (6, True)])
def test_parameters_are_those_of_the_closed_form(in_dim, has_shortcut):
    """Width 8: E = 4 x 8, S = 8 / 4."""
    module = nnx.eval_shape(
        lambda: nn.MBConv(in_dim, 8, config=nn.MBConvConfig(), rngs=nnx.Rngs(0))
    )
    wide, squeezed = 32, 2
    wanted = 2 * in_dim + in_dim * wide + 2 * wide + 9 * wide + 2 * wide
    wanted += wide * squeezed + squeezed + squeezed * wide + wide + wide * 8 + 8
    wanted += (in_dim * 8 + 8) * has_shortcut
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == wanted
    products = 16 * (in_dim * wide + 9 * wide + wide * 8 + in_dim * 8 * has_shortcut)
    assert module.flops(16) == 2 * (products + 2 * wide * squeezed)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"squeeze": 1.5}, "squeeze must be in (0, 1]; got 1.5."),
        ({"expansion": 0}, "expansion must be at least 1; got 0."),
        ({"every": 0}, "every must be at least 1, or none; got 0."),
        ({"norm_eps": 0.0}, "norm_eps must be positive; got 0.0."),
        ({"norm_momentum": 0.0}, "norm_momentum must be in (0, 1]; got 0.0."),
    ],
)
def test_settings_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        nn.MBConvConfig(**option)


def test_a_squeeze_to_nothing_is_refused():
    with pytest.raises(ValueError, match=r"squeeze must leave at least one channel"):
        nn.MBConvConfig(squeeze=0.1).widths(9)
    assert nn.MBConvConfig(squeeze=0.1).widths(10) == (40, 1)
