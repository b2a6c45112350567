"""Devices that share the tokens of a row train the model that one device trains."""

import json
import random
import re

import jax
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.errors import EXIT_OK, UserError
from attnjax.mixers import gated_attention
from attnjax.models import lm
from attnjax.tasks import language_modelling
from attnjax.training import (
    experiment,
    metrics,
    optimizers,
    run,
    sequence,
    sharding,
)
from attnjax.training.step import Recipe, init_state, make_step

VOCAB, ROWS, LENGTH, STEPS = 11, 4, 16, 3
RING = {"data": 2, "sequence": 4, "sequence_form": "ring"}
WITH_TENSOR = {"data": 2, "tensor": 2, "sequence": 2, "sequence_form": "all_to_all"}
CLIP = {"type": "attention_sink_survey", "weight_map": "clipped"}
SMALL = {"num_layers": 2, "embed_dim": 12, "num_heads": 4, "head_dim": 4, "mlp_dim": 8}


def model_of(dtype="float32", **changes):
    given = {**SMALL, "dtype": dtype, "param_dtype": dtype, **changes}
    return lm.LM(schema.build(lm.Config, lm.resolve(given)), VOCAB)


def batch(step: int) -> dict:
    """Two documents a row, and padding at the end of some."""
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    segments[::2, 5:], positions[::2, 5:] = 2, np.arange(LENGTH - 5)
    segments[1, -3:] = positions[1, -3:] = 0
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": positions,
        "weights": (segments != 0).astype(np.float32),
    }


def on_mesh(model, mesh_config: dict, *, use_segments=True, **task):
    """(mesh, form, form -> task) of a config; a mesh of one device without axes."""
    config = schema.build(sharding.Config, schema.resolve(sharding.Config, mesh_config))
    devices = jax.devices()[:1] if mesh_config == {"data": 1} else None
    mesh = sharding.make_mesh(config, devices)
    rows = sharding.batch_sharding(mesh, leading=0)

    def make_task(form):
        return language_modelling.LanguageModelling(
            language_modelling.Config(**task),
            model,
            use_segments=use_segments,
            rows=rows if mesh.size > 1 else None,
            sequence_form=form,
        )

    form = sequence.choose_form(
        config.sequence_form, make_task=make_task, length=LENGTH, mesh=mesh
    )
    return mesh, form, make_task


def losses(model, mesh_config: dict, **task):
    """Losses, gradient norms and an evaluation of some steps on a mesh."""
    mesh, form, make_task = on_mesh(model, mesh_config, **task)
    rows = sharding.batch_sharding(mesh, leading=0)
    recipe = Recipe(make_task(form), optimizers.Config(learning_rate=3e-2), STEPS, 0)
    places = sharding.shardings(
        jax.eval_shape(lambda: init_state(recipe)), mesh, sharding.RULES
    )
    state = jax.jit(lambda: init_state(recipe), out_shardings=places)()
    step = jax.jit(make_step(recipe), out_shardings=(places, None))

    def placed(index):
        return jax.device_put(sequence.lay_out(batch(index), form, mesh), rows)

    found = []
    for index in range(STEPS):
        state, metrics = step(state, placed(index))
        found += [metrics["loss"], metrics["grad_norm"]]
    sums = jax.jit(recipe.task.evaluate)(state["params"], state["buffers"], placed(7))
    return np.array([*found, sums["nll"], sums["correct"]])


CASES = {
    "ring, alibi, window and sinks": (
        RING,
        {
            "num_layers": 1,
            "positions": "none",
            "mixers": {
                "attention": {
                    "positions": "alibi",
                    "window": 4,
                    "sinks": 1,
                    "weight_map": "sink_logit",
                }
            },
        },
        {},
    ),
    "ring, tensor, shared heads, one document a row": (
        {**WITH_TENSOR, "sequence_form": "ring"},
        {"num_kv_heads": 2, "positions": "learned", "max_len": LENGTH, "num_layers": 1},
        {"use_segments": False, "prefix_len": 3},
    ),
    "states of shared heads, tensor": (
        {**WITH_TENSOR, "sequence_form": "auto"},
        {
            "num_kv_heads": 2,
            "layers": "attention linear_attention",
            "positions": "rope",
            "mixers": {"linear_attention": {"rotary": True, "chunk_size": 2}},
        },
        {},
    ),
    "all to all, tensor, weights taken twice": (
        WITH_TENSOR,
        {"num_kv_heads": 2, "layers": "gated_attention clip", "mixers": {"clip": CLIP}},
        {},
    ),
}


def test_losses_gradients_and_evaluations_of_steps_are_those_of_one_device():
    with jax.enable_x64(True):
        model, task = model_of("float64", num_layers=1), {"loss_chunk": 6}
        wanted = losses(model, {"data": 1}, **task)
        found = losses(model, RING, **task)
    assert wanted[0] != wanted[2]
    np.testing.assert_allclose(found, wanted, atol=1e-9, rtol=0)


def gradients(task, form, mesh):
    """(metrics of a loss, gradients) of the first parameters."""
    arrays = jax.jit(task.model.init)(0)

    def loss(params, buffers, batch):
        given = {"normaliser": 50.0, "prng_key": None, "train": True}
        total, (metrics, _) = task.loss(params, buffers, batch, **given)
        return total, metrics

    placed = sequence.lay_out(batch(3), form, mesh)
    if task.rows is not None:
        placed = jax.device_put(placed, task.rows)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(*arrays, placed)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_device(name):
    config, model, options = CASES[name]
    with jax.enable_x64(True):
        model, found = model_of("float64", **model), []
        for mesh_config in (config, {"data": 1}):
            mesh, form, make_task = on_mesh(model, mesh_config, **options)
            found.append(gradients(make_task(form), form, mesh))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found[1]):
        assert np.any(np.asarray(leaf)), path
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), *found)


def form_of(model, length=LENGTH, **mesh_config):
    """The form that a model gets on 8 devices."""
    config = schema.build(sharding.Config, schema.resolve(sharding.Config, mesh_config))
    mesh = sharding.make_mesh(config)

    def make_task(form):
        return language_modelling.LanguageModelling(
            language_modelling.Config(),
            model,
            use_segments=True,
            rows=sharding.batch_sharding(mesh, leading=0),
            sequence_form=form,
        )

    wanted = config.sequence_form
    return sequence.choose_form(wanted, make_task=make_task, length=length, mesh=mesh)


def test_auto_takes_what_the_layers_can():
    assert form_of(model_of()) is None
    assert form_of(model_of(), sequence=4) == "all_to_all"
    # Six heads, or the three that two devices leave, are not shared by four or two.
    assert form_of(model_of(num_heads=6), sequence=4) == "ring"
    assert form_of(model_of(num_heads=6), sequence=2) == "all_to_all"
    assert form_of(model_of(num_heads=6), sequence=2, tensor=2) == "ring"
    # States are exchanged by any number of heads.
    odd = model_of(num_heads=3, layers="linear_attention")
    assert form_of(odd, sequence=4) == "all_to_all"
    # 12 tokens are no two pieces for each of four devices.
    assert form_of(model_of(), sequence=4, length=12) == "all_to_all"


@pytest.mark.parametrize(
    ("model", "mesh", "text"),
    [
        (
            {"layers": "attention talking_heads"},
            {"sequence": 2},
            "the 2 devices cannot share the tokens of this model's rows. talking_heads"
            ": needs whole rows on each device; got config.mesh.sequence=2. Choose",
        ),
        (
            {"layers": "attention linear_attention"},
            {"sequence": 2, "sequence_form": "ring"},
            "linear_attention: takes tokens in order, as all_to_all; got config.mesh.s"
            "equence_form=ring",
        ),
        (
            {"layers": "clip", "num_heads": 3, "mixers": {"clip": CLIP}},
            {"sequence": 2},
            "sequence_form=all_to_all: all_to_all: H must be a multiple.* sequence_for"
            "m=ring: .*cannot be merged once rows are reweighted",
        ),
        (
            {"num_heads": 6},
            {"sequence": 4, "sequence_form": "all_to_all"},
            "H=6, K=6, sequence=4. Use ring",
        ),
        (
            {},
            {"sequence": 4, "sequence_form": "ring", "length": 12},
            "a multiple of 2 x config.mesh.sequence = 8; got seq_len=12. Use 16",
        ),
        (
            {"prefix": {"kind": "sink_token"}},
            {"sequence": 2},
            "config.model.prefix: learned tokens stand in front of whole rows",
        ),
    ],
    ids=["mixer", "order", "no form", "heads", "length", "learned tokens"],
)
def test_what_cannot_share_tokens_is_refused_by_name(model, mesh, text):
    with pytest.raises(UserError, match=text):
        form_of(model_of(**model), **mesh)


def test_an_option_that_mixes_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(gated_attention.Slot, "sequence", False)
    with pytest.raises(UserError, match="the output option 'gated_attention' needs"):
        form_of(model_of(layers="gated_attention"), sequence=2)


def test_tokens_lie_in_zigzag_order_for_the_ring_alone():
    mesh = sharding.make_mesh(sharding.Config(sequence=4))
    given = batch(0)
    assert sequence.lay_out(given, "all_to_all", mesh) is given
    moved = sequence.lay_out(given, "ring", mesh)
    assert list(moved["positions"][3]) == [
        *(0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9),
    ]
    assert all(sorted(moved[n].flat) == sorted(given[n].flat) for n in given)


@pytest.mark.parametrize("form", sequence.FORMS)
def test_activations_are_not_gathered(form):
    mesh = sharding.make_mesh(sharding.Config(data=2, sequence=4))
    rows = sharding.batch_sharding(mesh, leading=0)
    task = language_modelling.LanguageModelling(
        language_modelling.Config(loss_chunk=8),
        model_of(num_layers=1),
        use_segments=True,
        rows=rows,
        sequence_form=form,
    )
    recipe = Recipe(task, optimizers.Config(), STEPS, 0)
    state = jax.eval_shape(lambda: init_state(recipe))
    arrays = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows)
        for name, a in batch(0).items()
    }
    text = jax.jit(make_step(recipe)).lower(state, arrays).compile().as_text()
    assert not re.search(r"f32\S* all-gather", text)
    assert {"ring": "collective-permute", "all_to_all": "all-to-all"}[form] in text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for number in range(20):
        words = ("".join(rng.choices("abcdefg", k=rng.randint(1, 5))) for _ in "x" * 30)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def test_a_run_goes_on_under_another_mesh(corpus, tmp_path):
    """Checkpoints do not depend on who shared the tokens; nor do evaluations."""

    def train(workdir, steps, **mesh):
        config = experiment.resolve(
            {
                "model": {**SMALL, "num_layers": 1},
                "data": {
                    "name": f"text:{corpus}/*.txt",
                    "cache_dir": str(corpus / "cache"),
                    "seq_len": LENGTH,
                },
                "optim": {"schedule": "constant", "warmup_steps": 0},
                "train": {
                    **{"steps": steps, "batch_size": 8, "log_every": 1},
                    **{"sample_tokens": 0, "tensorboard": False, "save_every": 2},
                },
                "eval": {"every": 2, "batches": 1, "explain": 3, "explain_len": 9},
                "mesh": mesh,
            }
        )
        assert run.train(config, workdir, extend=True) == EXIT_OK
        return [
            (row["split"], row["step"], row["loss"], row.get("attention_entropy", 0))
            for row in metrics.read(workdir / "metrics.jsonl")
        ]

    shared = {"data": 2, "sequence": 4, "sequence_form": "ring"}
    train(tmp_path / "moved", 2, **shared)
    moved = train(tmp_path / "moved", 4)
    whole = train(tmp_path / "whole", 4)
    starts = json.loads((tmp_path / "moved" / "manifest.json").read_text())["starts"]
    kernels = [start["kernels"][0]["shapes"] for start in starts]
    # The ring's parts are 4 rows of 4 tokens, alone each device has a whole row.
    assert [text[: len("q [4, 4,")] for text in kernels] == ["q [4, 4,", "q [1, 16"]
    assert [row[:2] for row in moved] == [row[:2] for row in whole]
    assert any(row[3] for row in whole)
    numbers = ([row[2:] for row in rows] for rows in (moved, whole))
    np.testing.assert_allclose(*numbers, atol=2e-5)
