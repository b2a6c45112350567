"""Samplers of Gaussian chains on data N(0, STD^2), whose exact noise is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.decoding.denoising import sample
from attnjax.tasks.denoising import Gaussian
from attnjax.tasks.denoising.chain import betas

STD = 0.6
STEPS = 200
KEPT = np.cumprod(1 - betas("linear", STEPS))
ROWS = 20_000


def exact_noise(x, times):
    """E[noise | x_t]."""
    factor = np.sqrt(1 - KEPT) / (KEPT * STD**2 + 1 - KEPT)
    return x * jnp.asarray(factor, x.dtype)[times][:, None]


def draw(denoise, process, *, rows=ROWS, seed=0, **options):
    """Samples [rows] of a jitted sampler."""
    run = jax.jit(
        functools.partial(sample, denoise, process, shape=(rows, 1), **options)
    )
    return np.asarray(run(prng_key=jax.random.key(seed)))[:, 0]


def reverse_code(num_steps):
    """The code, by original time, of the exact variance of a step back."""
    times = np.round(np.linspace(0, STEPS - 1, num_steps)).astype(int)
    kept = KEPT[times]
    before = np.append(1, kept[:-1])
    beta = 1 - kept / before
    low = beta * (1 - before) / (1 - kept)
    low[0] = low[1]
    # Var(x' | x) of the jointly normal pair with Cov(x', x) = sqrt(1 - beta) Var(x').
    own, now = before * STD**2 + 1 - before, kept * STD**2 + 1 - kept
    exact = own - (1 - beta) * own**2 / now
    code = np.zeros(STEPS)
    code[times] = 2 * np.log(exact / low) / np.log(beta / low) - 1
    code[0] = 0
    return code


@pytest.mark.parametrize("num_steps", [STEPS, 20])
def test_ancestral_steps_with_the_exact_variance_give_the_variance_of_the_data(
    num_steps,
):
    # However long the steps are: bounds that are not the respaced chain's would show.
    code = jnp.asarray(reverse_code(num_steps), jnp.float32)

    def denoise(x, times):
        return jnp.concatenate([exact_noise(x, times), code[times][:, None]], axis=-1)

    x = draw(denoise, Gaussian(steps=STEPS), sampler="ddpm", num_steps=num_steps)
    np.testing.assert_allclose(x.var(), STD**2, rtol=0.03)
    assert abs(x.mean()) < 0.02


def test_ancestral_steps_of_a_fixed_variance_give_it_too():
    process = Gaussian(steps=STEPS, target="v", learn_sigma=False, variance="beta")

    def denoise(x, times):
        kept = jnp.asarray(KEPT, x.dtype)[times][:, None]
        noise = exact_noise(x, times)
        data = (x - jnp.sqrt(1 - kept) * noise) / jnp.sqrt(kept)
        return jnp.sqrt(kept) * noise - jnp.sqrt(1 - kept) * data

    x = draw(denoise, process, sampler="ddpm", num_steps=STEPS)
    np.testing.assert_allclose(x.var(), STD**2, rtol=0.06)


PLAIN = Gaussian(steps=STEPS, learn_sigma=False)


def test_implicit_steps_follow_the_probability_flow():
    start = jnp.linspace(-2, 2, 7)[:, None]
    # x / std(x_t) stays what it is.
    last = KEPT[-1] * STD**2 + 1 - KEPT[-1]
    flow = np.asarray(start)[:, 0] * STD / np.sqrt(last)
    off = []
    for num_steps in (25, 50, 100):
        options = {"sampler": "ddim", "num_steps": num_steps, "start": start, "rows": 7}
        x = draw(exact_noise, PLAIN, **options)
        off.append(np.abs(x - flow).max())
    # Deterministic, whatever the key.
    np.testing.assert_array_equal(draw(exact_noise, PLAIN, seed=1, **options), x)
    assert off[2] < 0.04
    np.testing.assert_allclose([off[0] / off[1], off[1] / off[2]], 2, atol=0.3)


def test_implicit_steps_with_all_the_noise_are_ancestral_ones():
    options = {"num_steps": 11, "rows": 5}
    implicit = draw(exact_noise, PLAIN, sampler="ddim", eta=1.0, **options)
    ancestral = draw(exact_noise, PLAIN, sampler="ddpm", **options)
    np.testing.assert_allclose(implicit, ancestral, rtol=1e-4, atol=1e-5)
    some = draw(exact_noise, PLAIN, sampler="ddim", eta=0.5, **options)
    assert np.abs(some - ancestral).max() > 0.01


def test_clipped_estimates_of_the_data_take_their_noise_along():
    start = jnp.array([[1.5], [-0.2]])
    options = {"num_steps": 2, "rows": 2, "start": start, "clip": 1.0}

    def wild(x, times):
        return 3 * x

    got = draw(wild, PLAIN, sampler="ddim", **options)
    x, (low, high) = np.asarray(start, np.float64)[:, 0], KEPT[[0, -1]]
    # The first estimate is far out and limited, the second is not.
    data = -np.sign(x)
    noise = (x - np.sqrt(high) * data) / np.sqrt(1 - high)
    x = np.sqrt(low) * data + np.sqrt(1 - low) * noise
    data = x * (1 - 3 * np.sqrt(1 - low)) / np.sqrt(low)
    assert np.abs(data).max() < 1
    np.testing.assert_allclose(got, data, rtol=1e-5)
    far = options | {"clip": 0.3}
    assert np.abs(draw(wild, PLAIN, sampler="ddpm", **far)).max() <= 0.3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_network_is_traced_once_and_asked_at_respaced_times(sampler):
    traced, asked = [], []

    def denoise(x, times):
        traced.append(x.shape)
        jax.debug.callback(lambda t: asked.append(t.tolist()), times, ordered=True)
        return exact_noise(x, times)

    draw(denoise, PLAIN, sampler=sampler, num_steps=4, rows=3)
    jax.effects_barrier()
    # Strides of 199 / 3.
    assert asked == [[199] * 3, [133] * 3, [66] * 3, [0] * 3]
    assert traced == [(3, 1)]


def test_a_row_of_its_own_key_does_not_depend_on_its_batch():
    options = {"sampler": "ddpm", "num_steps": 5}

    @functools.partial(jax.jit, static_argnames="rows")
    def run(keys, rows):
        shape = (rows, 2)
        return sample(exact_noise, PLAIN, shape=shape, prng_key=keys, **options)

    keys = jax.random.split(jax.random.key(4), 3)
    together, alone = run(keys, rows=3), run(keys[1:2], rows=1)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5)
    assert len(np.unique(together)) == 6
