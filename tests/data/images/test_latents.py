"""Latents of an autoencoder as a source: samples, their order, and what is refused."""

import dataclasses
import json
import shutil
import zlib

import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.data import images
from attnjax.data.images import latent_files, latents

FACTS = latent_files.LatentFacts(
    shape=(3, 3, 5),
    class_names=("a", "b", "c"),
    scale=(0.5,),
    shift=(0.0, 0.1, 0.2, 0.3, 0.4),
    has_flips=True,
    encoder={"name": "toy"},
)
COUNTS = {"train": 7, "eval": 5}


def content(split, facts=FACTS):
    """Rows [N, views, H, W, parts C] and labels of a split."""
    rng = np.random.default_rng(COUNTS[split])
    rows = rng.normal(size=(COUNTS[split], *facts.row_shape)).astype(np.float32)
    return rows, np.arange(COUNTS[split]) % 3


def write(path, facts=FACTS):
    with latent_files.new_latents(path, facts) as writer:
        for split in COUNTS:
            rows, labels = content(split, facts)
            # In two parts, as an encoder does.
            writer.add(split, rows[:2], labels[:2])
            writer.add(split, rows[2:], labels[2:])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents") / "made")


def config_of(folder, **options):
    return latents.Config(name=f"latents:{folder}", **options)


@pytest.fixture
def corpus(folder):
    return images.open_corpus(config_of(folder))


def batch(corpus, step=0, seed=0, rows=None, **augment):
    return images.batch(
        corpus.train,
        seed=seed,
        step=step,
        batch_size=7,
        augment=images.Augment(**augment),
        rows=rows,
    )


def stored(rows, view=0):
    """Scaled means, and the scaled standard deviations."""
    mean, log_variance = np.split(rows[:, view], 2, axis=-1)
    return (mean - np.array(FACTS.shift)) * 0.5, np.exp(0.5 * log_variance) * 0.5


def test_a_folder_reads_as_it_was_written(corpus, folder):
    assert corpus.class_names == ("a", "b", "c") and corpus.num_classes == 3
    assert (corpus.image_size, corpus.channels) == (3, 5)
    opened = latent_files.open_latents(folder)
    assert opened.facts == FACTS
    for split in COUNTS:
        rows, labels = content(split)
        np.testing.assert_array_equal(opened.rows[split], rows)
        np.testing.assert_array_equal(opened.labels[split], labels)
    assert corpus.provenance["splits"]["eval"] == {"num_images": 5}
    assert corpus.provenance["encoder"] == {"name": "toy"}
    assert "7 latents to train on, 5 held out, 3x3x5, 3 classes" in corpus.describe()
    assert images.image_shape(corpus.config) == (3, 5)
    assert images.num_classes(corpus.config) == 3


def test_a_config_goes_through_json_and_finds_its_folder(folder):
    docs = schema.field_docs(latents.Config)
    assert {field.name for field in dataclasses.fields(latents.Config)} == set(docs)
    given = {"name": f"latents:{folder.name}", "data_dir": str(folder.parent)}
    config = schema.build(latents.Config, schema.resolve(latents.Config, given))
    assert config.path == folder
    assert images.open_corpus(config).train.num_images == 7


def test_every_epoch_draws_other_samples_of_the_same_posteriors(corpus):
    rows, labels = content("train")
    mean, std = stored(rows)
    drawn = []
    for epoch in range(300):
        made = batch(corpus, epoch)
        assert made["image"].shape == (7, 3, 3, 5) and made["image"].dtype == np.float32
        # Every image once an epoch; its class tells some of which.
        assert sorted(made["label"]) == sorted(labels)
        order = images.batches._indices(corpus.train, 0, np.arange(7) + 7 * epoch)
        drawn.append((made["image"][np.argsort(order)] - mean) / std)
    noise = np.stack(drawn)
    # 94500 numbers: four standard errors of their mean and of their variance.
    assert abs(noise.mean()) < 4 / 307 and abs(noise.var() - 1) < 4 * 1.42 / 307
    # No number is another's: epochs, rows and entries have their own.
    assert len(np.unique(np.round(noise, 4))) > 30_000
    flat = noise.reshape(300, -1)
    between = np.corrcoef(flat, rowvar=False) - np.eye(flat.shape[1])
    assert np.abs(between).max() < 5.5 / np.sqrt(300)


def test_a_batch_is_a_function_of_seed_and_step(corpus, folder):
    again = images.open_corpus(config_of(folder))
    whole = batch(corpus, 3)
    for name, part in batch(again, 3, rows=slice(2, 5)).items():
        np.testing.assert_array_equal(part, whole[name][2:5])
    assert not np.array_equal(batch(corpus, 3, seed=1)["image"], whole["image"])


def test_the_mean_may_stand_for_the_sample(folder):
    corpus = images.open_corpus(config_of(folder, sample=False))
    made = batch(corpus, 4)
    order = images.batches._indices(corpus.train, 0, np.arange(7) + 28)
    rows, labels = content("train")
    np.testing.assert_allclose(made["image"], stored(rows)[0][order], rtol=1e-5)
    np.testing.assert_array_equal(made["label"], labels[order])
    np.testing.assert_array_equal(made["weight"], np.ones(7))


def test_mirrored_images_have_latents_of_their_own(folder):
    options = {"sample": False, "augment": images.Augment(flip=True)}
    corpus = images.open_corpus(config_of(folder, **options))
    rows, _ = content("train")
    plain, mirrored = stored(rows, 0)[0], stored(rows, 1)[0]
    seen = set()
    for step in range(6):
        made = batch(corpus, step, flip=True)["image"]
        order = images.batches._indices(corpus.train, 0, np.arange(7) + 7 * step)
        for image, index in zip(made, order, strict=True):
            views = [np.allclose(image, view[index]) for view in (plain, mirrored)]
            assert sum(views) == 1
            seen.add((int(index), views.index(True)))
    assert {view for _, view in seen} == {0, 1} and len(seen) > 7


def test_an_evaluation_draws_of_an_image_always_the_same(corpus):
    rows, labels = content("eval")
    mean, std = stored(rows)
    one, other = (
        list(images.eval_batches(corpus.eval, batch_size=size)) for size in (3, 5)
    )
    weights = np.concatenate([part["weight"] for part in one])
    np.testing.assert_array_equal(weights, [1, 1, 1, 1, 1, 0])
    found = np.concatenate([part["image"] for part in one])
    np.testing.assert_array_equal(found[:5], other[0]["image"])
    np.testing.assert_array_equal(other[0]["label"], labels)
    noise = (found[:5] - mean) / std
    assert 0.7 < noise.std() < 1.3 and not found[5].any()


def test_values_without_a_variance_are_taken_as_they_are(tmp_path):
    facts = dataclasses.replace(
        FACTS, has_variance=False, has_flips=False, dtype="float16"
    )
    corpus = images.open_corpus(config_of(write(tmp_path / "v", facts)))
    rows, _ = content("eval", facts)
    made = next(images.eval_batches(corpus.eval, batch_size=5))["image"]
    halves = rows[:, 0].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(made, (halves - np.array(FACTS.shift)) * 0.5, atol=1e-6)
    np.testing.assert_allclose(facts.unscaled(made), halves, atol=1e-6)


def test_what_is_done_to_pixels_is_refused(folder, tmp_path, corpus):
    with pytest.raises(UserError, match="crop is done to pixels.*got crop=pad"):
        config_of(folder, augment=images.Augment(crop="pad"))
    with pytest.raises(UserError, match="randaugment_layers is done to pixels.*=2"):
        config_of(folder, augment=images.Augment(randaugment_layers=2))
    with pytest.raises(UserError, match="corruption: is done to pixels.*=blur"):
        images.eval_batches(corpus.eval, batch_size=5, corruption="blur", severity=1)
    plain = write(tmp_path / "plain", dataclasses.replace(FACTS, has_flips=False))
    flip = config_of(plain, augment=images.Augment(flip=True))
    with pytest.raises(UserError, match="flip needs the latents of mirrored.*--flips"):
        images.open_corpus(flip)


# ---- folders that are not what they should be


def test_an_unfinished_folder_reads_as_nothing(tmp_path):
    path = tmp_path / "cut"
    with (
        pytest.raises(KeyboardInterrupt),
        latent_files.new_latents(path, FACTS) as writer,
    ):
        writer.add("train", *content("train"))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"DIR must be a folder of latents.*not there"):
        images.open_corpus(config_of(path))
    # What a process leaves that had no time to clean up.
    left = tmp_path / "cut.new-xyz"
    shutil.copytree(write(tmp_path / "whole"), left)
    (left / "index.json").unlink()
    with pytest.raises(UserError, match=r"finished folder of latents.*index\.json"):
        images.open_corpus(config_of(left))
    write(path)
    assert not left.exists()
    with pytest.raises(UserError, match="must not be there yet"):
        write(path)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        (
            "train.latents.bin",
            lambda data: data[:-4],
            r"train\.latents\.bin has \d+ by",
        ),
        ("eval.latents.bin", lambda data: b"x" + data[1:], "eval.*its checksum"),
        ("train.labels.bin", None, r"train\.labels\.bin: No such file"),
        ("index.json", lambda data: data[:9], r"index\.json differs from its checksum"),
    ],
)
def test_a_damaged_folder_is_refused(copied, name, harm, message):
    path = copied / name
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=f"finished folder of latents.*{message}"):
        images.open_corpus(config_of(copied))


def rewritten(folder, **facts):
    """The folder with other facts, under a checksum that fits."""
    index = json.loads((folder / "index.json").read_text().splitlines()[0])
    index["facts"] |= facts
    text = json.dumps(index)
    sum_ = f"{zlib.crc32(text.encode()):08x}"
    (folder / "index.json").write_text(f"{text}\n{sum_}\n")
    return config_of(folder)


def test_an_index_that_does_not_fit_is_refused(copied):
    with pytest.raises(UserError, match="image 2 of train, 2 classes"):
        images.open_corpus(rewritten(copied, class_names=["a", "b"]))
    names = ["a", "b", "c"]
    with pytest.raises(UserError, match="cannot reshape"):
        images.open_corpus(
            rewritten(copied, class_names=names, shape=[3, 3, 4], shift=[0.0])
        )
    with pytest.raises(UserError, match="of kind 'attnjax latents', version 9"):
        images.open_corpus(rewritten(copied, version=9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 2, 4)}, r"\(H, W, C\) with H = W; got shape=\(3, 2, 4\)"),
        ({"scale": (1.0, 2.0)}, r"scale must be one finite number.*5 channels"),
        ({"scale": (0.0,)}, r"scale must not be 0"),
        ({"shift": (np.inf,)}, r"shift must be one finite number"),
        ({"dtype": "int8"}, r"dtype must be one of float32, float16; got 'int8'"),
    ],
)
def test_facts_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(FACTS, **change)


def test_a_writer_refuses_what_does_not_fit(tmp_path):
    rows, labels = content("train")

    def attempt(*what, message, facts=FACTS):
        path = tmp_path / "never"
        with (
            pytest.raises(UserError, match=message),
            latent_files.new_latents(path, facts) as writer,
        ):
            writer.add("train", rows, labels)
            if what:
                writer.add("train", *what)
        assert not path.exists()

    attempt(message="every split must have an image; got none in eval")
    attempt(rows[..., :-1], labels, message=r"got shape=\(7, 2, 3, 3, 9\), 7 labels")
    attempt(rows, labels + 1, message="got label=3 of image 9 of train, 3 classes")
    bad = np.where(np.arange(7)[:, None, None, None, None] == 4, 7e4, rows)
    half = dataclasses.replace(FACTS, dtype="float16")
    attempt(
        bad, labels, message="finite in float16; got another in image 11", facts=half
    )


def test_a_fingerprint_is_of_what_a_model_sees(tmp_path, corpus):
    same = dataclasses.replace(FACTS, encoder={"name": "other"}, source={"a": 1})
    other = dataclasses.replace(FACTS, scale=(0.25,))
    prints = [
        images.open_corpus(config_of(write(tmp_path / name, facts))).fingerprint
        for name, facts in (("same", same), ("other", other))
    ]
    assert prints[0] == corpus.fingerprint != prints[1]
