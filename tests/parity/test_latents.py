"""Latents of an autoencoder of diffusers: encoded, trained on, drawn and decoded."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
diffusers = pytest.importorskip("diffusers", reason="extra `parity` is not installed")

from peers import close  # noqa: E402

import attnjax  # noqa: E402
from attnjax import evaluate, generate, train  # noqa: E402
from attnjax.analysis.image_features import _chosen  # noqa: E402
from attnjax.core.errors import UserError  # noqa: E402
from attnjax.data import extract_latents, images  # noqa: E402
from attnjax.data.images import latent_files  # noqa: E402
from attnjax.data.vae import open_vae  # noqa: E402

pytestmark = pytest.mark.parity
SIDE, PIXELS, CHANNELS = 8, 16, 5
CONFIG = """
def get_config():
    model = {"name": "dit", "layers": "attention", "patch_size": 2, "num_layers": 1}
    return {
        "model": {**model, "embed_dim": 8, "num_heads": 2, "time_features": 8},
        "data": {"augment": {"flip": True}},
        "train": {"steps": 2, "batch_size": 8, "tensorboard": False},
        "eval": {"batches": 1, "batch_size": 16, "draw": {"per_class": 0}},
    }
"""


@pytest.fixture(scope="module")
def vae(tmp_path_factory, randomise):
    """(their autoencoder, its folder inside that of a pipeline)."""
    model = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.2,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    randomise(model).save_pretrained(folder / "vae")
    return model, folder


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory):
    """A folder of the latents of 37 glyphs, and of their mirror images."""
    out = tmp_path_factory.mktemp("latents") / "glyphs"
    words = ["--vae", vae[1], "--out", out, "--flips", "--num_train", 37]
    words += ["--batch_size", 5, "--config.data.name=glyphs"]
    words += [f"--config.data.image_size={PIXELS}", "--config.data.channels=3"]
    words += ["--config.data.num_eval=20", "--config.data.chars=abc"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        extract_latents.main([str(word) for word in words])
    assert "37 images to train on and 20 held out, latents 8x8x5" in said.getvalue()
    return out


def pictures(split, count):
    kind = images.config_class("glyphs")
    config = kind(
        name="glyphs", image_size=PIXELS, channels=3, num_eval=20, chars="abc"
    )
    return getattr(images.open_corpus(config), split).read(np.arange(count))


def test_stored_moments_are_the_autoencoders_own(vae, encoded):
    opened = latent_files.open_latents(encoded)
    facts = opened.facts
    assert (facts.scale, facts.shift) == ((0.7,), (0.2,))
    assert facts.encoder["fingerprint"] == open_vae(vae[1]).fingerprint
    assert facts.encoder["name"] == f"{vae[1].name}/vae"
    assert facts.source["source"] == "glyphs" and facts.class_names == tuple("abc")
    for split, count in (("train", 37), ("eval", 20)):
        shown, labels, _ = pictures(split, count)
        np.testing.assert_array_equal(opened.labels[split], labels)
        for view, turned in enumerate((shown, shown[:, :, ::-1])):
            pixels = torch.tensor(turned.transpose(0, 3, 1, 2) / 127.5 - 1).float()
            with torch.no_grad():
                theirs = vae[0].encode(pixels).latent_dist
            wanted = torch.cat([theirs.mean, theirs.logvar], 1).permute(0, 2, 3, 1)
            found = opened.rows[split][:, view]
            assert found.shape == (count, SIDE, SIDE, 2 * CHANNELS)
            close(found, wanted.numpy())


@pytest.fixture(scope="module")
def run(encoded, tmp_path_factory):
    """A run of two steps on the latents."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.py").write_text(CONFIG)
    data = f"--config.data.name=latents:{encoded}"
    words = ["--config", str(folder / "tiny.py"), "--workdir", str(folder / "run")]
    train.main([*words, data])
    return folder / "run"


def test_a_denoiser_learns_and_draws_latents(vae, run, tmp_path):
    out = tmp_path / "some.png"
    summary = json.loads((run / "summary.json").read_text())
    assert np.isfinite(summary["final"]["loss"])
    asked = ["--workdir", str(run), "--labels", "c,a", "--num_steps", "2"]
    generate.main([*asked, "--vae", str(vae[1]), "--out", str(out)])
    loaded = attnjax.load(run)
    latents = loaded.draw(["c", "a"], steps=2)
    z = torch.tensor(latents / 0.7 + 0.2).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = vae[0].decode(z).sample.permute(0, 2, 3, 1).numpy()
    wanted = np.clip(127.5 * (theirs + 1), 0, 255)
    found = loaded.decoded(latents, open_vae(vae[1]))
    np.testing.assert_allclose(found, wanted, atol=0.51)
    # Two columns of 16 x 16, each enlarged twice.
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (32, 66, 3)
    np.testing.assert_array_equal(sheet[::2, :32:2], found[0])


class Means(torch.nn.Module):
    """One feature of a picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean(dim=[1, 2, 3])[:, None]


def test_features_are_of_decoded_samples_and_of_decoded_data(vae, run, tmp_path):
    network, out = tmp_path / "means.pt", tmp_path / "m.json"
    torch.jit.save(torch.jit.script(Means()), str(network))
    asked = ["--workdir", str(run), "--out", str(out), "--vae", str(vae[1])]
    few = ["--per_class", "3", "--num_steps", "2", "--features_images", "15"]
    evaluate.main([*asked, *few, "--features", f"torchscript:{network}"])
    found = json.loads(out.read_text())
    assert found["features"].startswith("torchscript:means.pt (sha256 ")
    assert found["frechet_data"] == "15 training decoded latents"
    loaded, decoder = attnjax.load(run), open_vae(vae[1])
    splits = (loaded.feed.corpus.eval, loaded.feed.corpus.train)
    one, other = (
        loaded.decoded(split.held(_chosen(split, 15))[0], decoder).mean((1, 2, 3))
        for split in splits
    )
    gap, spread = one.mean() - other.mean(), one.std(ddof=1) - other.std(ddof=1)
    wanted = gap**2 + spread**2
    assert found["frechet_distance_held_out"] == pytest.approx(wanted, rel=1e-3)
    assert found["frechet_distance"] > 0 and found["samples"] == 9


def test_means_and_spreads_a_channel_are_read(vae, tmp_path):
    folder = shutil.copytree(vae[1] / "vae", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    means, stds = [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 0.5, 4.0, 1.0]
    config |= {"latents_mean": means, "latents_std": stds}
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_vae(folder)
    assert opened.shift == tuple(means)
    np.testing.assert_allclose(opened.scale, 0.7 / np.array(stds))
    assert opened.fingerprint != open_vae(vae[1]).fingerprint


def test_autoencoders_that_cannot_serve_are_refused(vae, tmp_path):
    opened = open_vae(vae[1])
    with pytest.raises(UserError, match="halves pictures to 1/2.*image_size=7"):
        opened.latent_side(7)
    with pytest.raises(UserError, match="decodes latents of 5 channels; got 4"):
        opened.pictures(np.zeros((1, SIDE, SIDE, 4)))
    with pytest.raises(UserError, match="cannot run the autoencoder.*device=nowhere"):
        open_vae(vae[1], device="nowhere")
    folder = shutil.copytree(vae[1] / "vae", tmp_path / "cut")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="the autoencoder must load"):
        open_vae(folder)
    weights.unlink()
    with pytest.raises(UserError, match="the autoencoder must load"):
        open_vae(folder)
    grey = ["--config.data.name=glyphs", f"--config.data.image_size={PIXELS}"]
    grey += ["--config.data.channels=1", "--num_train", "3"]
    asked = ["--vae", str(vae[1]), "--out", str(tmp_path / "out"), *grey]
    with pytest.raises(UserError, match="pictures of 3 channels; got .*channels=1"):
        extract_latents.main(asked)
    assert not (tmp_path / "out").exists()
