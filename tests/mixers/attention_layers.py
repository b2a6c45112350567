"""Layers of softmax attention, contexts and calls for the tests of this folder."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.conformance.subject import jitted
from attnjax.core.context import Context
from attnjax.core.spec import MixerDims
from attnjax.mixers import attention

B, T, C, H, K, D = 2, 13, 20, 6, 3, 4
DIMS = MixerDims(embed_dim=C, num_heads=H, num_kv_heads=K, head_dim=D, init_std=0.4)
ROPE = dataclasses.replace(DIMS, rope=nn.Rope(theta=30.0), qk_norm=True)
# Padding in front, between documents and at the end.
SEGMENTS = np.array(
    [[1, 1, 1, 1, 0, 2, 2, 2, 3, 3, 3, 0, 0], [0, 0, 7, 7, 7, 7, 2, 2, 2, 2, 2, 0, 4]],
    np.int32,
)
# Inside documents too.
BROKEN = np.array(
    [[1, 1, 1, 0, 1, 2, 2, 2, 3, 3, 3, 0, 0], [0, 0, 7, 7, 7, 7, 2, 2, 2, 0, 2, 2, 4]],
    np.int32,
)
LAYERS = {
    "plain": ({}, DIMS),
    "rope": ({}, ROPE),
    "multi-query": ({"num_kv_heads": 1, "value_head_dim": 5}, DIMS),
    "alibi": ({"positions": "alibi", "soft_cap": 2.0}, DIMS),
    "window": ({"window": 4, "weight_map": "off_by_one"}, ROPE),
    "window and sinks": ({"window": 3, "sinks": 2, "weight_map": "sink_logit"}, ROPE),
    "biases": ({"qkv_bias": True, "out_bias": True, "scale": 0.3}, DIMS),
}
all_layers = pytest.mark.parametrize(
    ("options", "dims"), LAYERS.values(), ids=LAYERS.keys()
)


def place(segments):
    """Positions of each token in its document, padding not counted."""
    positions = np.zeros_like(segments)
    for row, ids in enumerate(segments):
        for token, own in enumerate(ids):
            positions[row, token] = np.sum(ids[:token] == own) if own else 0
    return positions


def make(options=(), dims=DIMS, seed=0):
    mixer = attention.Mixer(
        attention.Config(**dict(options)), dims, rngs=nnx.Rngs(seed)
    )
    if mixer.sink is not None:
        mixer.sink[...] = jnp.linspace(-1.0, 1.0, len(mixer.sink[...]))
    return mixer


def inputs(seed=1, length=T, batch=B):
    values = np.random.default_rng(seed).normal(size=(batch, length, C))
    return values.astype(np.float32)


def context(segments=None, length=T, batch=B, **fields):
    if segments is None:
        positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    else:
        positions = place(segments)
        fields["segment_ids"] = segments
    return Context(positions=positions, **fields)


@partial(jitted, static_argnums=0)
def call(graph, params, x, ctx):
    return nnx.merge(graph, params)(x, ctx)


@partial(jitted, static_argnums=0)
def _step(graph, params, x, state, ctx):
    return nnx.merge(graph, params).step(x, state, ctx)


def run(mixer, x, ctx):
    return np.asarray(call(*nnx.split(mixer), x, ctx)[0])


def step(mixer, x, state, ctx):
    return _step(*nnx.split(mixer), x, state, ctx)


def decode(mixer, x, ctx, cuts, max_len=T + 3):
    """The sequence in pieces that end at `cuts`, through `step`."""
    state, pieces = mixer.init_state(x.shape[0], max_len, ctx.memory), []
    for first, last in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        part = ctx.replace(positions=ctx.positions[:, first:last])
        if ctx.segment_ids is not None:
            part = part.replace(segment_ids=ctx.segment_ids[:, first:last])
        y, after = step(mixer, x[:, first:last], state, part)
        same = jax.tree.map(
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, after
        )
        assert all(jax.tree.leaves(same))
        state = after
        pieces.append(np.asarray(y))
    return np.concatenate(pieces, axis=1)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def memory_of(length=5):
    values = np.random.default_rng(9).normal(size=(B, length, C))
    return values.astype(np.float32)
