"""Samplers of flows on data N(0, STD^2), whose exact velocity is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.decoding.denoising import sample
from attnjax.decoding.denoising.flows import DIFFUSION
from attnjax.tasks.denoising import Flow
from attnjax.tasks.denoising.sampling import DIFFUSIONS, Settings

STD = 0.6
ROWS = 20_000
START = jnp.linspace(-2, 2, 7)[:, None]


def exact(flow):
    """The exact output for the target of a flow, of rows [B, 1]."""

    def denoise(x, times):
        at = flow.scales(times[:, None])
        variance = at.alpha**2 * STD**2 + at.sigma**2
        slope = at.alpha * at.d_alpha * STD**2 + at.sigma * at.d_sigma
        outputs = {
            "velocity": slope,
            "noise": at.sigma,
            "score": -jnp.ones_like(variance),
        }
        return x * outputs[flow.target] / variance

    return denoise


def draw(flow, *, rows=ROWS, **options):
    """Samples [rows] of a jitted sampler."""
    run = jax.jit(
        functools.partial(sample, exact(flow), flow, shape=(rows, 1), **options)
    )
    return np.asarray(run(prng_key=jax.random.key(0)))[:, 0]


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_the_ode_scales_noise_to_the_data_with_the_order_of_its_steps(
    path, sampler, order
):
    wanted = STD * np.asarray(START)[:, 0]
    flow = Flow(path=path)
    with jax.enable_x64(True):
        start = jnp.asarray(np.asarray(START), jnp.float64)
        off = [
            np.abs(
                draw(flow, sampler=sampler, num_steps=n, rows=7, start=start) - wanted
            ).max()
            for n in (40, 80)
        ]
    np.testing.assert_allclose(off[0] / off[1], 2**order, rtol=0.1)
    assert off[1] < {1: 0.03, 2: 0.001}[order]


@pytest.mark.parametrize(
    "flow",
    [
        Flow(target="noise"),
        Flow(path="gvp", target="score"),
        Flow(path="vp"),
        Flow(path="vp", target="noise"),
    ],
    ids=repr,
)
def test_every_target_moves_along_the_same_ode(flow):
    x = draw(flow, sampler="heun", num_steps=200, rows=7, start=START)
    np.testing.assert_allclose(x, STD * np.asarray(START)[:, 0], atol=0.012)


def test_diffusions_are_those_of_their_names():
    t = jnp.array([0.2, 0.5, 0.9])
    at = Flow(path="gvp").scales(t)
    sigma, turn = np.cos(np.pi * t / 2), np.tan(np.pi * t / 2)
    known = {
        "constant": np.ones(3),
        "sigma": sigma,
        "linear": 1 - t,
        # g = pi/2 (sigma^2 / tan + sigma alpha) = pi/2 / tan.
        "sbdm": np.pi / 2 / turn,
        "decreasing": (np.cos(np.pi * t) + 1) ** 2 / 4,
        "increasing_decreasing": np.sin(np.pi * t) ** 2,
    }
    assert sorted(known) == sorted(DIFFUSION) == sorted(DIFFUSIONS)
    for name, values in known.items():
        np.testing.assert_allclose(DIFFUSION[name](at, t), values, rtol=1e-5)


@pytest.mark.parametrize(
    ("flow", "options"),
    [
        (Flow(), {}),
        (Flow(path="gvp", target="noise"), {"last_step": "mean"}),
        (Flow(path="vp"), {"last_step": "tweedie"}),
        # A last step by the SDE's drift would shrink this: a pull without its noise.
        (Flow(sampling_cut=0.02), {"diffusion": "sbdm", "last_step": "euler"}),
    ],
    ids=["default", "gvp-noise", "vp-tweedie", "sbdm"],
)
def test_the_sde_returns_the_variance_of_the_data(flow, options):
    x = draw(flow, sampler="sde", num_steps=400, **options)
    np.testing.assert_allclose(x.var(), STD**2, rtol=0.04)
    assert abs(x.mean()) < 0.02


@pytest.mark.parametrize("diffusion", ["constant", "sbdm", "increasing_decreasing"])
def test_heun_steps_of_the_sde_return_it_too(diffusion):
    flow = Flow(sampling_cut=0.02)
    options = {"diffusion": diffusion, "last_step": "tweedie", "last_step_size": 0.01}
    x = draw(flow, sampler="sde_heun", num_steps=200, **options)
    np.testing.assert_allclose(x.var(), STD**2, rtol=0.04)


def test_a_heun_step_of_the_sde_adds_its_noise_first():
    # Two steps: one of Heun from t = 0 to 0.9 and the last one by the estimate.
    flow, end = Flow(), 0.9
    options = {"num_steps": 2, "last_step_size": 0.1, "last_step": "tweedie"}
    x = draw(flow, sampler="sde_heun", rows=7, start=START, **options)
    keys = jax.random.split(jax.random.split(jax.random.key(0), 2)[1], 1)
    noise = jax.random.normal(keys[0], START.shape)
    first = np.asarray(START + np.sqrt(2 * end) * noise, np.float64)

    def drift(x, t):
        variance = t**2 * STD**2 + (1 - t) ** 2
        return x * (t * STD**2 - (1 - t) - (1 - t)) / variance

    slope = drift(first, 0.0)
    at = first + end / 2 * (slope + drift(first + end * slope, end))
    variance = end**2 * STD**2 + (1 - end) ** 2
    wanted = (at - (1 - end) ** 2 * at / variance) / end
    np.testing.assert_allclose(x, wanted[:, 0], rtol=1e-4)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_adaptive_steps_reach_the_closed_form_within_their_tolerance(path):
    flow = Flow(path=path)
    wanted = STD * np.asarray(START)[:, 0]
    counts = []
    for rtol in (None, 1e-6):
        x, count = jax.jit(
            functools.partial(
                sample,
                exact(flow),
                flow,
                shape=(7, 1),
                sampler="dopri5",
                num_steps=40,
                start=START,
                rtol=rtol,
                return_evaluations=True,
            )
        )(prng_key=jax.random.key(0))
        tolerance = 1e-6 + (rtol or 1e-3) * np.abs(wanted)
        assert np.all(np.abs(x[:, 0] - wanted) <= tolerance + 2e-6)
        counts.append(int(count))
    assert 20 < counts[0] < counts[1] < 200 and counts[0] % 6 == 1


def test_adaptive_steps_follow_the_absolute_tolerance_too():
    counts = [
        int(
            jax.jit(
                functools.partial(
                    sample,
                    exact(Flow()),
                    Flow(),
                    shape=(7, 1),
                    sampler="dopri5",
                    num_steps=40,
                    start=START,
                    rtol=1e-6,
                    return_evaluations=True,
                    **options,
                )
            )(prng_key=jax.random.key(0))[1]
        )
        for options in ({}, {"atol": 1e-2})
    ]
    assert counts[1] < counts[0] - 12


def test_too_few_adaptive_steps_give_no_number():
    x = draw(Flow(), sampler="dopri5", num_steps=2, rows=7, start=START)
    assert np.isnan(x).all()


@pytest.mark.parametrize(
    ("sampler", "count"), [("euler", 5), ("heun", 10), ("sde", 5), ("sde_heun", 9)]
)
def test_evaluations_are_counted(sampler, count):
    _, found = jax.eval_shape(
        lambda key: sample(
            exact(Flow()),
            Flow(),
            shape=(2, 1),
            prng_key=key,
            sampler=sampler,
            num_steps=5,
            return_evaluations=True,
        ),
        jax.random.key(0),
    )
    assert found.dtype == jnp.int32
    assert Settings(sampler=sampler, num_steps=5).evaluations() == count


def test_the_last_step_is_free_of_noise_and_of_three_kinds():
    t, size = 0.9, 0.1
    variance = t**2 * STD**2 + (1 - t) ** 2
    slope, score = (t * STD**2 - (1 - t)) / variance, -1 / variance
    factors = {
        "mean": 1 + size * (slope + (1 - t) * score),
        "euler": 1 + size * slope,
        "tweedie": (1 + (1 - t) ** 2 * score) / t,
    }
    options = {"sampler": "sde", "num_steps": 3, "last_step_size": size, "rows": 7}
    names = {"mean": None, "euler": "euler", "tweedie": "tweedie"}
    got = {key: draw(Flow(), last_step=name, **options) for key, name in names.items()}
    # All from the same x at t = 0.9.
    for name, factor in factors.items():
        ratio = factor / factors["mean"]
        np.testing.assert_allclose(got[name], ratio * got["mean"], rtol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "evaluations", "times"),
    [
        ("euler", 1, [0.0, 0.25, 0.5, 0.75]),
        ("heun", 2, [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]),
        ("sde", 2, [0.0, 0.32, 0.64, 0.96]),
        ("sde_heun", 3, [0.0, 0.32, 0.32, 0.64, 0.64, 0.96, 0.96]),
    ],
)
def test_the_network_is_traced_once_a_stage_and_asked_at_the_steps_times(
    sampler, evaluations, times
):
    traced, asked = [], []

    def denoise(x, now):
        traced.append(x.shape)
        jax.debug.callback(lambda t: asked.append(t.tolist()), now, ordered=True)
        return x

    run = jax.jit(
        functools.partial(
            sample, denoise, Flow(), shape=(2, 1), sampler=sampler, num_steps=4
        )
    )
    x = run(prng_key=jax.random.key(0))
    jax.effects_barrier()
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(asked, [[t, t] for t in times], atol=1e-6)
    assert traced == [(2, 1)] * evaluations
