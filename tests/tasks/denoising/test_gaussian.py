"""Denoising diffusion against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from attnjax.tasks.denoising.chain import betas
from attnjax.tasks.denoising.gaussian import Gaussian, bin_nll, normal_kl

STEPS = 41
SHAPE = (5, 3, 2, 3)
TIMES = np.array([0, 1, 7, 23, STEPS - 1], np.int32)
PROCESS = Gaussian(steps=STEPS)


def batch(seed=0):
    """Bytes on [-1, 1] (both ends among them), noise, an error, and a code."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, SHAPE) / 127.5 - 1
    data[:, 0, 0, 0], data[:, 0, 0, 1] = -1, 1
    noise, error, code = rng.normal(size=(3, *SHAPE))
    return data, noise, error, code


def rows(values):
    return values.reshape(-1, 1, 1, 1)


def alpha_bar(times=TIMES):
    return rows(np.cumprod(1 - betas("linear", STEPS))[times])


def noised(data, noise):
    return np.sqrt(alpha_bar()) * data + np.sqrt(1 - alpha_bar()) * noise


def test_noised_data_have_the_moments_of_the_chain():
    data, noise, *_ = batch()
    got = jax.jit(PROCESS.noised)(
        jnp.asarray(data, jnp.bfloat16), jnp.asarray(noise, jnp.float32), TIMES
    )
    assert got.dtype == jnp.float32
    data = np.asarray(jnp.asarray(data, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(got, noised(data, noise), atol=1e-6)


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_an_exact_output_gives_back_data_noise_and_score_and_no_squared_error(target):
    process = Gaussian(steps=STEPS, target=target, learn_sigma=False)
    data, noise, *_ = batch()
    signal, spread = np.sqrt(alpha_bar()), np.sqrt(1 - alpha_bar())
    exact = {"eps": noise, "x0": data, "v": signal * noise - spread * data}[target]
    x = noised(data, noise)

    @jax.jit
    def run(output):
        guess = process.prediction(output, x, TIMES)
        args = {"data": data, "noise": noise, "noised": x, "times": TIMES}
        return guess, process.losses(output, **args)

    with jax.enable_x64(True):
        guess, losses = run(exact)
        off = run(exact + 0.5)[1]
    np.testing.assert_allclose(guess.data, data, atol=1e-10)
    np.testing.assert_allclose(guess.noise, noise, atol=1e-10)
    np.testing.assert_allclose(guess.score, -(x - signal * data) / spread**2)
    assert guess.velocity is None
    np.testing.assert_allclose(losses["loss"], np.zeros(5), atol=1e-20)
    np.testing.assert_allclose(off["mse"], np.full(5, 0.25))
    assert sorted(off) == ["loss", "mse"]


def test_codes_of_one_and_minus_one_are_the_two_bounds_of_the_variance():
    x = jnp.ones(SHAPE)
    beta = betas("linear", STEPS)
    kept = np.cumprod(1 - beta)
    posterior = beta[1:] * (1 - kept[:-1]) / (1 - kept[1:])
    low = np.log(np.append(posterior[0], posterior))
    run = jax.jit(
        lambda code: (
            PROCESS.prediction(
                jnp.concatenate([x, code * x], axis=-1), x, TIMES
            ).log_variance
        )
    )
    for code, expected in [
        (1.0, np.log(beta)),
        (-1.0, low),
        # Not squashed: codes beyond the bounds go on.
        (3.0, 2 * np.log(beta) - low),
    ]:
        wanted = np.broadcast_to(rows(expected[TIMES]), SHAPE)
        np.testing.assert_allclose(run(code), wanted, rtol=1e-5)


@pytest.mark.parametrize("variance", ["posterior", "beta", None])
def test_a_fixed_variance_is_the_posteriors_or_beta(variance):
    process = Gaussian(steps=STEPS, learn_sigma=False, variance=variance)
    times, x = jnp.array([5]), jnp.zeros((1, 2, 2, 3))
    got = np.exp(process.prediction(x, x, times).log_variance)
    beta = betas("linear", STEPS)
    kept = np.cumprod(1 - beta)
    share = 1 if variance == "beta" else (1 - kept[4]) / (1 - kept[5])
    np.testing.assert_allclose(got.ravel(), [beta[5] * share], rtol=1e-5)


def expected_bits(data, x, estimate, code):
    """The bound's terms by scipy, each row by the definition of its time."""
    beta = betas("linear", STEPS)
    kept = np.cumprod(1 - beta)
    before = np.append(1, kept[:-1])
    variance = beta * (1 - before) / (1 - kept)
    low = rows(np.log(np.append(variance[1], variance[1:]))[TIMES])
    high = rows(np.log(beta)[TIMES])
    std = np.exp(0.5 * ((code + 1) / 2 * high + (1 - code) / 2 * low))
    a = rows((beta * np.sqrt(before) / (1 - kept))[TIMES])
    b = rows(((1 - before) * np.sqrt(1 - beta) / (1 - kept))[TIMES])
    mean, wanted, true_std = a * estimate + b * x, a * data + b * x, np.exp(0.5 * low)
    nats = np.log(std / true_std) - 0.5
    nats += (true_std**2 + (wanted - mean) ** 2) / (2 * std**2)
    upper = np.where(data > 0.999, np.inf, data + 1 / 255)
    lower = np.where(data < -0.999, -np.inf, data - 1 / 255)
    norm = scipy.stats.norm(mean, std)
    share = norm.cdf(upper) - norm.cdf(lower)
    nats = np.where(rows(TIMES) == 0, -np.log(share), nats)
    return nats.mean(axis=(1, 2, 3)) / np.log(2)


def test_the_hybrid_loss_is_the_squared_error_plus_bits_per_dimension():
    data, noise, error, code = batch()
    x = noised(data, noise)
    output = np.concatenate([noise + 0.1 * error, code], axis=-1)
    estimate = x - np.sqrt(1 - alpha_bar()) * (noise + 0.1 * error)
    estimate /= np.sqrt(alpha_bar())
    process = Gaussian(steps=STEPS, vlb_weight=0.25)

    @jax.jit
    def run(output, data, noise, x):
        return process.losses(output, data=data, noise=noise, noised=x, times=TIMES)

    with jax.enable_x64(True):
        losses = run(output, data, noise, x)
    bits = expected_bits(data, x, estimate, code)
    mse = 0.01 * (error**2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses["vlb"], bits, rtol=1e-8)
    np.testing.assert_allclose(losses["mse"], mse, rtol=1e-10)
    np.testing.assert_allclose(losses["loss"], mse + 0.25 * bits, rtol=1e-8)
    # As training computes them.
    single = run(*(jnp.asarray(a, jnp.float32) for a in (output, data, noise, x)))
    assert single["loss"].dtype == jnp.float32
    np.testing.assert_allclose(single["vlb"], bits, rtol=1e-3)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone(target):
    process = Gaussian(steps=STEPS, target=target)
    data, noise, error, code = batch()
    x = noised(data, noise)
    output = jnp.asarray(np.concatenate([noise + error, code], axis=-1), jnp.float32)

    @jax.jit
    @jax.jacrev
    def slopes(output):
        losses = process.losses(output, data=data, noise=noise, noised=x, times=TIMES)
        return {name: jnp.sum(value) for name, value in losses.items()}

    slope = slopes(output)
    np.testing.assert_array_equal(slope["vlb"][..., :3], np.zeros(SHAPE))
    np.testing.assert_array_equal(slope["mse"][..., 3:], np.zeros(SHAPE))
    assert np.all(np.abs(slope["vlb"][1:, ..., 3:]).max(axis=(1, 2, 3)) > 0)
    assert np.abs(slope["mse"][..., :3]).min() > 0
    np.testing.assert_allclose(slope["loss"], slope["mse"] + slope["vlb"], atol=1e-6)


def test_divergence_is_the_integral_of_its_definition():
    first, second = scipy.stats.norm(0.3, 0.8), scipy.stats.norm(-0.4, 1.7)

    def integrand(x):
        return first.pdf(x) * (first.logpdf(x) - second.logpdf(x))

    expected, _ = scipy.integrate.quad(integrand, -9, 9)
    got = normal_kl(jnp.float32(0.7), 2 * jnp.log(0.8), 2 * jnp.log(1.7))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert normal_kl(jnp.float32(0), jnp.float32(-3), jnp.float32(-3)) == 0


@pytest.mark.parametrize("mean", [0.93, -0.93])
def test_the_shares_of_all_bytes_add_up_to_one_and_small_ones_keep_their_digits(mean):
    bytes_ = np.arange(256) / 127.5 - 1
    nats = jax.jit(bin_nll)(
        jnp.asarray(bytes_, jnp.float32), mean=jnp.float32(mean), log_std=np.log(0.02)
    )
    np.testing.assert_allclose(np.exp(-np.float64(nats)).sum(), 1.0, rtol=1e-5)
    edges = (bytes_[:, None] + np.array([-1, 1]) / 255 - mean) / 0.02
    # From the tail in which the difference does not cancel.
    tails = scipy.stats.norm.sf(np.abs(edges))
    inside = (np.abs(bytes_ - mean) < 0.13) & (np.abs(edges).min(axis=1) > 1)
    inside[[0, -1]] = False
    expected = -np.log(np.abs(tails[inside, 0] - tails[inside, 1]))
    np.testing.assert_allclose(nats[inside], expected, rtol=1e-4)
    # A byte out of reach has the largest loss there is.
    far = 0 if mean > 0 else -1
    np.testing.assert_allclose(nats[far], -np.log(1e-12), rtol=1e-6)


def test_times_are_uniform_and_levels_rise_with_them():
    times = PROCESS.sample_times(jax.random.key(0), 4001)
    assert times.dtype == jnp.int32
    counts = np.bincount(times, minlength=STEPS)
    assert len(counts) == STEPS
    assert np.abs(counts - 4001 / STEPS).max() < 5 * np.sqrt(4001 / STEPS)
    ends = jnp.array([0, STEPS - 1])
    assert PROCESS.level(ends).tolist() == [0, 1]
    assert PROCESS.embedded(ends).tolist() == [0, STEPS - 1]
    assert PROCESS.output_channels(4) == 8
    assert Gaussian(learn_sigma=False).output_channels(4) == 4


def test_processes_are_static_values():
    assert hash(Gaussian()) == hash(Gaussian(steps=1000))
    assert Gaussian() == Gaussian(steps=1000) != Gaussian(target="v")
    assert PROCESS.tables is PROCESS.tables


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 1}, "steps must be at least 2; got steps=1"),
        ({"schedule": "sine"}, "schedule must be one of linear, cosine; got 'sine'"),
        ({"target": "noise"}, "target must be one of eps, v, x0; got 'noise'"),
        ({"vlb_weight": 0.0}, "vlb_weight must be positive; got vlb_weight=0.0"),
        ({"learn_sigma": False, "vlb_weight": 2.0}, "vlb_weight has no effect"),
        ({"variance": "beta"}, "variance is learned with learn_sigma=True"),
        (
            {"learn_sigma": False, "variance": "small"},
            "variance must be one of posterior, beta; got 'small'",
        ),
        ({"steps": 10}, "steps must be more than 20 for the linear schedule"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Gaussian(**options)


def test_an_output_of_another_shape_is_refused():
    x = jnp.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"with 6 channels.*got output of shape \(5"):
        PROCESS.prediction(x, x, TIMES)
    with pytest.raises(ValueError, match="with 6 channels"):
        PROCESS.losses(x[..., :1], data=x, noise=x, noised=x, times=TIMES)
