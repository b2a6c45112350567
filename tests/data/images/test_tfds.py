import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnjax.core.errors import UserError
from attnjax.data.images import (
    Augment,
    batch,
    eval_batches,
    num_classes,
    open_corpus,
    tfds,
)
from attnjax.data.images.tfds import Config

library = pytest.importorskip("tensorflow_datasets")
SHARED = Path(__file__).parents[4] / "shared" / "data" / "tfds"
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
LABELS = np.arange(12) % 3


def features(shape=(4, 4, 1), **more):
    image = library.features.Image(shape=shape)
    return {"image": image, "label": library.features.ClassLabel(names="abc"), **more}


def png(pixels):
    """TFDS stores bytes as they are; encoding arrays would take TensorFlow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(buffer, "png")
    return buffer.getvalue()


def examples(indices, **more):
    return [{"image": png(PIXELS[i]), "label": int(LABELS[i]), **more} for i in indices]


@pytest.fixture
def root(tmp_path, write_data_set):
    splits = {"train": examples(range(9)), "test": examples(range(9, 12))}
    write_data_set(tmp_path, "toy", features(), splits)
    return tmp_path


def opened(root, name="tfds:toy", **options):
    options = {"image_size": 4, "channels": 1, **options}
    return open_corpus(Config(name=name, data_dir=str(root), **options))


def test_examples_are_images_with_their_labels(root):
    corpus = opened(root)
    assert corpus.class_names == ("a", "b", "c")
    assert "9 images to train on, 3 held out, 4x4x1, 3 classes" in corpus.describe()
    images, labels, readable = corpus.train.read(np.array([8, 0, 5]))
    assert np.array_equal(images, PIXELS[[8, 0, 5]]) and readable.all()
    assert labels.tolist() == LABELS[[8, 0, 5]].tolist() and labels.dtype == np.int32
    assert corpus.provenance["dataset"] == "toy/1.0.0"
    assert num_classes(Config(name="tfds:toy", data_dir=str(root))) == 3
    assert corpus.provenance["eval_split"] == "test"


def test_what_does_not_fit_into_memory_is_decoded_batch_by_batch(root, monkeypatch):
    stored = opened(root)
    monkeypatch.setattr(tfds, "MOST_STORED", 100)
    read = opened(root)
    assert stored.train.reader.is_stored and not read.train.reader.is_stored
    augment = Augment(crop="inception", mixup=0.3)
    fixed = {"seed": 0, "step": 1, "batch_size": 5, "augment": augment}
    one, two = batch(stored.train, **fixed), batch(read.train, **fixed)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert stored.fingerprint != read.fingerprint  # of bytes, and of files


def test_the_fingerprint_is_of_what_is_stored(root, tmp_path, write_data_set):
    before = opened(root).fingerprint
    assert opened(root, channels=3, image_size=9).fingerprint == before
    assert opened(root, train_split="train[:5]").fingerprint != before
    rows, test = examples(range(9)), examples(range(9, 12))
    twin = next(e for e in rows[1:] if len(e["image"]) == len(rows[0]["image"]))
    others = {
        "bytes": [{**rows[0], "image": twin["image"]}, *rows[1:]],
        "label": [{**rows[0], "label": 2}, *rows[1:]],
        "order": [*rows[1:], rows[0]],
    }
    for name, changed in others.items():
        splits = {"train": changed, "test": test}
        write_data_set(tmp_path / name, "toy", features(), splits)
        assert opened(tmp_path / name).fingerprint != before, name


def test_images_of_many_sizes_are_brought_to_one(tmp_path, write_data_set):
    sizes = [{"image": png(PIXELS[0][:h]), "label": 1} for h in (2, 3, 4)]
    splits = {"train": sizes, "test": sizes[:1]}
    write_data_set(tmp_path, "toy", features((None, None, 1)), splits)
    corpus = opened(tmp_path, channels=3)
    images, _, _ = corpus.train.read(np.arange(3))
    assert images.shape == (3, 4, 4, 3) and not corpus.train.reader.is_stored
    assert np.array_equal(images[2], np.repeat(PIXELS[0], 3, axis=-1))


@pytest.mark.parametrize("stored", [True, False])
def test_damaged_examples_are_named_and_never_fatal(
    tmp_path, write_data_set, capsys, monkeypatch, stored
):
    rows = examples(range(5))
    rows[3]["image"] = b"no image"
    write_data_set(tmp_path, "toy", features(), {"train": rows, "test": rows[:2]})
    monkeypatch.setattr(tfds, "MOST_STORED", 10**6 if stored else 1)
    corpus = opened(tmp_path)
    got = batch(corpus.train, seed=0, step=0, batch_size=5, augment=Augment())
    said = capsys.readouterr().err
    assert "example 3 of train (no image format that is known)" in said
    if stored:
        assert corpus.train.num_images == 4 and got["weight"].sum() == 5
        assert "tfds:toy: left out 1 of 7 images" in said
    else:
        assert corpus.train.num_images == 5 and got["weight"].sum() == 4
        assert corpus.unreadable.keys() == {"example 3 of train"}


def test_labels_that_are_not_known_are_refused(tmp_path, write_data_set, monkeypatch):
    rows = [{"image": png(PIXELS[0]), "label": -1}]
    splits = {"train": examples(range(3)), "test": rows}
    write_data_set(tmp_path, "toy", features(), splits)
    message = r"labels must be in .* got label=-1 in the eval split of tfds:toy, 3 cla"
    for most in (10**6, 1):
        monkeypatch.setattr(tfds, "MOST_STORED", most)
        corpus = opened(tmp_path)
        with pytest.raises(UserError, match=message):
            list(eval_batches(corpus.eval, batch_size=1))


def test_the_features_are_found_or_named(tmp_path, write_data_set):
    more = {
        "second": library.features.Image(shape=(4, 4, 1)),
        "fine": library.features.ClassLabel(num_classes=7),
    }
    rows = examples(range(3), second=png(PIXELS[7]), fine=6)
    write_data_set(tmp_path, "toy", features(**more), {"train": rows, "test": rows})
    corpus = opened(tmp_path, image_field="second", label_field="fine")
    images, labels, _ = corpus.train.read(np.array([0]))
    assert np.array_equal(images[0], PIXELS[7]) and labels.tolist() == [6]
    assert corpus.class_names == tuple("0123456")
    assert opened(tmp_path).class_names == ("a", "b", "c")
    with pytest.raises(UserError, match=r"image_field 'secnd'\. Did you mean second"):
        opened(tmp_path, image_field="secnd")


def test_features_that_are_not_clear_are_refused(tmp_path, write_data_set):
    label = library.features.ClassLabel(names="abc")
    image = library.features.Image(shape=(4, 4, 1))

    def refused(given, example, message):
        rows = {"train": [example], "test": [example]}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_data_set(folder, "toy", given, rows)
        with pytest.raises(UserError, match=message):
            opened(folder)

    one, two = {"x": png(PIXELS[0]), "y": png(PIXELS[1])}, {"x": 0, "y": 1}
    refused(
        {"x": image, "y": image, "label": label},
        {**one, "label": 0},
        r"must be an image; got x, y in toy\. Set data\.image_field",
    )
    refused(
        {"image": image, "x": label, "y": label},
        {"image": png(PIXELS[0]), **two},
        r"must be a class; got x, y in toy\. Set data\.label_field",
    )
    refused(
        {"image": image}, {"image": png(PIXELS[0])}, r"need a class feature; got toy w"
    )
    refused({"label": label}, {"label": 0}, r"need an image feature; got toy with labe")


def test_images_of_floats_are_refused(root):
    info = root / "toy" / "1.0.0" / "features.json"
    info.write_text(info.read_text().replace("uint8", "float32"))
    with pytest.raises(
        UserError, match="must have 8 or 16 bits a channel; got float32"
    ):
        opened(root)


def test_what_is_shared_with_text_is_refused_alike(root):
    with pytest.raises(UserError, match="must not be both trained on and held out"):
        opened(root, eval_split="train[:2]")
    with pytest.raises(UserError, match=r"unknown data set 'toyy'.*mean toy\?"):
        opened(root, "tfds:toyy")


def test_tensorflow_is_not_imported(root):
    program = (
        "import sys\n"
        "from attnjax.data import images\n"
        "Config = images.config_class('tfds:toy')\n"
        "config = Config(name='tfds:toy', data_dir=sys.argv[1], image_size=4)\n"
        "print(images.open_corpus(config).train.read([0])[0].shape)\n"
        "assert not {'tensorflow', 'jax'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert (done.returncode, done.stdout) == (0, "(1, 4, 4, 3)\n"), done.stderr


def test_classes_are_known_of_what_is_not_prepared(tmp_path):
    config = Config(name="tfds:imagenet2012", data_dir=str(tmp_path))
    assert num_classes(config) == 1000
    with pytest.raises(UserError, match="unknown data set 'imagenet2021'"):
        num_classes(Config(name="tfds:imagenet2021", data_dir=str(tmp_path)))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
def test_mnist_is_read():
    corpus = opened(SHARED, "tfds:mnist_t10k", image_size=28)
    assert (corpus.train.num_images, corpus.eval.num_images) == (9000, 1000)
    labels = np.concatenate([s.reader.labels for s in (corpus.train, corpus.eval)])
    # The counts of the test file's ten digits, as its authors' page lists them.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(labels).tolist() == counts
    assert "28x28x1, 10 classes" in corpus.describe()
