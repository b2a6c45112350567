"""python -m attnjax.generate --workdir RUN: text or images from a trained model."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.cli import run_main
from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line
from attnjax.decoding import draw_flags

# Flags of text, and what they are when they are not given.
TEXT = {
    "prompt": "\n",
    "max_new_tokens": 200,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}
# Flags of images; `seed` is of both.
IMAGES = ("labels", "vae", *(name for name in draw_flags.FIELDS if name != "seed"))
PICTURES = (".png", ".jpg", ".webp")
ARRAYS = (".npy",)


@dataclasses.dataclass(frozen=True)
class _RunFlags:
    """The run, and the flags of text.

    Attributes:
        workdir: the run directory.
        prompt: text: what to go on from (none: a newline); images: the caption to
            draw, of a model that reads captions.
        max_new_tokens: text: most tokens added (none: 200).
        temperature: text: divides the logits; 0 takes the most likely token (none:
            1).
        top_k: text: keep the k most likely tokens; 0 keeps all (none: 0).
        top_p: text: keep the smallest set of tokens with this probability; 1 keeps
            all (none: 1).
        labels: images: names or numbers of classes, separated by commas, a column
            each, or no_class (none: all of them).
        vae: images of a run on latents: the folder of the autoencoder that decodes
            them (none: the latents themselves are written).
    """

    workdir: str
    prompt: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    labels: str | None = None
    vae: str | None = None


@dataclasses.dataclass(frozen=True)
class Flags(draw_flags.DrawFlags, _RunFlags):
    """Generate text from a language model, or images from a denoiser.

    Attributes:
        seed: of the draws.
        num: how many samples, of each class.
        step: the checkpoint (none: the newest intact one).
        out: a file for the text (none: the terminal), the PNG of the images (none:
            samples.png), or the array of latents (none: samples.npy).
    """

    seed: int = 0
    num: int = 1
    step: int | None = None
    out: str | None = None


def main(argv: list[str]) -> None:
    """The command line."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.generate", config=False, overrides=False
    ).flags
    if flags.num < 1:
        raise UserError(
            f"attnjax.generate: num must be at least 1; got num={flags.num}."
        )
    from attnjax.decoding.run import read_config
    from attnjax.training import feeds

    model = read_config(Path(flags.workdir))["model"]
    kind = feeds.feed_class(model)
    if issubclass(kind, feeds.ImageFeed) and not issubclass(kind, feeds.DiffusionFeed):
        raise UserError(
            "attnjax.generate: needs a language model or a denoiser of images; got a "
            f"run with config.model.name={model['name']}. Its numbers: python -m "
            "attnjax.evaluate --workdir RUN"
        )
    draws = issubclass(kind, feeds.DiffusionFeed)
    own, other = (IMAGES, tuple(TEXT)) if draws else (tuple(TEXT), IMAGES)
    if issubclass(kind, feeds.CaptionedFeed):
        own, other = (*own, "prompt"), tuple(name for name in other if name != "prompt")
    what = "a denoiser of images" if draws else "a language model"
    draw_flags.refuse(
        flags,
        other,
        lambda name, value: (
            f"--{name}: does nothing for {what}; got {name}={value}. Leave it out; "
            f"allowed here: {', '.join(own)}."
        ),
    )
    if draws:
        _images(flags)
    else:
        _text(flags)


def _text(flags: Flags) -> None:
    given = {name: getattr(flags, name) for name in TEXT}
    options = {n: TEXT[n] if value is None else value for n, value in given.items()}
    if options["max_new_tokens"] < 1:
        raise UserError(
            "attnjax.generate: max_new_tokens must be at least 1; got "
            f"max_new_tokens={options['max_new_tokens']}."
        )
    from attnjax.decoding.run import load_run, read_config, require_text
    from attnjax.decoding.sampling import Sampler
    from attnjax.training import disk

    require_text(read_config(Path(flags.workdir)), "attnjax.generate")
    out = None if flags.out is None else disk.ready_out(flags.out)
    sampler = Sampler(options["temperature"], options["top_k"], options["top_p"])
    run = load_run(flags.workdir, step=flags.step)
    prompt = options["prompt"]
    texts = run.generate(
        prompt,
        max_new_tokens=options["max_new_tokens"],
        num=flags.num,
        sampler=sampler,
        seed=flags.seed,
    )
    blocks = [prompt + text for text in texts]
    text = blocks[0] if len(blocks) == 1 else _numbered(blocks)
    if out is None:
        print(text)
    else:
        with disk.disk_errors("--out"):
            out.write_text(text + "\n")
        print(f"wrote {out}")


def _numbered(blocks: list[str]) -> str:
    return "\n".join(f"--- sample {i + 1}\n{block}" for i, block in enumerate(blocks))


def _images(flags: Flags) -> None:
    from attnjax.data.vae import open_vae
    from attnjax.decoding.run import load_run
    from attnjax.training import disk

    if flags.prompt is not None and flags.labels is not None:
        raise UserError(
            "--prompt: is drawn alone; got --labels too, "
            f"prompt={flags.prompt!r}, labels={flags.labels}. Leave one of them out."
        )
    run = load_run(flags.workdir, step=flags.step)
    is_array = run.latents is not None and flags.vae is None
    kinds = ARRAYS if is_array else PICTURES
    out = disk.ready_out(flags.out or f"samples{kinds[0]}", kinds=kinds)
    vae = None
    if flags.vae is not None:
        facts = run.require_latents("--vae")
        vae = open_vae(flags.vae)
        if vae.fingerprint != facts.encoder.get("fingerprint"):
            name = facts.encoder.get("name", "another")
            print(f"--vae: not the one that made the latents ({name})")
    names, make = run.class_names, run.labels
    if flags.prompt is not None:
        names, make = (flags.prompt,), run.prompts
    elif flags.labels not in (None, "all"):
        names = tuple(name.strip() for name in flags.labels.split(","))
    asked = make(names * flags.num)
    images, evaluations = run.draw_told(asked, **draw_flags.given(flags))
    with disk.disk_errors("--out"):
        if is_array:
            np.save(out, images)
        else:
            _save_sheet(out, run, images, vae, columns=len(names))
    words = names if flags.prompt is None else (repr(flags.prompt),)
    told = f"{flags.num} of each of {', '.join(words)}"
    if is_array:
        told += _of_latents(run.latents, images.shape)
    print(f"wrote {out}: {told}; {evaluations} predictions")


def _save_sheet(out: Path, run: Any, images: np.ndarray, vae: Any, *, columns: int):
    """Write a picture of the samples, a class a column."""
    from PIL import Image

    from attnjax.decoding import pictures

    shown = run.pixels(images) if vae is None else run.decoded(images, vae)
    Image.fromarray(pictures.sheet(shown, columns=columns)).save(out)


def _of_latents(facts: Any, shape: tuple[int, ...]) -> str:
    """What the array is, and how it becomes pictures."""
    scale, shift = (", ".join(f"{x:g}" for x in v) for v in (facts.scale, facts.shift))
    plus = f" + ({shift})" if any(facts.shift) else ""
    return (
        f", in turn, as latents float32 {list(shape)}, channels last. For pictures: "
        f"--vae DIR, which decodes latents / ({scale}){plus}"
    )


if __name__ == "__main__":
    run_main(main)
