"""A run that reads captions, opened: what it draws, from the front door too."""

import dataclasses
import json
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from attnjax import generate
from attnjax.core.errors import UserError
from attnjax.decoding import denoising, guidance, pictures
from attnjax.decoding import run as runs
from attnjax.models import text_encoder
from attnjax.tasks.denoising import perturbing
from attnjax.training import experiment
from attnjax.training.settings import DrawConfig

TEXT = {"num_layers": 1, "embed_dim": 4, "num_heads": 2, "max_len": 10}
MODEL = {"name": "mmdit", "patch_size": 4, "num_layers": 1, "embed_dim": 8}
MODEL |= {"num_heads": 2, "mlp_dim": 8, "time_features": 8, "text": TEXT}
HOW = {"steps": 1, "sampler": "euler", "guidance": 2.0}


def opened(path, **options):
    """A run of random arrays on `digits`; no data is opened."""
    task = {"noise": {"process": "flow"}}
    draw = {"draw": {"per_class": 0}}
    given = {"model": MODEL | options, "task": task, "eval": draw}
    config = experiment.resolve(given)
    model = experiment.build_model(config, {"image_size": 8, "channels": 1})
    rng = np.random.default_rng(0)
    params, buffers = jax.eval_shape(model.init, 0)
    params = jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), params
    )
    (path / "config.json").write_text(json.dumps(config))
    names = tuple("0123456789")
    return runs.LoadedCaptioned(path, config, model, params, buffers, 0, names)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("run"))


def test_classes_are_drawn_as_their_captions(run):
    rows = run.prompts(["a three", "an eight", ""])
    np.testing.assert_array_equal(run.labels(["3", 8, "no_class"]), rows)
    images = run.draw_prompts(["a zero", "a one"], **HOW)
    assert images.shape == (2, 8, 8, 1) and np.all(np.isfinite(images))
    np.testing.assert_array_equal(run.draw([0, 1], **HOW), images)
    other = run.draw_prompts(["a zero", "a two"], **HOW)
    np.testing.assert_array_equal(other[0], images[0])
    assert np.any(other[1] != images[1])


def test_a_draw_encodes_its_captions_once(run, monkeypatch):
    """Whatever its steps; the images are those of encoding at every step."""
    how = {"steps": 3, "sampler": "heun", "guidance": 2.0}
    how |= {"perturb_scale": 0.5, "perturb_interval": (0.2, 0.9)}
    how |= {"perturb": "image_identity"}
    settings = DrawConfig(**how)
    texts = ("a zero", "an eight")
    told = jnp.asarray(run.prompts(texts))
    task = dataclasses.replace(run).task
    encode, times = text_encoder.TextEncoder.__call__, []

    def counted(self, captions, **more):
        jax.debug.callback(lambda: times.append(len(captions)))
        return encode(self, captions, **more)

    monkeypatch.setattr(text_encoder.TextEncoder, "__call__", counted)
    state = (task, run.params, run.buffers)
    found = np.asarray(pictures.draw(*state, told, settings=settings)[0])
    jax.effects_barrier()
    assert times == [len(texts) + 1]
    monkeypatch.undo()

    model, process = task.model, task.process
    moved, pairs = perturbing.choose(model, target="image_identity", heads="all")
    shares = jnp.asarray(moved.shares(pairs, 1.0))

    def network(x, times, captions, shares=None):
        ctx = model.context(batch=len(x))
        ctx = ctx if shares is None else moved.context(ctx, shares)
        arrays = (run.params, run.buffers, x, process.embedded(times), captions)
        return model.predict(*arrays, ctx)[0]

    push = guidance.Push(partial(network, shares=shares), 0.5, (0.2, 0.9))
    guided = guidance.guided(
        network,
        scale=2.0,
        labels=told,
        null_label=model.null_label,
        level=process.level,
        push=push,
    )
    wanted = denoising.sample(
        guided,
        process,
        shape=found.shape,
        prng_key=jax.random.key(0),
        sampler="heun",
        num_steps=3,
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_generate_draws_a_caption(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "load_run", lambda *_, **__: run)
    out = tmp_path / "some.png"
    words = ["--workdir", str(run.path), "--out", str(out), "--num_steps", "1"]
    words += ["--num", "2", "--sampler", "euler", "--guidance", "2"]
    generate.main([*words, "--prompt", "a one"])
    assert "2 of each of 'a one'; 1 predictions" in capsys.readouterr().out
    found = np.asarray(Image.open(out))
    assert found.shape == (2 * 34 - 2, 32)
    wanted = run.pixels(run.draw_prompts(["a one"] * 2, **HOW))[0, ..., 0]
    np.testing.assert_array_equal(found[:32:4, ::4], wanted)
    for more, message in (
        (["--prompt", "a", "--labels", "7"], "is drawn alone; got --labels too"),
        (["--prompt", "seventeen!"], "prompt: a caption has at most 9 bytes"),
        (["--temperature", "1"], "--temperature: does nothing for a denoiser"),
    ):
        with pytest.raises(UserError, match=message):
            generate.main([*words, *more])


def test_a_picture_has_a_class_a_column(run):
    corpus = types.SimpleNamespace(num_classes=10, class_names=run.class_names)
    run.feed.corpus = corpus
    draw = DrawConfig(per_class=1, classes=2, **HOW)
    here = types.SimpleNamespace(
        eval=types.SimpleNamespace(draw=draw),
        corpus=corpus,
        feed=run.feed,
        task=run.task,
        data=run.feed.data,
        mesh=types.SimpleNamespace(size=1),
    )
    state = {"params": run.params, "buffers": run.buffers}
    found = pictures.sample_sheet(here, state)
    images = run.pixels(run.draw_prompts(["a zero", "a one"], **HOW))
    np.testing.assert_array_equal(found, pictures.sheet(images, columns=2))


def test_captions_that_cannot_be_read_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"must be UTF-8; got 'a \\udcff', whose .* 3"):
        run.prompts(["a \udcff"])
    with pytest.raises(UserError, match="unknown class 'a three'"):
        run.labels(["a three"])
    sure = opened(tmp_path, caption_dropout=0.0)
    with pytest.raises(UserError, match="the empty caption needs a model"):
        sure.prompts([""])
    with pytest.raises(UserError, match="without captions; .*caption_dropout=0"):
        sure.draw_prompts(["a one"], **HOW)
