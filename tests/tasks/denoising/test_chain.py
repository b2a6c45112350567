"""Tables of Gaussian chains against Bayes' rule and the composition of single steps."""

import numpy as np
import pytest

from attnjax.tasks.denoising.chain import betas, chain, respaced, spaced_times

STEPS = 53


def test_the_linear_schedule_is_the_authors_and_scales_with_the_number_of_steps():
    beta = betas("linear", 1000)
    np.testing.assert_allclose(beta[[0, -1]], [1e-4, 0.02], rtol=1e-15)
    np.testing.assert_allclose(np.diff(beta), (0.02 - 1e-4) / 999, rtol=1e-9)
    np.testing.assert_allclose(betas("linear", 250)[[0, -1]], [4e-4, 0.08], rtol=1e-15)


def test_the_cosine_schedule_keeps_the_squared_cosine_up_to_its_last_clipped_step():
    beta = betas("cosine", 1000)
    half = np.pi / 2
    ahead = np.cos((np.array([0.25, 0.5]) + 0.008) / 1.008 * half) ** 2
    expected = ahead / np.cos(0.008 / 1.008 * half) ** 2
    np.testing.assert_allclose(chain(beta).alpha_bar[[249, 499]], expected, rtol=1e-12)
    assert beta[-1] == 0.999
    assert beta[-2] < 0.999


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noise_after_k_steps_is_that_of_k_single_steps(schedule):
    tables = chain(betas(schedule, STEPS))
    mean, variance = 1.0, 0.0
    for k, beta in enumerate(tables.beta):
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
        np.testing.assert_allclose(np.sqrt(tables.alpha_bar[k]), mean, rtol=1e-12)
        np.testing.assert_allclose(1 - tables.alpha_bar[k], variance, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [STEPS, 11])
def test_the_posterior_is_that_of_bayes_rule(num_steps):
    tables = respaced(chain(betas("linear", STEPS)), num_steps)
    data, noised = 0.7, -1.3
    for k in range(1, num_steps):
        beta, before = tables.beta[k], tables.alpha_bar_before[k]
        # Precisions of x_{k-1} from the data and from x_k add up.
        precision = 1 / (1 - before) + (1 - beta) / beta
        pulled = np.sqrt(before) * data / (1 - before)
        pulled += np.sqrt(1 - beta) * noised / beta
        mean = tables.data_weight[k] * data + tables.noised_weight[k] * noised
        np.testing.assert_allclose(mean, pulled / precision, rtol=1e-10)
        variance = np.exp(tables.posterior_log_variance[k])
        np.testing.assert_allclose(variance, 1 / precision, rtol=1e-10)
    assert tables.posterior_log_variance[0] == tables.posterior_log_variance[1]
    # The first step's posterior is the data itself.
    np.testing.assert_allclose(tables.data_weight[0], 1.0)
    assert tables.noised_weight[0] == 0.0


def test_respaced_steps_keep_the_ends_and_the_noise_of_their_times():
    full = chain(betas("linear", 1000))
    short = respaced(full, 250)
    assert len(short) == 250
    assert short.times[:5].tolist() == [0, 4, 8, 12, 16]
    # 124 strides of 999/249 are 497.49..., 125 are 501.50...
    assert short.times[[124, 125, -1]].tolist() == [497, 502, 999]
    assert np.all(np.diff(short.times) > 0)
    np.testing.assert_allclose(short.alpha_bar, full.alpha_bar[short.times], rtol=1e-12)


def test_respacing_to_all_steps_is_the_identity():
    full = chain(betas("linear", STEPS))
    assert spaced_times(STEPS, STEPS).tolist() == list(range(STEPS))
    assert respaced(full, STEPS) is full
    kept = full.alpha_bar
    again = chain(1 - kept / np.append(1.0, kept[:-1]))
    np.testing.assert_allclose(again.beta, full.beta, rtol=1e-10)


def test_half_strides_round_to_even():
    # A stride of 2.5: 2.5 and 12.5 fall, 7.5 rises.
    assert spaced_times(16, 7).tolist() == [0, 2, 5, 8, 10, 12, 15]


def test_a_linear_schedule_of_few_steps_is_refused():
    with pytest.raises(ValueError, match=r"steps must be more than 20.*got steps=20"):
        betas("linear", 20)
    assert betas("linear", 21)[-1] < 1
