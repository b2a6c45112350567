"""Flow matching against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.tasks.denoising.flow import Flow

SHAPE = (5, 3, 2, 3)
TIMES = np.array([0.03, 0.2, 0.5, 0.77, 0.96])
PATHS = ["linear", "gvp", "vp"]


def rows(values):
    return np.reshape(values, (-1, 1, 1, 1))


def path(name, t):
    """alpha and sigma by their formulas."""
    if name == "linear":
        return t, 1 - t
    if name == "gvp":
        return np.sin(np.pi * t / 2), np.cos(np.pi * t / 2)
    alpha = np.exp(-((1 - t) ** 2) * (20 - 0.1) / 4 - (1 - t) * 0.1 / 2)
    return alpha, np.sqrt(1 - alpha**2)


def slopes(name, t, step=1e-6):
    """Derivatives of alpha and sigma by central differences."""
    ahead, behind = path(name, t + step), path(name, t - step)
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def batch(name):
    rng = np.random.default_rng(3)
    data, noise = rng.normal(size=(2, *SHAPE))
    alpha, sigma = path(name, rows(TIMES))
    d_alpha, d_sigma = slopes(name, rows(TIMES))
    velocity = d_alpha * data + d_sigma * noise
    return data, noise, alpha * data + sigma * noise, velocity, -noise / sigma


@pytest.mark.parametrize("name", PATHS)
def test_paths_and_their_slopes_are_those_of_the_formulas(name):
    with jax.enable_x64(True):
        at = Flow(path=name).scales(jnp.asarray(TIMES))
    alpha, sigma = path(name, TIMES)
    d_alpha, d_sigma = slopes(name, TIMES)
    np.testing.assert_allclose(at.alpha, alpha, rtol=1e-12)
    np.testing.assert_allclose(at.sigma, sigma, rtol=1e-12)
    np.testing.assert_allclose(at.d_alpha, d_alpha, rtol=1e-7)
    np.testing.assert_allclose(at.d_sigma, d_sigma, rtol=1e-7)
    pull = d_alpha / alpha * sigma**2 - sigma * d_sigma
    np.testing.assert_allclose(at.pull, pull, rtol=1e-6)


def test_the_vp_path_keeps_its_digits_next_to_the_data():
    # sigma^2 = 1e-6 there, where 1 - alpha^2 has two digits left in float32.
    left = np.float64(np.float32(1) - np.float32(1 - 1e-5))
    at = Flow(path="vp").scales(jnp.float32(1 - 1e-5))
    np.testing.assert_allclose(at.sigma, path("vp", 1 - left)[1], rtol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_every_target_says_the_same_of_a_noised_batch(name):
    data, noise, x, velocity, score = batch(name)
    targets = {"velocity": velocity, "noise": noise, "score": score}
    for target, output in targets.items():
        flow = Flow(path=name, target=target)

        @jax.jit
        def run(output, x, flow=flow):
            args = {"data": data, "noise": noise, "noised": x, "times": TIMES}
            losses = flow.losses(output, **args)
            return (
                flow.prediction(output, x, TIMES),
                losses,
                flow.noised(data, noise, TIMES),
            )

        with jax.enable_x64(True):
            guess, losses, made = run(output, x)
            zero = run(0 * output, x)[1]
        np.testing.assert_allclose(made, x, rtol=1e-12)
        np.testing.assert_allclose(guess.data, data, atol=1e-5)
        np.testing.assert_allclose(guess.noise, noise, atol=1e-5)
        np.testing.assert_allclose(guess.velocity, velocity, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(guess.score, score, rtol=1e-4, atol=1e-5)
        assert guess.log_variance is None
        np.testing.assert_allclose(losses["loss"], np.zeros(5), atol=1e-10)
        size = velocity if target == "velocity" else noise
        np.testing.assert_allclose(
            zero["loss"], (size**2).mean(axis=(1, 2, 3)), rtol=1e-6
        )


def test_an_exact_velocity_of_the_linear_path_leads_to_both_ends():
    data, noise, *_ = batch("linear")
    times = jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])
    flow = Flow()
    x = flow.noised(jnp.float32(data), jnp.float32(noise), times)
    velocity = jnp.float32(data - noise)
    t = rows(times)
    np.testing.assert_allclose(x + (1 - t) * velocity, data, atol=1e-6)
    np.testing.assert_allclose(x - t * velocity, noise, atol=1e-6)
    guess = flow.prediction(velocity, x, times)
    np.testing.assert_allclose(guess.data, data, atol=1e-6)
    np.testing.assert_allclose(guess.noise, noise, atol=1e-6)
    # The score of the linear path, but at its end.
    score = (t * velocity - x)[:4] / (1 - t[:4])
    np.testing.assert_allclose(guess.score[:4], score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_the_exact_velocity_of_gaussian_data_has_their_score(name):
    std = 0.6
    alpha, sigma = path(name, rows(TIMES))
    d_alpha, d_sigma = slopes(name, rows(TIMES))
    x = np.random.default_rng(5).normal(size=SHAPE)
    variance = alpha**2 * std**2 + sigma**2
    velocity = x * (alpha * d_alpha * std**2 + sigma * d_sigma) / variance
    if name == "linear":
        t = rows(TIMES)
        known = x * (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2)
        np.testing.assert_allclose(velocity, known, rtol=1e-6)
    with jax.enable_x64(True):
        guess = Flow(path=name).prediction(jnp.asarray(velocity), jnp.asarray(x), TIMES)
    np.testing.assert_allclose(guess.score, -x / variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["noise", "score"])
def test_weightings_are_those_of_the_card(target):
    t = TIMES
    # On the linear path g = (1 - t) / t.
    expected = {"none": t**0, "velocity": 1 / t**2, "likelihood": 1 / (t * (1 - t))}
    x = jnp.zeros(SHAPE)
    noise = jnp.ones(SHAPE)
    for weighting, weight in expected.items():
        flow = Flow(target=target, weighting=weighting)
        losses = flow.losses(x, data=x, noise=noise, noised=x, times=jnp.float32(TIMES))
        assert losses["loss"].dtype == jnp.float32
        np.testing.assert_allclose(losses["loss"], weight, rtol=1e-5)
        np.testing.assert_allclose(losses["mse"], np.ones(5))


@pytest.mark.parametrize(
    ("options", "training", "sampling"),
    [
        ({}, (0, 1), (0, 1)),
        ({"path": "gvp"}, (0, 1), (0, 1)),
        ({"target": "noise"}, (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ({"path": "gvp", "target": "score"}, (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ({"path": "vp"}, (0, 1 - 1e-5), (0, 1 - 1e-3)),
        ({"path": "vp", "target": "noise"}, (0, 1 - 1e-5), (0, 1 - 1e-3)),
        ({"training_cut": 0.1, "sampling_cut": 0.2}, (0.1, 0.9), (0.2, 0.8)),
        ({"path": "vp", "training_cut": 0.1}, (0, 0.9), (0, 1 - 1e-3)),
    ],
)
def test_times_keep_away_from_the_ends_that_a_target_does_not_have(
    options, training, sampling
):
    flow = Flow(**options)
    assert flow.interval() == training
    assert flow.interval(sampling=True) == sampling


def test_times_are_uniform_over_the_interval():
    flow = Flow(training_cut=0.25)
    times = np.sort(flow.sample_times(jax.random.key(1), 2000))
    assert times.dtype == np.float32
    assert times[0] >= 0.25
    assert times[-1] <= 0.75
    np.testing.assert_allclose(times, np.linspace(0.25, 0.75, 2000), atol=0.02)
    assert flow.level(jnp.array([0.0, 0.25, 1.0])).tolist() == [1, 0.75, 0]
    assert flow.embedded(jnp.array([0.5])).tolist() == [0.5]
    assert flow.output_channels(4) == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"path": "cosine"}, "path must be one of linear, gvp, vp; got 'cosine'"),
        ({"target": "eps"}, "target must be one of velocity, noise, score; got 'eps'"),
        ({"weighting": "snr"}, "weighting must be one of none, velocity, likelihood"),
        ({"weighting": "velocity"}, "weighting is for the targets noise and score"),
        ({"training_cut": 0.5}, r"training_cut must be in \[0, 0.5\); got 0.5"),
        ({"sampling_cut": -0.1}, r"sampling_cut must be in \[0, 0.5\); got -0.1"),
        ({"path": "vp", "training_cut": 0.0}, "training_cut must be positive"),
        ({"target": "score", "sampling_cut": 0.0}, "sampling_cut must be positive"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Flow(**options)


def test_an_output_with_a_variance_is_refused():
    x, times = jnp.zeros(SHAPE), jnp.full(5, 0.5)
    wide = jnp.zeros((*SHAPE[:-1], 6))
    with pytest.raises(ValueError, match=r"Flow: output must have .* with 3 channels"):
        Flow().prediction(wide, x, times)
    with pytest.raises(ValueError, match="drop those it has too many"):
        Flow().losses(wide, data=x, noise=x, noised=x, times=times)
