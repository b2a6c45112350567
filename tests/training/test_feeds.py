"""Text and images behind one interface, and what language models keep."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from attnjax.core import config as configs
from attnjax.core import mappings
from attnjax.core.errors import UserError
from attnjax.data.images import captions
from attnjax.training import experiment, feeds, identity, loop

ROOT = Path(__file__).parents[2]
SMALL = {"num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
VIT = {"name": "vit", "patch_size": 4, **SMALL}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name of a model: its feed}, on little data."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("some words, and some more of them. " * 30)
    source = {"name": f"text:{folder}/a.txt", "seq_len": 12}
    source["cache_dir"] = str(folder / "cache")
    given = {
        "lm": {"model": SMALL, "data": source},
        "vit": {"model": VIT, "data": {"augment": {"mixup": 0.3}}},
        "dit": {"model": {**VIT, "name": "dit"}},
        "mmdit": {"model": {**VIT, "name": "mmdit"}},
    }
    return {kind: feeds.make(experiment.resolve(one)) for kind, one in given.items()}


@pytest.mark.parametrize("kind", ["lm", "vit", "mmdit"])
def test_batches_have_the_shapes_that_a_plan_takes(made, kind):
    feed = made[kind]
    training = feed.batch(seed=0, step=3, batch_size=5, rows=None)
    held_out = next(feed.eval_batches(batch_size=5, rows=None))
    for batch in (training, held_out):
        found = {n: (v.shape, v.dtype) for n, v in batch.items()}
        wanted = feed.row_shapes().items()
        found.pop("index", None)  # Of the held-out images of a denoiser.
        assert found == {n: ((5, *row.shape), row.dtype) for n, row in wanted}


@pytest.mark.parametrize("kind", ["lm", "vit", "mmdit"])
def test_a_host_can_build_its_rows_alone(made, kind):
    feed = made[kind]
    whole = feed.batch(seed=1, step=2, batch_size=6, rows=None)
    part = feed.batch(seed=1, step=2, batch_size=6, rows=slice(2, 5))
    for name, value in whole.items():
        np.testing.assert_array_equal(part[name], value[2:5])


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("lm", {"vocab_size": 256}),
        ("vit", {"image_size": 8, "channels": 1, "num_classes": 10}),
        ("mmdit", {"image_size": 8, "channels": 1}),
    ],
)
def test_a_model_keeps_the_sizes_of_its_data(made, kind, sizes):
    feed = made[kind]
    planned = feeds.make(feed.config).planned_sizes()
    assert feed.sizes() == planned == sizes
    model = experiment.build_model(feed.config, {**sizes, "step": 7, "layout": {}})
    assert feed.sizes_of(model) == sizes
    assert feed.row_flops(model) > 0


@pytest.mark.parametrize("kind", ["lm", "vit"])
def test_micro_batches_are_the_parts_of_a_batch(made, kind):
    found = []
    for accumulate in (1, 2):
        train = {"batch_size": 6, "accumulate": accumulate}
        config = experiment.resolve(made[kind].config | {"train": train})
        here = experiment.build(config, devices=jax.devices()[:1])
        found.append(loop.build_batch(here, 1))
    for name, whole in found[0].items():
        assert found[1][name].shape == (2, 3, *whole.shape[1:])
        np.testing.assert_array_equal(found[1][name].reshape(whole.shape), whole)


def test_another_source_keeps_the_settings_that_it_knows(made):
    config = experiment.resolve(
        configs.apply_values(
            made["vit"].config,
            [("data.image_size", 12), ("data.eval_fraction", 0.4)],
        )
    )
    changed = experiment.changed(config, [("data.name", "glyphs")])
    assert changed["data"]["image_size"] == 12
    assert changed["data"]["augment"] == config["data"]["augment"]
    assert "eval_fraction" not in changed["data"]
    # What is given beside the name is not left out.
    with pytest.raises(UserError, match="config.data: unknown key 'eval_fraction'"):
        experiment.changed(
            config, [("data.name", "glyphs"), ("data.eval_fraction", "0.4")]
        )


def test_what_is_counted(made):
    assert (made["lm"].unit, made["lm"].units_per_row) == ("token", 12)
    assert (made["vit"].unit, made["vit"].units_per_row) == ("image", 1)
    assert made["vit"].reference().levels == {"uniform guess": np.log(10)}
    assert "1438 images to train on, 359 held out" in made["vit"].description


def test_a_plan_of_known_sizes_opens_no_data():
    config = experiment.resolve({"model": VIT, "data": {"name": "digits"}})
    here = experiment.planned(
        config, devices=jax.devices()[:1], platform="cpu", target=None
    )
    assert "corpus" not in vars(here.feed)
    assert here.task.totals == ("nll", "correct", "top5", "weight")


def test_language_models_keep_their_settings_and_identities():
    given = configs.load_file(str(ROOT / "configs" / "quickstart.py"))
    resolved = experiment.resolve(given)
    assert "corruption" not in resolved["eval"]
    digest = mappings.digest(resolved, exclude=identity.EXCLUDES)
    assert digest[:16] == "13a2d50bf167b9ea"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.name": "vti"}, "unknown model 'vti'.* vit"),
        ({"data.name": "stdlib"}, "unknown source 'stdlib'"),
        ({"data.seq_len": 8}, "config.data: unknown .*'?seq_len"),
        ({"task.z_loss": 1.0}, "config.task: unknown .*'?z_loss"),
        ({"train.sample_tokens": 5}, "sample_tokens: text is sampled from language"),
        ({"eval.explain": 5}, "eval.explain: the maps of the first tokens"),
        ({"eval.corruption": "blurr"}, "unknown corruption 'blurr'.*blur"),
        ({"eval.corruption": "blur"}, "severity must be 1 to 5; got severity=0"),
        ({"eval.severity": 2}, "severity needs a corruption"),
        ({"task.label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_an_image_model_has_no_use_for_are_refused(changes, words):
    given = {"model": VIT, "data": {"name": "digits"}}
    with pytest.raises(UserError, match=words):
        experiment.resolve(configs.apply_values(given, changes.items()))


def test_the_tokens_of_an_image_are_not_shared(made):
    config = experiment.resolve(made["vit"].config | {"mesh": {"sequence": 2}})
    with pytest.raises(UserError, match="the tokens of an image stay on one device"):
        experiment.build(config, devices=jax.devices()[:2])


def test_a_corrupted_split_says_so(made):
    config = configs.apply_values(
        made["vit"].config, [("eval.corruption", "contrast"), ("eval.severity", 5)]
    )
    feed = feeds.make(experiment.resolve(config))
    assert feed.about == {
        "data": "digits",
        "image_size": 8,
        "corruption": "contrast",
        "severity": 5,
    }
    plain = next(made["vit"].eval_batches(batch_size=4, rows=None))["image"]
    grey = next(feed.eval_batches(batch_size=4, rows=None))["image"]
    assert grey.std() < 0.1 * plain.std()


def test_images_that_break_during_a_run_are_counted_in_its_summary(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    source = {"name": f"folder:{tmp_path}", "image_size": 8, "channels": 1}
    source["cache_dir"] = str(tmp_path.parent / f"{tmp_path.name}_cache")
    config = experiment.resolve({"model": VIT, "data": source})
    feed = feeds.make(config)
    assert feed.more_summary(None) == {"unreadable_images": 0}
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"no image")
    feed.batch(seed=0, step=0, batch_size=12, rows=None)
    # One image of each class is held out; two of a, and two of b, are trained on.
    assert feed.more_summary(None) == {"unreadable_images": 2}


def test_held_out_images_of_a_denoiser_know_their_place(made):
    batches = list(made["dit"].eval_batches(batch_size=100, rows=None))
    places = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(places, np.arange(400))
    part = list(made["dit"].eval_batches(batch_size=100, rows=slice(30, 40)))[1]
    np.testing.assert_array_equal(part["index"], np.arange(130, 140))
    np.testing.assert_array_equal(part["image"], batches[1]["image"][30:40])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": {"augment": {"mixup": 0.2}}}, "mixed images are no samples"),
        (
            {"model": {"label_dropout": 0.0}, "eval": {"draw": {"guidance": 2.0}}},
            "got guidance=2, config.model.label_dropout=0",
        ),
        ({"eval": {"draw": {"steps": 0}}}, "steps must be at least 1; got 0"),
        ({"eval": {"draw": {"guidance": -1.0}}}, "guidance must not be negative"),
        ({"eval": {"draw": {"sampler": "ddpn"}}}, "unknown sampler 'ddpn'.*ddpm"),
        (
            {
                "task": {"noise": {"process": "flow"}},
                "eval": {"draw": {"sampler": "ddim"}},
            },
            "one of euler, heun, dopri5, sde, sde_heun for a process of kind flow",
        ),
    ],
)
def test_settings_of_a_denoiser_that_do_not_fit_are_refused(given, message):
    model = {**VIT, "name": "dit", **given.get("model", {})}
    with pytest.raises(UserError, match=message):
        experiment.resolve({**given, "model": model})


def test_a_search_counts_the_tokens_of_a_mean_layer_of_a_pyramid():
    """64 places of width 8, and 16 of width 16, which are 32 of width 8."""
    model = {"name": "pyramid", "depths": [1, 1], "embed_dim": 8, "patch_size": 1}
    config = experiment.resolve({"model": model, "data": {"name": "digits"}})
    feed = feeds.make(config)
    made = feed.make_model(config, feed.planned_sizes(), platform="cpu", target=None)
    assert feed.search_facts(made)["seq_len"] == (64 + 32) // 2
    assert feed.fit_cures(made) == []


def test_an_image_is_told_by_the_caption_of_its_class(made):
    feed = made["mmdit"]
    batch = feed.batch(seed=0, step=0, batch_size=7, rows=None)
    labels = made["dit"].batch(seed=0, step=0, batch_size=7, rows=None)["label"]
    names = captions.of_classes(feed.data, feed.corpus.class_names)
    for ids, label in zip(batch["caption"], labels, strict=True):
        told = names[label]
        assert bytes(ids[: len(told)].astype("u1")).decode() == told
        assert ids[len(told)] == 256 and np.all(ids[len(told) + 1 :] == -1)


def test_layers_of_two_streams_are_not_converted():
    train = {"init_convert": "moh", "init_from": "runs/a"}
    given = {"model": {**VIT, "name": "mmdit"}, "train": train}
    with pytest.raises(UserError, match="converts layers of one stream.*=moh"):
        experiment.resolve(given)


def test_another_picture_of_samples_is_no_other_run():
    model = {**VIT, "name": "dit"}
    found = {
        mappings.digest(
            experiment.resolve({"model": model, "eval": {"draw": draw}}),
            exclude=identity.EXCLUDES,
        )
        for draw in ({}, {"per_class": 0}, {"guidance": 3.0, "steps": 7})
    }
    assert len(found) == 1
