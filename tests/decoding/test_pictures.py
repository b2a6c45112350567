"""Images drawn from a denoiser, and the sheets that show them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.decoding import pictures
from attnjax.models import dit
from attnjax.tasks.diffusion import Config, Diffusion
from attnjax.training.settings import DrawConfig

SMALL = dict(embed_dim=8, num_heads=2, num_layers=1, patch_size=2, mlp_dim=8)
FEW = DrawConfig(steps=3, guidance=2.0)


def task_of(label_dropout=0.1, process="flow"):
    given = {**SMALL, "label_dropout": label_dropout}
    config = schema.build(dit.Config, dit.resolve(given))
    noise = {"noise": {"process": process}}
    made = schema.build(Config, schema.resolve(Config, noise, path="config.task"))
    channels = 1 if process == "flow" else 2
    model = dit.DiT(
        config, image_size=4, channels=1, out_channels=channels, num_classes=3
    )
    return Diffusion(made, model)


def start(task, seed=0):
    rng = np.random.default_rng(seed)
    params, buffers = jax.eval_shape(task.model.init, 0)
    params = jax.tree.map(
        lambda a: (0.2 * rng.normal(size=a.shape)).astype(np.float32), params
    )
    return params, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), buffers)


@pytest.mark.parametrize("process", ["flow", "gaussian"])
def test_draws_follow_their_label_and_their_seed(process):
    task = task_of(process=process)
    state = start(task)

    def drawn(labels, **changes):
        settings = dataclasses.replace(FEW, **changes)
        return np.asarray(pictures.draw(task, *state, labels, settings=settings)[0])

    first = drawn([0, 1])
    assert first.shape == (2, 4, 4, 1) and np.all(np.isfinite(first))
    other = drawn([0, 2])
    np.testing.assert_array_equal(first[0], other[0])
    assert np.any(first[1] != other[1])
    assert np.any(first != drawn([0, 1], seed=1))
    for other in ({"guidance": 1.0}, {"rescale": 1.0}, {"steps": 2}):
        assert np.any(first != drawn([0, 1], **other)), other


def test_guidance_needs_a_model_that_was_trained_without_classes():
    task = task_of(label_dropout=0.0)
    with pytest.raises(UserError, match="got guidance=2, config.model.label_dropout=0"):
        pictures.draw(task, *start(task), [0], settings=FEW)
    plain = dataclasses.replace(FEW, guidance=1.0)
    images, evaluations = pictures.draw(task, *start(task), [0], settings=plain)
    assert images.shape[0] == 1 and evaluations == 6


def test_perturbed_heads_push_the_draw_and_numbers_compile_once():
    task = task_of(label_dropout=0.0)
    state = start(task)
    base = DrawConfig(steps=2, sampler="euler")

    def drawn(**changes):
        settings = dataclasses.replace(base, **changes)
        return np.asarray(pictures.draw(task, *state, [0, 1], settings=settings)[0])

    plain = drawn()
    before = pictures._program.cache_info().misses
    pushed = drawn(perturb_scale=2.0)
    named = drawn(perturb_scale=2.0, perturb_heads="0:0,1")
    weaker = drawn(perturb_scale=1.0, perturb_strength=0.5, perturb_heads="0:1")
    assert pictures._program.cache_info().misses == before + 1
    np.testing.assert_array_equal(named, pushed)
    assert np.abs(pushed - plain).max() > 1e-3
    assert np.abs(weaker - plain).max() > 1e-4
    assert np.abs(weaker - pushed).max() > 1e-4
    # Of one euler step, the push is the velocity that the heads make.
    one = {"steps": 1, "perturb_heads": "0:1"}
    first, second = (drawn(perturb_scale=w, **one) for w in (1.0, 3.0))
    still = drawn(steps=1)
    np.testing.assert_allclose(second - still, 3 * (first - still), atol=1e-5)
    # The second of two steps begins at noise level 1/2, where nothing is left.
    half = drawn(perturb_scale=2.0, perturb_decay=4.0)
    near = drawn(perturb_scale=2.0, perturb_interval=(0.6, 1.0))
    np.testing.assert_allclose(half, near, atol=1e-6)
    assert np.abs(half - pushed).max() > 1e-4
    with pytest.raises(UserError, match="layers must be in 0..0; got layer 1"):
        drawn(perturb_scale=1.0, perturb_heads="1:all")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"perturb_scale": -1.0}, "perturb_scale must not be negative; got -1.0"),
        ({"perturb_heads": "0:0"}, "perturb_heads does nothing without perturb_scale"),
        ({"perturb_scale": 1.0, "perturb": "mean"}, "'mean'. Did you mean mean_query"),
        ({"perturb_scale": 1.0, "perturb_decay": -1.0}, "not be negative; got -1.0"),
        ({"perturb_decay": 1.0}, "perturb_decay does nothing without perturb_scale"),
        (
            {"perturb_scale": 1.0, "perturb": "temperature"},
            "perturb_strength does nothing at 1, as the temperature",
        ),
        (
            {"perturb_scale": 1.0, "perturb": "temperature", "perturb_strength": 0.0},
            "must be positive, as the temperature; got 0.0. perturb=largest",
        ),
        ({"perturb_scale": 1.0, "perturb_strength": 1.5}, r"in \(0, 1\]; got 1.5"),
        ({"perturb_scale": 1.0, "perturb_heads": "x"}, "must be 'all' or layers"),
        ({"perturb_scale": 1.0, "perturb_interval": [0.6, 0.2]}, "two rising noise"),
        ({"sampler_options": "clip"}, "options with their values, each once"),
        ({"sampler_options": "clip=1,clip=2"}, "options with their values, each once"),
        ({"sampler_options": "last=mean"}, "unknown option 'last'. Did you mean"),
        ({"sampler_options": "clip=x"}, "clip must be a number; got 'x'"),
        ({"rescale": 2.0}, r"rescale must be in \[0, 1\]; got 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        DrawConfig(**options)


def test_a_sampler_of_the_other_process_is_refused():
    task = task_of()
    settings = dataclasses.replace(FEW, sampler="ddpm")
    with pytest.raises(UserError, match="ddpm"):
        pictures.draw(task, *start(task), [0], settings=settings)


def test_options_of_a_sampler_reach_it(monkeypatch):
    task, asked = task_of(), []

    def sample(denoise, process, *, shape, **given):
        del denoise, process
        asked.append(given)
        return jnp.zeros(shape), jnp.int32(3)

    monkeypatch.setattr(pictures.denoising, "sample", sample)
    options = " last_step = tweedie, last_step_size=0.1"
    settings = DrawConfig(sampler="sde", steps=2, sampler_options=options)
    assert pictures.draw(task, *start(task), [0], settings=settings)[1] == 3
    wanted = {"sampler": "sde", "num_steps": 2, "last_step": "tweedie"}
    wanted |= {"last_step_size": 0.1, "eta": None}
    assert {name: asked[0][name] for name in wanted} == wanted
    settings = DrawConfig(sampler_options="eta=1")
    with pytest.raises(UserError, match="sampler heun: eta is an option of ddim"):
        pictures.check(task, settings)


def test_pixels_undo_the_normalisation():
    data = types.SimpleNamespace(
        mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), is_latent=False
    )
    levels = np.asarray([[0, 51, 255], [255, 0, 102]], np.uint8).reshape(2, 1, 1, 3)
    images = (levels / 255 - np.asarray(data.mean)) / np.asarray(data.std)
    np.testing.assert_array_equal(pictures.pixels(images, data), levels)
    far = np.asarray([9.0, -9.0, 9.0]).reshape(1, 1, 1, 3)
    assert pictures.pixels(far, data).ravel().tolist() == [255, 0, 255]
    assert not pictures.pixels(far * np.nan, data).any()


def test_a_sheet_has_its_images_in_rows():
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones(
        (1, 8, 8, 1), "u1"
    )
    whole = pictures.sheet(images, columns=2)
    assert whole.shape == (66, 66)
    corners = [whole[0, 0], whole[0, 65], whole[65, 0], whole[65, 65]]
    assert corners == [0, 1, 2, 3] and whole[32, 0] == 255
    colour = pictures.sheet(np.zeros((2, 40, 40, 3), np.uint8), columns=2)
    assert colour.shape == (40, 82, 3)
    with pytest.raises(ValueError, match="columns=3 must divide 4"):
        pictures.sheet(images, columns=3)
