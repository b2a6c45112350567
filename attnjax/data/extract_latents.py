"""python -m attnjax.data.extract_latents: images through a VAE, once for all epochs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from attnjax.core import schema
from attnjax.core.cli import run_main
from attnjax.core.config import apply_overrides
from attnjax.core.errors import UserError, unknown
from attnjax.core.flags import parse_command_line
from attnjax.data.progress import progress


@dataclasses.dataclass(frozen=True)
class Flags:
    """Encode images with an autoencoder (AutoencoderKL) of diffusers, for training on
    latents: --config.data.name=latents:OUT. Images are those of --config.data.name, as
    evaluations see them: the square in the middle, resized to --config.data.image_size.

    Attributes:
        vae: the autoencoder's folder, or that of a pipeline with it.
        out: the new folder; it appears when all is done.
        flips: encode mirrored images too, for config.data.augment.flip.
        num_train: training images taken, from the first (none: all; endless sources
            need it).
        batch_size: images encoded at a time.
        dtype: of the numbers that are stored.
        device: PyTorch's name of where the autoencoder runs.
    """

    vae: str
    out: str
    flips: bool = False
    num_train: int | None = None
    batch_size: int = 8
    dtype: Literal["float32", "float16"] = "float32"
    device: str = "cpu"


def main(argv: list[str]) -> None:
    """The command line."""
    line = parse_command_line(
        argv, Flags, program="attnjax.data.extract_latents", config=False
    )
    flags = line.flags
    for name, least in (("num_train", 1), ("batch_size", 1)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: must be at least {least}; got {name}={value}.")
    config = data_config(line.overrides)
    if Path(flags.out).exists():
        raise UserError(
            f"--out: must not be there yet; got {flags.out!r}. Name another folder, or "
            "move it away."
        )
    extract(config, flags)


def data_config(overrides: Any) -> Any:
    """The images that --config.data.KEY=VALUE name, as their source's dataclass.

    Raises:
        UserError: for keys of other groups, no source, or one of latents.
    """
    from attnjax.data import images

    for dotted, _ in overrides:
        if not dotted.startswith("data."):
            raise unknown("extract_latents", "setting", f"config.{dotted}", ["data"])
    given = apply_overrides({"data": {}}, list(overrides))["data"]
    if "name" not in given:
        raise UserError(
            "extract_latents: the images must be named; got no config.data.name. Add "
            f"--config.data.name=SOURCE, one of {', '.join(images.known_sources())}."
        )
    kind = images.config_class(str(given["name"]))
    if kind.is_latent:
        raise UserError(
            "extract_latents: encodes pictures; got --config.data.name="
            f"{given['name']}. Name the images themselves."
        )
    resolved = schema.resolve(kind, given, path="config.data")
    return schema.build(kind, resolved, path="config.data")


def extract(config: Any, flags: Flags) -> None:
    """Encode both splits of a source of images into a new folder."""
    from attnjax.data import images
    from attnjax.data.images.latent_files import LatentFacts, new_latents
    from attnjax.data.vae import open_vae

    corpus = images.open_corpus(config)
    count = flags.num_train or corpus.train.num_images
    if count is None:
        raise UserError(
            f"--num_train: must say how many images of an endless source to take; got "
            f"none, config.data.name={config.name}. Give it, e.g. 10000."
        )
    counts = {
        "train": min(count, corpus.train.num_images or count),
        "eval": corpus.eval.num_images,
    }
    vae = open_vae(flags.vae, device=flags.device)
    if vae.pixel_channels != config.channels:
        raise UserError(
            f"--vae: encodes pictures of {vae.pixel_channels} channels; got "
            f"config.data.channels={config.channels}. Set "
            f"--config.data.channels={vae.pixel_channels}."
        )
    side = vae.latent_side(config.image_size)
    facts = LatentFacts(
        shape=(side, side, vae.channels),
        class_names=corpus.class_names,
        scale=vae.scale,
        shift=vae.shift,
        has_flips=flags.flips,
        dtype=flags.dtype,
        encoder=vae.facts,
        source={**corpus.provenance, "image_size": config.image_size}
        | {"fingerprint": corpus.fingerprint},
    )
    with new_latents(Path(flags.out), facts) as writer:
        for name, total in counts.items():
            split = getattr(corpus, name)
            with progress(f"encoding {config.name} ({name})", total=total) as advance:
                for rows, labels in _encoded(vae, split, total, flags):
                    writer.add(name, rows, labels)
                    advance(len(labels))
    left_out = f", {len(corpus.unreadable)} left out" if corpus.unreadable else ""
    height, width, channels = facts.shape
    print(
        f"wrote {flags.out}: {writer.counts['train']} images to train on and "
        f"{writer.counts['eval']} held out{left_out}, latents {height}x{width}x"
        f"{channels}. Train on them with --config.data.name=latents:{flags.out}"
    )


def _encoded(
    vae: Any, split: Any, total: int, flags: Flags
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows [n, views, h, w, 2 C] and labels [n] of the images that can be read."""
    for start in range(0, total, flags.batch_size):
        wanted = np.arange(start, min(start + flags.batch_size, total))
        pictures, labels, readable = split.read(wanted)
        pictures, labels = pictures[readable], labels[readable]
        if not len(labels):
            continue
        views = [pictures, pictures[:, :, ::-1]] if flags.flips else [pictures]
        yield np.stack([vae.moments(view) for view in views], axis=1), labels


if __name__ == "__main__":
    run_main(main)
