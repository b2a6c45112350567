"""Softmax attention in cuts, with a memory, and as a part of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layers import (
    DIMS,
    LAYERS,
    ROPE,
    SEGMENTS,
    B,
    D,
    H,
    K,
    T,
    all_layers,
    close,
    context,
    decode,
    inputs,
    make,
    memory_of,
    run,
    step,
)
from flax import nnx

from attnjax.conformance.subject import jitted
from attnjax.core.context import Context
from attnjax.mixers import attention

# ---- cross-attention


def test_cross_attention_reads_all_of_the_memory():
    mixer, x, memory = make({"cross": True}, ROPE), inputs(), memory_of()
    y = run(mixer, x, context(memory=memory))
    split = lambda a, n: a.reshape(*a.shape[:2], n, D)  # noqa: E731
    query = mixer.query_norm(split(x @ mixer.query.kernel[...], H))
    key = mixer.key_norm(split(memory @ mixer.key.kernel[...], K))
    value = split(memory @ mixer.value.kernel[...], K)
    heads = jitted(attention.reference)(query, key, value, np.ones((1, 1, 1, 5), bool))
    close(y, heads.reshape(B, T, -1) @ mixer.out.kernel[...])


def test_cross_attention_skips_padding_of_the_memory():
    mixer, x, memory = make({"cross": True}), inputs(), memory_of(7)
    ids = np.asarray([[1] * 5 + [0] * 2] * B)
    short = run(mixer, x, context(memory=memory[:, :5]))
    close(run(mixer, x, context(memory=memory, memory_segment_ids=ids)), short)
    # Each document of a packed row reads its own memory.
    segments = np.asarray([[1] * 6 + [2] * 7] * B)
    ids = np.asarray([[1] * 5 + [2] * 2] * B)
    y = run(mixer, x, context(segments, memory=memory, memory_segment_ids=ids))
    close(y[:, :6], short[:, :6])
    # Without ids of the memory every token but padding reads all of it.
    y = run(mixer, x, context(SEGMENTS, memory=memory[:, :5]))
    close(y, np.where(SEGMENTS[..., None] != 0, short, 0))


def test_cross_attention_decodes_from_keys_made_once():
    mixer, x = make({"cross": True}, ROPE), inputs()
    ids = np.asarray([[1, 1, 1, 0, 0], [1] * 5])
    ctx = context(memory=memory_of(), memory_segment_ids=ids)
    close(decode(mixer, x, ctx, [1, 2, 9]), run(mixer, x, ctx))


def test_self_attention_leaves_the_memory_to_other_layers():
    mixer, x = make(), inputs()
    np.testing.assert_array_equal(
        run(mixer, x, context(memory=memory_of())), run(mixer, x, context())
    )


# ---- decoding


@all_layers
@pytest.mark.parametrize("segments", [SEGMENTS], ids=["packed"])
def test_decoding_in_random_cuts_equals_the_full_pass(options, dims, segments):
    mixer, x, ctx = make(options, dims), inputs(), context(segments)
    whole = run(mixer, x, ctx)
    close(decode(mixer, x, ctx, [5, 6, 7, 12]), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["rope", "alibi", "window", "window and sinks"])
def test_padding_of_a_prompt_is_isolated(name, side):
    """Distances count tokens, not places in the cache.

    Rows of 3 and 5 tokens in one batch, then 4 tokens of each.
    """
    mixer, x, lengths = make(*LAYERS[name]), inputs(), [3, 5]
    segments = np.zeros((B, 9), np.int32)
    for row, n in enumerate(lengths):
        at = slice(5 - n, 5) if side == "left" else slice(0, n)
        segments[row, at] = 1
    segments[:, 5:] = 1
    ctx = context(segments)
    y = decode(mixer, x[:, :9], ctx, [5, 6, 7, 8])
    for row in range(B):
        real = np.flatnonzero(segments[row])
        front = x.copy()
        front[row, : len(real)] = x[row, real]
        alone = run(mixer, front, context(np.ones((B, T), np.int32)))
        close(y[row, real], alone[row, : len(real)])


def test_decoding_without_ids_equals_the_full_pass():
    mixer, x = make({}, ROPE), inputs()
    close(decode(mixer, x, context(), [4, 5, 6, 8]), run(mixer, x, context()))


def test_tokens_without_ids_continue_the_document():
    mixer, x = make({}, ROPE), inputs()
    ids = np.asarray([[5] * T, [0, 0] + [7] * (T - 2)], np.int32)
    ctx = context(ids)
    state = mixer.init_state(B, T)
    first = ctx.replace(positions=ctx.positions[:, :9], segment_ids=ids[:, :9])
    _, state = step(mixer, x[:, :9], state, first)
    y, _ = step(mixer, x[:, 9:], state, Context(positions=ctx.positions[:, 9:]))
    close(y, run(mixer, x, ctx)[:, 9:])


def test_a_prefix_within_one_step_decodes_as_in_the_full_pass():
    mixer, x = make({}, ROPE), inputs()
    ctx = context(prefix_len=np.asarray([5, 3]))
    whole = run(mixer, x, ctx)
    close(decode(mixer, x, ctx, [6, 7]), whole)
    assert np.abs(whole - run(mixer, x, context())).max() > 1e-3


def test_the_cache_is_written_in_place():
    mixer = make()
    graph, params = nnx.split(mixer)
    state = jax.eval_shape(lambda: mixer.init_state(B, 512))
    ctx = context(length=1)

    def one(state, params, x):
        return nnx.merge(graph, params).step(x, state, ctx)

    lowered = jax.jit(one, donate_argnums=0).lower(state, params, inputs(length=1))
    memory = lowered.compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= size


# ---- as a part of a model


def test_a_layer_works_under_scan_remat_and_vmapped_init():
    config, x, ctx = attention.Config(weight_map="sink_logit"), inputs(), context()
    build = lambda key: attention.Mixer(config, ROPE, rngs=nnx.Rngs(params=key))  # noqa: E731
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    hash(graph)
    keys = jax.random.split(jax.random.key(1), 3)
    stacked = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(build(key))))(keys)

    def body(x, params):
        y, out = nnx.merge(graph, params)(x, ctx)
        return x + y, out

    def loss(params):
        whole, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, params)
        return jnp.sum(whole**2)

    def unrolled(params):
        whole = x
        for layer in range(3):
            whole, _ = body(whole, jax.tree.map(lambda a, i=layer: a[i], params))
        return jnp.sum(whole**2)

    found, expected = (jitted(jax.grad(f))(stacked) for f in (loss, unrolled))
    jax.tree.map(lambda a, b: close(a, b, atol=1e-3), found, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_compute_dtype_is_the_models():
    dims = dataclasses.replace(ROPE, dtype="bfloat16")
    mixer, x = make({"window": 4}, dims), inputs()
    y = run(mixer, x, context(SEGMENTS))
    assert y.dtype == jnp.bfloat16
    assert mixer.query.kernel.dtype == jnp.float32
    assert mixer.init_state(1, 4).key.dtype == jnp.bfloat16
    close(
        y.astype(jnp.float32), run(make({"window": 4}, ROPE), x, context(SEGMENTS)), 0.1
    )


def test_dropout_acts_on_the_output_in_training_alone():
    dims = dataclasses.replace(DIMS, dropout=0.5)
    mixer, x = make({}, dims), inputs()
    ctx = context(train=True, prng_key=jax.random.key(0))
    plain, dropped = run(mixer, x, ctx.replace(train=False)), run(mixer, x, ctx)
    kept = np.asarray(dropped) != 0
    assert 0.3 < kept.mean() < 0.7
    close(np.asarray(dropped)[kept], 2 * np.asarray(plain)[kept])
