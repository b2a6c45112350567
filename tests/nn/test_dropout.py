"""Dropout's statistics, and when it does nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import nn

KEY = jax.random.key(0)
X = jnp.ones((101, 103))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_rate_of_entries_is_zero_and_the_mean_is_kept(rate):
    y = np.asarray(nn.dropout(X, rate, prng_key=KEY, train=True))
    np.testing.assert_allclose((y == 0).mean(), rate, atol=0.02)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.1)


def test_every_entry_is_drawn_on_its_own():
    zero = np.asarray(nn.dropout(X, 0.5, prng_key=KEY, train=True)) == 0
    for axis in (0, 1):
        spread = zero.mean(axis=axis).std()
        np.testing.assert_allclose(spread, 0.5 / np.sqrt(X.shape[axis]), rtol=0.3)


def test_the_key_decides():
    draw = lambda key: nn.dropout(X, 0.5, prng_key=key, train=True)  # noqa: E731
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert np.any(draw(KEY) != draw(jax.random.key(1)))


def test_the_gradient_passes_where_entries_are_kept():
    drop = lambda x: nn.dropout(x, 0.5, prng_key=KEY, train=True)  # noqa: E731
    grad = jax.grad(lambda x: jnp.sum(drop(x)))(X)
    np.testing.assert_array_equal(grad, drop(X))


def test_nothing_happens_at_rate_zero_or_outside_training():
    assert nn.dropout(X, 0.0, prng_key=None, train=True) is X
    assert nn.dropout(X, 0.5, prng_key=None, train=False) is X


def test_dtype_is_kept():
    y = nn.dropout(X.astype(jnp.bfloat16), 0.5, prng_key=KEY, train=True)
    assert y.dtype == jnp.bfloat16


def test_training_needs_a_key():
    with pytest.raises(ValueError, match=r"needs a prng_key when training; got rate"):
        nn.dropout(X, 0.5, prng_key=None, train=True)


# ---- drop-path


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.9])
def test_whole_rows_are_dropped_and_the_mean_is_kept(rate):
    x = jnp.ones((4001, 2, 3))
    y = np.asarray(nn.drop_path(x, rate, prng_key=KEY))
    assert (y == y[:, :1, :1]).all()
    dropped = (y[:, 0, 0] == 0).mean()
    np.testing.assert_allclose(dropped, rate, atol=0.03)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.15)


def test_drop_path_takes_a_traced_rate_and_keeps_the_dtype():
    drop = jax.jit(lambda x, rate: nn.drop_path(x, rate, prng_key=KEY))
    x = jnp.ones((64, 3), jnp.bfloat16)
    y = drop(x, jnp.float32(0.5))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(drop(x, jnp.float32(0.0)), x)


def test_drop_path_without_a_key_is_refused():
    with pytest.raises(ValueError, match="drop_path: needs a prng_key"):
        nn.drop_path(X, 0.5, prng_key=None)
