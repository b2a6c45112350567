"""Images through an autoencoder, by one that can be followed with a pen."""

import types

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data import extract_latents, images, vae
from attnjax.data.images import latent_files

SIDE, FACTOR = 8, 4
GLYPHS = {"name": "glyphs", "chars": "ab", "image_size": SIDE, "num_eval": 5}


def moments(pictures):
    """The mean of each cell, and the brightest of it for a log-variance."""
    cells = pictures.reshape(len(pictures), 2, FACTOR, 2, FACTOR, 1).astype(np.float32)
    return np.concatenate([cells.mean((2, 4)), cells.max((2, 4))], axis=-1)


def toy(pixel_channels=1):
    return types.SimpleNamespace(
        pixel_channels=pixel_channels,
        channels=1,
        scale=(0.5,),
        shift=(0.25,),
        facts={"name": "toy"},
        latent_side=lambda side: side // FACTOR,
        moments=moments,
    )


def words(out, **given):
    settings = [f"--config.data.{name}={value}" for name, value in GLYPHS.items()]
    flags = [f"--{name}={value}" for name, value in given.items()]
    return ["--vae", "toy", "--out", str(out), *settings, *flags]


def test_both_splits_are_encoded_in_their_order_and_mirrored(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "open_vae", lambda path, *, device: toy())
    monkeypatch.setattr(extract_latents, "print", lambda *_: None, raising=False)
    extract_latents.main(
        words(tmp_path / "out", flips="true", num_train=7) + ["--batch_size=3"]
    )
    found = latent_files.open_latents(tmp_path / "out")
    assert found.facts.shape == (2, 2, 1) and found.facts.has_flips
    assert (found.facts.scale, found.facts.shift) == ((0.5,), (0.25,))
    corpus = images.open_corpus(
        images.config_class("glyphs")(**GLYPHS | {"num_train": 7})
    )
    assert found.facts.class_names == corpus.class_names
    for split, count in ((corpus.train, 7), (corpus.eval, 5)):
        pictures, labels, _ = split.read(np.arange(count))
        np.testing.assert_array_equal(found.labels[split.name], labels)
        rows = found.rows[split.name]
        np.testing.assert_array_equal(rows[:, 0], moments(pictures))
        np.testing.assert_array_equal(rows[:, 1], moments(pictures[:, :, ::-1]))


def test_what_cannot_be_read_is_left_out_with_its_label():
    pictures = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, SIDE, SIDE, 1), np.uint8
    )
    readable = np.asarray([True, False, True, False])

    def read(wanted):
        return pictures[wanted], wanted + 10, readable[wanted]

    flags = extract_latents.Flags(vae="", out="", batch_size=2)
    split = types.SimpleNamespace(read=read)
    parts = list(extract_latents._encoded(toy(), split, 4, flags))
    assert [labels.tolist() for _, labels in parts] == [[10], [12]]
    assert [rows[0, 0, 0, 0, 0] for rows, _ in parts] == [0, 2]


def test_an_endless_source_is_given_a_number_and_channels_must_fit(
    tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="--num_train: must say how many"):
        extract_latents.main(words(tmp_path / "out"))
    monkeypatch.setattr(vae, "open_vae", lambda path, *, device: toy(3))
    with pytest.raises(UserError, match="encodes pictures of 3 channels; got .*=1"):
        extract_latents.main(words(tmp_path / "out", num_train=2))
    assert not (tmp_path / "out").exists()
