"""Guided predictions against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.decoding.denoising import sample
from attnjax.decoding.guidance import Push, guided, perturbed_guidance
from attnjax.tasks.denoising import Gaussian

NULL = 9
LABELS = jnp.array([2, 5, 1])
TIMES = jnp.array([10, 400, 990])
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 4)), jnp.float32)


class Network:
    """An output of 4 channels and a variance that both depend on the label."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, times, labels):
        self.batches.append(len(x))
        tilt = jnp.sin(labels + 0.01 * times).reshape(-1, 1, 1, 1)
        return jnp.concatenate([x * (1 + tilt) + tilt, x + 2 * tilt], axis=-1)


def halves():
    network = Network()
    return network(X, TIMES, LABELS), network(X, TIMES, jnp.full_like(LABELS, NULL))


def run(scale, **options):
    network = Network()
    options = {"null_label": NULL} | options
    fn = guided(network, scale=scale, labels=LABELS, **options)
    return fn(X, TIMES), network


def test_a_scale_of_one_is_the_conditional_prediction_at_half_the_cost():
    output, network = run(1.0)
    np.testing.assert_array_equal(output, halves()[0])
    assert network.batches == [3]


def test_a_scale_of_zero_is_the_prediction_without_a_label():
    output, network = run(0.0)
    np.testing.assert_array_equal(output[..., :4], halves()[1][..., :4])
    assert network.batches == [6]


@pytest.mark.parametrize("channels", [None, 3, 4])
def test_guided_channels_are_pushed_and_the_rest_is_the_conditional_halfs(channels):
    output, _ = run(2.5, channels=channels)
    (with_label, without), count = halves(), channels or 4
    pushed = without + 2.5 * (with_label - without)
    np.testing.assert_allclose(output[..., :count], pushed[..., :count], rtol=1e-5)
    np.testing.assert_array_equal(output[..., count:], with_label[..., count:])


def test_guidance_acts_within_its_interval_of_noise_levels():
    outside = np.array([0, 2])
    output, _ = run(3.0, interval=(0.2, 0.6), level=Gaussian().level)
    everywhere, with_label = run(3.0)[0], halves()[0]
    # One program and another round otherwise where products are fused with sums.
    np.testing.assert_allclose(output[outside], with_label[outside], rtol=1e-6)
    np.testing.assert_allclose(output[1], everywhere[1], rtol=1e-5)


def test_steps_outside_the_interval_run_the_conditional_pass_alone():
    ran = []

    def network(x, times, labels):
        jax.debug.callback(lambda x: ran.append(len(x)), x)
        return x

    options = {"interval": (0.2, 0.6), "level": Gaussian().level}
    fn = guided(network, scale=3.0, labels=LABELS, null_label=NULL, **options)
    for time in (100, 400, 900):
        jax.block_until_ready(fn(X, jnp.full(3, time)))
        jax.effects_barrier()
    assert ran == [3, 6, 3]


def test_rescaled_predictions_have_the_conditional_ones_spread():
    plain, (with_label, _) = run(4.0)[0][..., :4], halves()
    full, half = run(4.0, rescale=1.0)[0], run(4.0, rescale=0.5)[0][..., :4]
    spread = np.std(with_label[..., :4], axis=(1, 2, 3))
    np.testing.assert_allclose(full[..., :4].std(axis=(1, 2, 3)), spread, rtol=1e-5)
    np.testing.assert_allclose(half, (plain + full[..., :4]) / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(full[..., 4:], with_label[..., 4:])


def test_a_traced_scale_and_half_precision_are_kept():
    def network(x, times, labels):
        return x.astype(jnp.bfloat16) * labels.reshape(-1, 1, 1, 1)

    @jax.jit
    def go(scale):
        fn = guided(network, scale=scale, labels=LABELS, null_label=NULL)
        return fn(X, TIMES)

    assert go(jnp.float32(1.5)).dtype == jnp.bfloat16
    expected = X * (NULL + (LABELS.reshape(-1, 1, 1, 1) - NULL))
    np.testing.assert_allclose(go(1.0).astype(jnp.float32), expected, rtol=0.05)


def test_a_guided_network_can_be_sampled():
    labels = jnp.array([2, 5, 1])
    fn = guided(Network(), scale=2.0, labels=labels, null_label=NULL, channels=3)
    options = {"sampler": "ddpm", "num_steps": 3, "shape": (3, 2, 2, 4)}
    x = sample(fn, Gaussian(), prng_key=jax.random.key(0), **options)
    assert x.shape == (3, 2, 2, 4)


class Perturbed(Network):
    """The same network with another output."""

    def __call__(self, x, times, labels):
        return super().__call__(x, times, labels) + jnp.cos(3 * jnp.tile(x, 2))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_push_adds_to_the_guided_prediction_of_one_more_pass(scale):
    perturbed = Perturbed()
    (f_c, f_u), f_pert = halves(), perturbed(X, TIMES, LABELS)
    perturbed.batches.clear()
    output, network = run(scale, push=Push(perturbed, 3.0), channels=3)
    assert network.batches == [3 if scale == 1 else 6] and perturbed.batches == [3]
    expected = f_u + scale * (f_c - f_u) + 3.0 * (f_c - f_pert)
    np.testing.assert_allclose(output[..., :3], expected[..., :3], rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(output[..., 3:], f_c[..., 3:])
    rescaled, _ = run(scale, push=Push(perturbed, 3.0), rescale=1.0)
    spreads = (np.std(a[..., :4], axis=(1, 2, 3)) for a in (rescaled, f_c))
    np.testing.assert_allclose(*spreads, rtol=1e-5, atol=1e-6)


def test_a_push_without_weight_costs_nothing_and_without_a_change_does_nothing():
    perturbed = Perturbed()
    for scale in (1.0, 2.5):
        output, _ = run(scale, push=Push(perturbed, 0.0))
        np.testing.assert_array_equal(output, run(scale)[0])
        same, _ = run(scale, push=Push(Network(), jnp.float32(7.0)))
        np.testing.assert_allclose(same, output, rtol=1e-6)
    assert perturbed.batches == []


def test_a_push_acts_within_its_interval_and_runs_nowhere_else():
    ran = []

    def perturbed(x, times, labels):
        jax.debug.callback(lambda x: ran.append(len(x)), x)
        return Perturbed()(x, times, labels)

    push, level = Push(perturbed, 3.0, (0.2, 0.6)), Gaussian().level
    outside = np.array([0, 2])
    output, _ = run(2.5, push=push, level=level)
    whole = run(2.5, push=Push(Perturbed(), 3.0))[0]
    plain = run(2.5)[0]
    np.testing.assert_array_equal(output[outside], plain[outside])
    np.testing.assert_allclose(output[1], whole[1], rtol=1e-5)
    fn = guided(
        Network(), scale=1.0, labels=LABELS, null_label=None, level=level, push=push
    )
    for time in (100, 900):
        jax.block_until_ready(fn(X, jnp.full(3, time)))
    jax.effects_barrier()
    assert ran == [3]


def test_a_push_that_decays_weighs_less_the_less_noise_there_is():
    weight, decay = 3.0, 4.0
    level = Gaussian().level
    # max(0, w - a (1000 - t)) of steps 1..1000, which here count from 0 to 999.
    left = np.maximum(0, weight - decay * (1 - np.asarray(TIMES) / 999))
    assert left[0] == 0 < left[1] < left[2] < weight
    (f_c, f_u), f_pert = halves(), Perturbed()(X, TIMES, LABELS)
    for d in (decay, jnp.float32(decay)):
        push = Push(Perturbed(), weight, decay=d)
        output, _ = run(2.5, push=push, level=level)
        expected = f_u + 2.5 * (f_c - f_u)
        expected += left.reshape(-1, 1, 1, 1) * (f_c - f_pert)
        np.testing.assert_allclose(
            output[..., :4], expected[..., :4], rtol=2e-4, atol=1e-5
        )
    both = Push(Perturbed(), weight, (0.0, 0.6), decay)
    output, _ = run(2.5, push=both, level=level)
    np.testing.assert_array_equal(output[2], run(2.5)[0][2])
    assert np.abs(output[1] - run(2.5)[0][1]).max() > 0.01


def test_perturbed_guidance_pushes_away_from_the_perturbed_pass():
    f_c, f_pert, f_u = X[0], X[1], X[2]
    alone = perturbed_guidance(f_c, f_pert, weight=3.0)
    np.testing.assert_allclose(alone, f_c + 3 * (f_c - f_pert), rtol=1e-5)
    both = perturbed_guidance(f_c, f_pert, weight=3.0, f_u=f_u, scale=2.0)
    expected = f_u + 2 * (f_c - f_u) + 3 * (f_c - f_pert)
    np.testing.assert_allclose(both, expected, rtol=1e-5)
    # A pass that is not perturbed guides nowhere.
    np.testing.assert_array_equal(perturbed_guidance(f_c, f_c, weight=3.0), f_c)
    with pytest.raises(UserError, match="scale needs f_u.*got scale=2.0, f_u=None"):
        perturbed_guidance(f_c, f_pert, weight=3.0, scale=2.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": -1.0}, "scale must not be negative; got scale=-1.0"),
        ({"channels": 5}, "channels must be in 1..4, the channels of the data; got"),
        ({"channels": 0}, "channels must be in 1..4"),
        ({"interval": (0.6, 0.2)}, "interval must be two rising noise levels"),
        ({"interval": (0.2, 0.6)}, "an interval needs level.*level=None"),
        ({"null_label": None}, "scale needs a null_label.*got scale=2.0"),
        ({"push": Push(Network(), -1.0)}, "weight of a push must not be negative; got"),
        ({"push": Push(Network(), 1.0, (0.5, 1.5))}, "two rising noise levels"),
        ({"push": Push(Network(), 1.0, (0.2, 0.6))}, "an interval needs level"),
        ({"push": Push(Network(), 1.0, decay=-1.0)}, "decay of a push must not be"),
        ({"push": Push(Network(), 1.0, decay=1.0)}, "a decay needs level"),
        ({"rescale": 1.5}, r"rescale must be in \[0, 1\]; got rescale=1.5"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        run(**({"scale": 2.0} | options))
