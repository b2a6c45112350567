"""What samplers refuse."""

import jax
import jax.numpy as jnp
import pytest

from attnjax.core.errors import UserError
from attnjax.decoding.denoising import sample
from attnjax.tasks.denoising import Flow, Gaussian

PROCESSES = {"ddpm": Gaussian(), "ddim": Gaussian()}


@pytest.mark.parametrize(
    ("sampler", "options", "text"),
    [
        (
            "edm",
            {},
            "sample: unknown sampler 'edm'.*Known: ddim, ddpm, dopri5, euler, heun",
        ),
        ("ddpm", {"num_steps": 1}, "num_steps must be at least 2; got num_steps=1"),
        ("euler", {"num_steps": 0}, "num_steps must be at least 1; got num_steps=0"),
        ("ddpm", {"num_steps": 1001}, "num_steps must not exceed the steps.*=1001"),
        ("ddpm", {"eta": 0.0}, "eta is an option of ddim; got eta=0.0"),
        ("euler", {"eta": 1.0}, "sampler euler: eta is an option of ddim"),
        ("heun", {"clip": 1.0}, "clip is an option of ddpm and ddim; got clip=1.0"),
        ("ddim", {"last_step": "mean"}, "last_step is an option of sde and sde_heun"),
        ("heun", {"diffusion": "sigma"}, "diffusion is an option of sde"),
        ("ddim", {"eta": 1.5}, r"eta must be in \[0, 1\]; got eta=1.5"),
        ("ddpm", {"clip": 0.0}, "clip must be positive; got clip=0.0"),
        ("sde", {"diffusion": "sigm"}, "unknown diffusion 'sigm'. Did you mean sigma"),
        ("sde", {"last_step": "heun"}, "unknown last_step 'heun'.*Known: euler, mean"),
        ("sde", {"last_step_size": 1.0}, r"last_step_size must be in \(0, 1\); got"),
        ("sde_heun", {"num_steps": 1}, "num_steps must be at least 2; got num_steps=1"),
        ("sde", {"rtol": 1e-3}, "rtol is an option of dopri5; got rtol=0.001"),
        ("dopri5", {"atol": 0.0}, "atol must be positive; got atol=0.0"),
        ("sde_heun", {"diffusion": "sbdm"}, "sampler sde_heun: diffusion=sbdm is"),
        ("sde", {"diffusion": "sbdm"}, "diffusion=sbdm is infinite at t = 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(sampler, options, text):
    process = PROCESSES.get(sampler, Flow())
    settings = {"num_steps": 10} | options
    with pytest.raises(UserError, match=text):
        sample(
            lambda x, times: x,
            process,
            shape=(2, 1),
            prng_key=jax.random.key(0),
            sampler=sampler,
            **settings,
        )


def refused(process, sampler, text, **options):
    with pytest.raises(UserError, match=text):
        sample(
            lambda x, times: x,
            process,
            shape=(2, 1),
            prng_key=jax.random.key(0),
            sampler=sampler,
            num_steps=10,
            **options,
        )


def test_samplers_of_the_other_process_are_refused_with_those_allowed():
    refused(Gaussian(), "heun", "one of ddpm, ddim for a process of kind gaussian")
    refused(
        Flow(),
        "ddpm",
        "one of euler, heun, dopri5, sde, sde_heun for a process of kind flow",
    )


def test_a_last_step_that_leaves_no_time_is_refused():
    flow = Flow(sampling_cut=0.3)
    refused(flow, "sde", "must leave time to the steps", last_step_size=0.75)


def test_a_start_of_another_shape_is_refused():
    text = r"start must have the shape of the samples, \(2, 1\); got .*\(2,\)"
    refused(Flow(), "euler", text, start=jnp.zeros(2))


def test_keys_of_another_number_than_rows_are_refused():
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(UserError, match=r"one a row; got keys of shape \(3,\)"):
        sample(
            lambda x, times: x,
            Flow(),
            shape=(2, 1),
            prng_key=keys,
            sampler="euler",
            num_steps=2,
        )
