"""Generation through the state equals the full forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.decoding.generation import generate, pad_left
from attnjax.decoding.sampling import Sampler
from attnjax.models import lm

GREEDY = Sampler(temperature=0.0)
VOCAB = 13
LENGTH = 12  # of full passes, one for all


def make(**changes):
    """A small model with large weights, so that its greedy choices are clear."""
    given = {
        "layers": "attention linear_attention",
        "num_layers": 2,
        "embed_dim": 24,
        "num_heads": 2,
        "num_kv_heads": 1,
        "max_len": 32,
        "init_std": 0.3,
        **changes,
    }
    model = lm.LM(schema.build(lm.Config, lm.resolve(given)), VOCAB)
    return model, *jax.jit(model.init)(3)


@pytest.fixture(scope="module")
def model():
    return make()


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, buffers, tokens, prefix_len=None) -> jax.Array:
    """Of one pass over tokens [B, T]: [B, T, V]."""
    positions = jnp.arange(tokens.shape[1])[None]
    ctx = Context(positions=positions, prefix_len=prefix_len)
    hidden, _ = model.hidden(params, buffers, tokens, ctx)
    return model.logits(params, hidden)


def greedy_by_full_passes(model, params, buffers, prompt, count, prefix=None):
    """Each token from a pass over all before it; what stands behind is not seen."""
    ids = list(prompt)
    seen = None if prefix is None else jnp.asarray([min(prefix, len(prompt))])
    for _ in range(count):
        tokens = jnp.asarray([ids + [0] * (LENGTH - len(ids))], jnp.int32)
        logits = full_logits(model, params, buffers, tokens, seen)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_greedy_decoding_equals_full_passes(model):
    lm_, params, buffers = model
    prompt = [1, 5, 2, 7]
    expected = greedy_by_full_passes(lm_, params, buffers, prompt, 7)
    arrays = lm_.unstack(params, buffers)
    (got,) = generate(lm_, arrays, [prompt], max_new_tokens=7, sampler=GREEDY)
    assert got == expected
    assert len(set(got)) > 1


def test_logits_of_random_cuts_equal_the_full_pass(model):
    lm_, params, buffers = model
    ids = np.random.default_rng(0).integers(0, VOCAB, 11)
    (expected,) = full_logits(lm_, params, buffers, jnp.asarray(ids[None], jnp.int32))
    arrays = lm_.unstack(params, buffers)

    @jax.jit
    def step(states, tokens, at):
        ctx = Context(positions=at + jnp.arange(tokens.shape[1])[None])
        hidden, states = lm_.step(arrays, states, tokens, ctx)
        return lm_.logits(arrays["ends"], hidden[0]), states

    states, at, got = lm_.init_state(arrays, 1, 11), 0, []
    for size in (3, 1, 5, 1, 1):
        tokens = jnp.asarray(ids[None, at : at + size], jnp.int32)
        logits, states = step(states, tokens, at)
        got.append(np.asarray(logits))
        at += size
    np.testing.assert_allclose(np.concatenate(got), expected, atol=2e-5)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_padded_prompts_give_what_each_gives_alone(positions):
    lm_, params, buffers = make(positions=positions)
    arrays = lm_.unstack(params, buffers)
    prompts = [[1, 5, 2, 7, 3], [4, 6]]
    options = {"max_new_tokens": 5, "sampler": GREEDY}
    together = generate(lm_, arrays, prompts, **options)
    alone = [generate(lm_, arrays, [p], **options)[0] for p in prompts]
    assert together == alone


def test_a_prefix_looks_both_ways():
    # Weights so large that one token more in the prefix changes what is drawn.
    lm_, params, buffers = make(layers="attention", num_layers=2, init_std=1.0)
    arrays = lm_.unstack(params, buffers)
    rng = np.random.default_rng(0)
    lengths = (8, 8, 7, 6, 5, 3)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]

    def drawn(prefix):
        options = {"max_new_tokens": 4, "sampler": GREEDY}
        return generate(lm_, arrays, prompts, prefix_len=prefix, **options)

    got = [drawn(prefix) for prefix in (0, 3, 4, 5)]
    assert all(one != other for one, other in itertools.combinations(got, 2))
    expected = [
        greedy_by_full_passes(lm_, params, buffers, prompt, 4, prefix=4)
        for prompt in prompts
    ]
    assert got[2] == expected


def test_more_tokens_than_one_dispatch(model):
    lm_, params, buffers = model
    arrays = lm_.unstack(params, buffers)
    options = {"sampler": Sampler(), "seed": 4}
    (long,) = generate(lm_, arrays, [[1]], max_new_tokens=37, **options)
    (short,) = generate(lm_, arrays, [[1]], max_new_tokens=9, **options)
    assert len(long) == 37
    assert long[:9] == short


def test_rows_and_seeds_draw_differently(model):
    lm_, params, buffers = model
    arrays = lm_.unstack(params, buffers)
    first, second = generate(
        lm_, arrays, [[1], [1]], max_new_tokens=12, sampler=Sampler(2.0)
    )
    assert first != second


def test_a_row_ends_at_the_stop_token(model):
    lm_, params, buffers = model
    arrays = lm_.unstack(params, buffers)
    options = {"max_new_tokens": 12, "sampler": GREEDY}
    (whole,) = generate(lm_, arrays, [[1, 5]], **options)
    stop = whole[4]
    (cut,) = generate(lm_, arrays, [[1, 5]], stop_token=stop, **options)
    assert cut == whole[: whole.index(stop)]


def test_padding_is_on_the_left():
    tokens, segments = pad_left([[1, 2, 3], [4]])
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert segments.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_empty_prompts_are_refused(model):
    with pytest.raises(UserError, match="needs at least one token"):
        generate(model[0], {}, [[]], max_new_tokens=2, sampler=GREEDY)


def test_more_tokens_than_learned_positions_are_refused():
    lm_, params, buffers = make(positions="learned")
    arrays = lm_.unstack(params, buffers)
    with pytest.raises(UserError, match=r"3 \+ 30 > config.model.max_len=32"):
        generate(lm_, arrays, [[1, 2, 3]], max_new_tokens=30, sampler=GREEDY)
