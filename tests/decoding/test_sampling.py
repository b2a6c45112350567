"""Samplers against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.decoding.sampling import Sampler, draw, filtered

# Probabilities 0.5, 0.3, 0.15, 0.05 of tokens 2, 0, 3, 1.
PROBABILITY = np.array([0.3, 0.05, 0.5, 0.15])
LOGITS = jnp.log(jnp.asarray(PROBABILITY, jnp.float32)) + 1.7


def kept(sampler: Sampler) -> list[int]:
    return np.flatnonzero(np.isfinite(filtered(LOGITS, sampler))).tolist()


def test_greedy_takes_the_most_likely():
    token = draw(LOGITS[None], Sampler(temperature=0.0), jax.random.key(0))
    assert token.tolist() == [2]
    assert token.dtype == jnp.int32


@pytest.mark.parametrize(
    ("top_k", "tokens"), [(1, [2]), (2, [0, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_k_most_likely(top_k, tokens):
    assert kept(Sampler(top_k=top_k)) == tokens


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [(0.4, [2]), (0.6, [0, 2]), (0.9, [0, 2, 3]), (0.97, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, tokens):
    assert kept(Sampler(top_p=top_p)) == tokens


def test_temperature_divides_the_logits():
    weights = jax.nn.softmax(filtered(LOGITS, Sampler(temperature=0.5)))
    expected = PROBABILITY**2 / (PROBABILITY**2).sum()
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_draws_follow_the_distribution():
    rows = jnp.broadcast_to(LOGITS, (20000, 4))
    tokens = draw(rows, Sampler(top_k=3), jax.random.key(1))
    share = np.bincount(tokens, minlength=4) / len(tokens)
    expected = np.where(PROBABILITY > 0.1, PROBABILITY, 0) / 0.95
    np.testing.assert_allclose(share, expected, atol=0.015)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1.0}, r"temperature must not be negative; got -1.0"),
        ({"top_k": -2}, r"top_k must not be negative; got -2"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]; got 1.5"),
    ],
)
def test_values_out_of_range_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        Sampler(**options)
