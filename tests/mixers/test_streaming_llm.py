"""Facts of streaming attention with sinks (arXiv 2309.17453)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import nn
from attnjax.conformance import samples
from attnjax.conformance.checks import decoding
from attnjax.conformance.subject import BASE_DIMS, jitted, subject
from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention, streaming_llm

C, T = 20, 13
NO_POSITIONS = {"rope": None}
ENCODINGS = {
    "rope": ({}, {}),
    "alibi": ({"alibi": True}, {}),
    "none": ({}, NO_POSITIONS),
}


def layer(window, sinks, dims=None, **options):
    options = {"window": window, "sinks": sinks, **options}
    return subject(streaming_llm, options, dims or {})


def full(dims=None, **options):
    return subject(attention, options, dims or {})


def decode(s, x, ctx, sizes=(1,) * T):
    return decoding.decode(s, x, ctx, sizes, max_len=99)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def fill(s, length, seed=3):
    """A state after `length` random tokens, one chunk at a time, no padding."""
    state = s.init_state(2, 99)
    x = np.random.default_rng(seed).normal(size=(2, 24, C)).astype(np.float32)
    for at in range(0, length, 6):
        part = x[:, at : min(at + 6, length)]
        positions = at + np.tile(np.arange(part.shape[1], dtype=np.int32), (2, 1))
        _, state = s.step(s.arrays, part, state, Context(positions=positions))
    return state


def token(seed=8, position=0):
    x = np.random.default_rng(seed).normal(size=(2, 1, C)).astype(np.float32)
    return x, Context(positions=np.full((2, 1), position, np.int32))


# ---- the mask form


def test_the_mask_form_is_the_reference():
    rng = np.random.default_rng(3)
    query, key, value = (rng.normal(size=(2, T, n, 4)) for n in (6, 3, 3))
    i, j = np.indices((T, T))
    visible = (j <= i) & ((i - j < 4) | (j < 2))
    expected = attention.reference(query, key, value, visible)
    close(streaming_llm.reference(query, key, value, window=4, sinks=2), expected)
    s = layer(4, 2, NO_POSITIONS)
    x, ctx = samples.sample(s)
    params = s.arrays[0]
    split = lambda name: (x @ params[name]["kernel"]).reshape(2, T, -1, 4)  # noqa: E731
    heads = streaming_llm.reference(
        split("query"), split("key"), split("value"), window=4, sinks=2
    )
    close(s.y(x, ctx), heads.reshape(2, T, -1) @ params["out"]["kernel"])


@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_up_to_sinks_plus_window_tokens_it_is_full_attention(encoding, positions):
    """T <= s + R: mask form and cache form, positions too."""
    options, dims = ENCODINGS[encoding]
    s = layer(T - 2, 2, dims, positions=positions, **options)
    kind = {"positions": "alibi"} if encoding == "alibi" else {}
    x, ctx = samples.sample(s, "left")
    valid = ctx.segment_ids != 0
    expected = full(dims, **kind).y(x, ctx)[valid]
    close(s.y(x, ctx)[valid], expected)
    close(decode(s, x, ctx)[valid], expected)
    close(decode(s, x, ctx, (T,))[valid], expected)


def test_without_sinks_it_is_a_sliding_window():
    s = layer(4, 0, positions="text")
    x, ctx = samples.sample(s, "packed")
    valid = ctx.segment_ids != 0
    expected = full(window=4).y(x, ctx)[valid]
    close(s.y(x, ctx)[valid], expected)
    close(decode(s, x, ctx)[valid], expected)


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_window_of_the_whole_sequence_is_full_attention(sinks):
    s = layer(T, sinks)
    x, ctx = samples.sample(s, "packed")
    valid = ctx.segment_ids != 0
    expected = full().y(x, ctx)[valid]
    close(s.y(x, ctx)[valid], expected)
    close(decode(s, x, ctx)[valid], expected)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_receptive_field_of_l_layers_is_l_windows(depth):
    """L (R - 1) + 1 tokens, and the sinks beside them."""
    window, last = 3, T - 1
    for sinks in (0, 2):
        s = layer(window, sinks, NO_POSITIONS)
        x, ctx = samples.sample(s)

        def stack(x, arrays=s.arrays, s=s, ctx=ctx):
            for _ in range(depth):
                y, _, _ = s.call(arrays, x, ctx)
                x = x + y
            return jnp.sum(x[:, last])

        slope = jitted(jax.grad(stack))(x)
        seen = np.flatnonzero(np.abs(slope).max(axis=(0, 2)))
        reach = range(last - depth * (window - 1), T)
        assert len(reach) == depth * (window - 1) + 1
        np.testing.assert_array_equal(seen, sorted({*range(sinks), *reach}))


# ---- the cache form


@pytest.mark.parametrize("positions", ["text", "cache"])
def test_the_cache_never_exceeds_sinks_plus_window(positions):
    s = layer(4, 2, positions=positions)
    shapes = [jax.tree.map(lambda a: a.shape, s.init_state(2, n)) for n in (5, 5000)]
    assert shapes[0] == shapes[1]
    x, _ = samples.sample(s)
    state = s.init_state(2, 5)
    held = []
    for at in range(T):
        ctx = Context(positions=np.full((2, 1), at, np.int32))
        _, state = s.step(s.arrays, x[:, at : at + 1], state, ctx)
        assert state.key.shape[1] == state.value.shape[1] == 6
        held.append(np.sort(np.asarray(state.index), axis=1))
    # What lies there: the first two tokens and the last four.
    np.testing.assert_array_equal(held[2], [[-1, -1, -1, 0, 1, 2]] * 2)
    np.testing.assert_array_equal(held[-1], [[0, 1, T - 4, T - 3, T - 2, T - 1]] * 2)


@pytest.mark.parametrize("positions", ["text", "cache"])
def test_sinks_stay_bit_identical_after_eviction(positions):
    s = layer(4, 2, positions=positions)
    early, late = fill(s, 6), fill(s, 24)
    for name in ("key", "value", "index"):
        one, other = (np.asarray(getattr(a, name)) for a in (early, late))
        np.testing.assert_array_equal(one[:, :2], other[:, :2])
    assert np.abs(np.asarray(early.key - late.key))[:, 2:].max() > 0.1


def test_keys_are_cached_before_rotary_positions():
    s = layer(4, 2)
    x, ctx = samples.sample(s)
    _, out = s.forward(s.arrays, x, ctx.replace(hooks=(Hook("k", "value"),)))
    raw = (x @ s.arrays[0]["key"]["kernel"]).reshape(2, T, -1, 4)
    _, state = s.step(s.arrays, x, s.init_state(2, 0), ctx)
    index = np.asarray(state.index)
    for row in range(2):
        close(state.key[row], raw[row, index[row]])
        np.testing.assert_allclose(state.value[row], out.records["k"][row, index[row]])


@pytest.mark.parametrize("length", [1, 3], ids=["token", "chunk"])
@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_at_cache_positions_output_depends_on_the_cache_alone(encoding, length):
    """Neither the absolute time nor the number of forgotten tokens matters."""
    options, dims = ENCODINGS[encoding]
    s = layer(4, 2, dims, **options)
    state = jax.tree.map(np.asarray, fill(s, 18))
    x = np.random.default_rng(8).normal(size=(2, length, C)).astype(np.float32)
    positions = 18 + np.tile(np.arange(length, dtype=np.int32), (2, 1))
    y, _ = s.step(s.arrays, x, fill(s, 18), Context(positions=positions))
    # Four million tokens later: 4 divides the shift, so each key has its old place.
    shift = 4_000_000
    moved = np.where(state.index < 2, state.index, state.index + shift)
    state = fill(s, 18)._replace(index=moved, count=np.asarray(state.count) + shift)
    later = Context(positions=positions + shift)
    same, _ = s.step(s.arrays, x, jax.tree.map(jnp.asarray, state), later)
    np.testing.assert_array_equal(y, same)


def test_a_token_stands_at_its_place_in_the_cache():
    """The authors' form: concatenate, rotate keys by 0..s+R-1, the query by s+R-1."""
    s = layer(4, 2)
    state = jax.tree.map(np.asarray, fill(s, 18))
    x, ctx = token(position=18)
    y, _ = s.step(s.arrays, x, jax.tree.map(jnp.asarray, state), ctx)
    params, rope = s.arrays[0], s.dims.rope
    split = lambda name: (x @ params[name]["kernel"]).reshape(2, 1, -1, 4)  # noqa: E731
    old = [[np.flatnonzero(state.index[0] == n)[0] for n in (0, 1, 15, 16, 17)]]
    key = np.concatenate([state.key[:, old[0]], split("key")], axis=1)
    value = np.concatenate([state.value[:, old[0]], split("value")], axis=1)
    places = np.arange(6, dtype=np.int32)[None]
    heads = attention.reference(
        nn.apply_rope(split("query"), places[:, -1:], rope),
        nn.apply_rope(jnp.asarray(key), places, rope),
        value,
        np.ones((1, 1, 1, 6), bool),
    )
    close(y, heads.reshape(2, 1, -1) @ params["out"]["kernel"])


@pytest.mark.parametrize("positions", ["text", "cache"])
def test_without_positions_mask_form_and_cache_form_agree(positions):
    s = layer(4, 2, NO_POSITIONS, positions=positions)
    x, ctx = samples.sample(s, "packed")
    valid = ctx.segment_ids != 0
    for sizes in ((1,) * T, (5, 1, 7)):
        close(decode(s, x, ctx, sizes)[valid], s.y(x, ctx)[valid])


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_at_cache_positions_the_forms_differ_once_eviction_starts(encoding):
    options, dims = ENCODINGS[encoding]
    s = layer(4, 2, dims, **options)
    x, ctx = samples.sample(s)
    gap = np.abs(decode(s, x, ctx) - s.y(x, ctx)).max(axis=(0, 2))
    assert gap[:6].max() < 1e-5
    assert gap[6:].min() > 1e-5


@pytest.mark.parametrize("weight_map", ["softmax", "sink_logit", "off_by_one"])
@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_at_cache_positions_any_cut_gives_what_single_tokens_give(encoding, weight_map):
    """Chunks attend to sinks and window apart; single tokens to both at once."""
    options, dims = ENCODINGS[encoding]
    s = layer(4, 2, dims, weight_map=weight_map, **options)
    x, ctx = samples.sample(s, "packed")
    valid = ctx.segment_ids != 0
    single = decode(s, x, ctx)[valid]
    for sizes in ((T,), (5, 1, 7)):
        close(decode(s, x, ctx, sizes)[valid], single)


def test_at_text_positions_decoding_is_exact_in_any_cuts():
    s = layer(4, 2, positions="text")
    x, ctx = samples.sample(s, "packed")
    valid = ctx.segment_ids != 0
    for sizes in ((1,) * T, (T,), (5, 1, 7)):
        close(decode(s, x, ctx, sizes)[valid], s.y(x, ctx)[valid])


@pytest.mark.parametrize("positions", ["text", "cache"])
def test_a_token_leaves_no_trace_once_it_is_evicted(positions):
    s = layer(4, 2, positions=positions)
    x, ctx = samples.sample(s)
    before = decode(s, x, ctx)
    after = decode(s, *samples.perturb(x, ctx, samples.tokens(T, 3)))
    moved = np.abs(after - before).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(moved), [3, 4, 5, 6])


def test_padding_takes_no_place_in_the_cache():
    """Rows of 3 and 7 tokens, padded on the right, then 5 tokens of each."""
    s = layer(3, 1, positions="cache")
    ids = np.ones((2, 12), np.int32)
    ids[0, 3:7] = 0
    x, ctx = samples.sample(s, length=12)
    ctx = ctx.replace(segment_ids=ids, positions=np.cumsum(ids, 1, dtype=np.int32) - 1)
    y = decode(s, x, ctx, (7, 1, 1, 3))
    for row in range(2):
        real = np.flatnonzero(ids[row])
        bare = ctx.replace(
            segment_ids=None,
            positions=np.tile(np.arange(len(real), dtype=np.int32), (2, 1)),
            embeddings=ctx.embeddings[:, real],
        )
        alone = decode(s, x[:, real], bare, (1,) * len(real))
        close(y[row, real], alone[row])


def test_a_padding_step_leaves_the_state_as_it_was():
    s = layer(4, 2)
    x, ctx = token()
    state = jax.tree.map(np.asarray, fill(s, 9))
    pad = ctx.replace(segment_ids=np.zeros((2, 1), np.int32))
    y, after = s.step(s.arrays, x, fill(s, 9), pad)
    jax.tree.map(np.testing.assert_array_equal, state, after)
    assert not np.any(np.asarray(y))


# ---- numbers in SPEC, refusals


def test_state_does_not_grow_with_the_sequence():
    config = streaming_llm.Config(window=2000, sinks=4)
    size = streaming_llm.SPEC.state_size
    assert size(config, BASE_DIMS, 64) == size(config, BASE_DIMS, 4_000_000)
    # 3 kv heads of 4 + 4 numbers and one token number each, then id and length.
    assert size(config, BASE_DIMS, 64) == 2004 * (3 * 8 + 1) + 2


def test_cost_is_linear_in_the_sequence():
    config = streaming_llm.Config(window=60, sinks=4)
    flops = streaming_llm.SPEC.flops
    assert 2 * flops(config, BASE_DIMS, 1000) == flops(config, BASE_DIMS, 2000)


@pytest.mark.parametrize("changes", [{"window": 0}, {"sinks": -1}])
def test_settings_that_make_no_sense_are_refused(changes):
    text = "window must be at least 1 and sinks at least 0; got window="
    with pytest.raises(ValueError, match=text):
        streaming_llm.Config(**changes)


def test_hooks_are_refused_while_decoding():
    s = layer(4, 2)
    x, ctx = token()
    ctx = dataclasses.replace(ctx, hooks=(Hook("probe", "heads"),))
    with pytest.raises(UserError, match="hooks act on the full pass; got .'probe'."):
        s.call_step(s.arrays, x, s.init_state(2, 4), ctx)


def test_merge_is_attention_over_both_sets():
    rng = np.random.default_rng(4)
    scores, values = rng.normal(size=(2, 3, 5, 7)), rng.normal(size=(7, 4))
    lse = lambda s: np.log(np.exp(s).sum(-1))  # noqa: E731
    out = lambda s, v: np.exp(s - lse(s)[..., None]) @ v  # noqa: E731
    scores, values = scores.astype(np.float32), values.astype(np.float32)
    one, other = scores[..., :2], scores[..., 2:]
    merged = streaming_llm.merge(
        out(one, values[:2]), lse(one), out(other, values[2:]), lse(other)
    )
    close(merged, out(scores, values))
    nothing = np.full((2, 3, 5), -np.inf, np.float32)
    zeros = np.zeros((2, 3, 5, 4), np.float32)
    close(streaming_llm.merge(zeros, nothing, merged, lse(scores)), merged)
    assert not np.any(np.asarray(streaming_llm.merge(zeros, nothing, zeros, nothing)))
