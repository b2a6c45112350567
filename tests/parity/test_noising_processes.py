"""Noising processes and their samplers against the schedulers of diffusers.

Theirs take one step at a time: each is given what ours had before it, the same output
of a network and the same noise, and makes what ours had after it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
pytest.importorskip("diffusers", reason="extra `parity` is not installed")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from attnjax.decoding import denoising  # noqa: E402
from attnjax.decoding.denoising import chains  # noqa: E402
from attnjax.tasks.denoising import Flow, Gaussian  # noqa: E402

pytestmark = pytest.mark.parity
STEPS, SHAPE, CLIP = 1000, (2, 3), 0.8
# Of the largest entry of a step. The tables are float64 on both sides.
TIGHT = 2e-6
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def values(seed, count=None):
    shape = SHAPE if count is None else (count, *SHAPE)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


START, NOISE = values(0), values(1)


def output_of(x, times, channels):
    """A network: another answer for each entry and time."""
    share = jnp.cos(0.01 * times.astype(jnp.float32) + 1.0)[:, None]
    return jnp.concatenate([0.7 * x - share, jnp.sin(3 * x)], axis=-1)[..., :channels]


def visited(process, **options):
    """[K] times, and [K + 1] states from the first noise to the data."""
    seen = []

    def note(x, time):
        seen.append((time.item(), np.array(x)))

    def denoise(x, times):
        jax.debug.callback(note, x, times[0], ordered=True)
        return output_of(x, times, process.output_channels(SHAPE[-1]))

    run = jax.jit(
        functools.partial(denoising.sample, denoise, process, shape=SHAPE, **options)
    )
    last = run(prng_key=jax.random.key(0), start=jnp.asarray(START))
    jax.effects_barrier()
    times, states = zip(*seen, strict=True)
    return times, [*states, np.asarray(last)]


def output_at(x, time, process):
    times = jnp.full((len(x),), time)
    return np.asarray(output_of(x, times, process.output_channels(SHAPE[-1])))


def largest_gap(process, times, states, step):
    """Of all steps: the largest difference, of the largest entry after the step."""
    gaps = []
    for time, before, after in zip(times, states[:-1], states[1:], strict=True):
        out = torch.tensor(output_at(before, time, process))
        other = step(out, time, torch.tensor(before)).numpy()
        gaps.append(np.abs(other - after).max() / np.abs(after).max())
    return max(gaps)


def widened(scheduler):
    """Its tables in float64, as ours; theirs of float32 say the same, less exactly."""
    betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, dim=0)
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), kept, rtol=1e-5, atol=0
    )
    scheduler.alphas_cumprod = kept
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def same_noise(monkeypatch):
    """Every step draws NOISE, on both sides."""
    given = torch.from_numpy(NOISE)
    monkeypatch.setattr(chains, "normal", lambda *_, **__: jnp.asarray(NOISE))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: given)


def in_columns(step):
    """Channels are their second axis, and our last: here both."""
    return lambda out, time, x: step(out, int(time), x).prev_sample


@pytest.mark.parametrize(
    ("target", "num_steps", "clip"), [("eps", STEPS, None), ("v", 5, CLIP)]
)
def test_ancestral_steps_of_a_learned_variance_are_theirs(
    monkeypatch, target, num_steps, clip
):
    """DDPMScheduler with learned_range, over all steps and over a few of them."""
    same_noise(monkeypatch)
    process = Gaussian(steps=STEPS, target=target)
    times, states = visited(process, sampler="ddpm", num_steps=num_steps, clip=clip)
    assert len(times) == num_steps and (times[0], times[-1]) == (STEPS - 1, 0)

    def make():
        theirs = DDPMScheduler(
            num_train_timesteps=STEPS,
            variance_type="learned_range",
            prediction_type=PREDICTIONS[target],
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
        )
        theirs.set_timesteps(timesteps=times)
        return theirs

    gap = functools.partial(largest_gap, process, times, states)
    assert gap(in_columns(widened(make()).step)) < TIGHT
    # 1 - a_t / a_{t-1} of float32 has three digits where it is 1e-4.
    assert gap(in_columns(make().step)) < 1e-3


@pytest.mark.parametrize(
    ("target", "num_steps", "eta", "clip"),
    [
        ("eps", STEPS, None, None),
        ("eps", 4, 0.7, CLIP),
        ("v", 4, None, None),
        ("x0", 4, 1.0, None),
    ],
)
def test_implicit_steps_are_theirs(monkeypatch, target, num_steps, eta, clip):
    """DDIMScheduler, with and without noise; clipped data take their noise along."""
    same_noise(monkeypatch)
    process = Gaussian(steps=STEPS, target=target, learn_sigma=False)
    times, states = visited(
        process, sampler="ddim", num_steps=num_steps, eta=eta, clip=clip
    )
    theirs = widened(
        DDIMScheduler(
            num_train_timesteps=STEPS,
            prediction_type=PREDICTIONS[target],
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
        )
    )
    # Their steps are 1000 // this long; ours begin and end at the ends of the chain.
    stride = int(times[-2] - times[-1])
    theirs.num_inference_steps = STEPS // stride
    assert set(np.diff(times)) == {-stride}
    step = functools.partial(
        theirs.step,
        eta=eta or 0.0,
        use_clipped_model_output=clip is not None,
        variance_noise=torch.from_numpy(NOISE) if eta else None,
    )
    assert largest_gap(process, times, states, in_columns(step)) < TIGHT


def test_euler_steps_of_a_flow_are_theirs():
    """FlowMatchEulerDiscreteScheduler: sigma is 1 - t, and its velocity turns back."""
    process, num_steps = Flow(path="linear"), 7
    times, states = visited(process, sampler="euler", num_steps=num_steps)
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps))
    np.testing.assert_allclose(theirs.sigmas, 1 - np.append(times, 1.0), atol=1e-7)
    clock = iter(theirs.timesteps)

    def step(out, time, x):
        return theirs.step(-out, next(clock), x).prev_sample

    assert largest_gap(process, times, states, step) < TIGHT


def test_noised_data_and_targets_are_theirs():
    """add_noise and get_velocity of DDPMScheduler, scale_noise of the flow's."""
    times = np.asarray([0, 1, 500, 999])
    data, noise = values(2, len(times)), values(3, len(times))
    told = (torch.from_numpy(data), torch.from_numpy(noise), torch.from_numpy(times))
    process = Gaussian(steps=STEPS, target="v", learn_sigma=False)
    noised = process.noised(data, noise, jnp.asarray(times))
    theirs = DDPMScheduler(num_train_timesteps=STEPS)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    # Their sqrt(1 - a_t) is of float32: 1e-4 there is known to 6e-8 before its root.
    close(noised, theirs.add_noise(*told).numpy(), atol=2e-5)
    velocity = jnp.asarray(theirs.get_velocity(*told).numpy())
    losses = process.losses(
        velocity, data=data, noise=noise, noised=noised, times=jnp.asarray(times)
    )
    close(losses["loss"], 0.0, atol=1e-8)
    close(
        process.prediction(velocity, noised, jnp.asarray(times)).data, data, atol=1e-4
    )

    flow, theirs = Flow(path="linear"), FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    scaled = theirs.scale_noise(told[0], theirs.timesteps, told[1])
    own = flow.noised(data, noise, jnp.asarray([0.0, 0.25, 0.5, 0.75], jnp.float32))
    close(own, scaled.numpy())
