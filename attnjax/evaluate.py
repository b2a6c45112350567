"""python -m attnjax.evaluate --workdir RUN: a run on other data or other settings."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal

from attnjax.core.cli import run_main
from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line
from attnjax.decoding import draw_flags


@dataclasses.dataclass(frozen=True)
class _RunFlags:
    """The run and its judge.

    Attributes:
        workdir: the run directory.
        step: the checkpoint (none: the newest intact one).
        keep_layers: layers that stay, from 0, e.g. 0,2,4; the others are left out
            (none: all).
        out: a JSON file for the metrics (none: the terminal alone).
        shifts: of a classifier: in how many circular shifts of each held-out image,
            drawn alike for all, its name is compared with that of the image itself,
            or all (none: not at all).
        within: accuracy under the worst shift is of those by at most so many pixels
            along each axis (none: of those that are compared).
        judge: of a denoiser: the run of a classifier of the same classes, which names
            images that are drawn and compares their features with the data's (none: no
            images are drawn).
        features: of a denoiser: torchscript:FILE, a network whose features of images
            that are drawn are compared with those of the data, as Inception's.
        features_size: side that images are resized to for it (none: as they are).
        features_input: how it takes pixels: uint8, or floats: unit for [0, 1], signed
            for [-1, 1] (none: uint8).
        features_images: most images of a split that are compared with (none: all).
        features_reference: a file .npz with mu and sigma of such features, compared
            with in place of the data.
        vae: of a run on latents, for features: the folder of the autoencoder that
            decodes what is drawn, and the data.
        per_class: images of each class that are drawn (none: 100).
    """

    workdir: str
    step: int | None = None
    keep_layers: tuple[int, ...] | None = None
    out: str | None = None
    shifts: int | Literal["all"] | None = None
    within: int | None = None
    judge: str | None = None
    features: str | None = None
    features_size: int | None = None
    features_input: Literal["uint8", "unit", "signed"] | None = None
    features_images: int | None = None
    features_reference: str | None = None
    vae: str | None = None
    per_class: int | None = None


@dataclasses.dataclass(frozen=True)
class Flags(draw_flags.DrawFlags, _RunFlags):
    """Evaluate a run on held-out data; --config.data... and --config.model... change
    the data, the context length or how the model is run."""


PER_CLASS = 100
_FEATURES = (
    "features_size",
    "features_input",
    "features_images",
    "features_reference",
    "vae",
)


def main(argv: list[str]) -> None:
    """The command line."""
    line = parse_command_line(
        argv, Flags, program="attnjax.evaluate", config=False, overrides=True
    )
    flags = line.flags
    _check_samples(flags)
    if flags.within is not None and flags.shifts is None:
        raise UserError(
            f"--within: belongs to --shifts; got within={flags.within} without it. "
            "Add --shifts=all, or leave it out."
        )
    from attnjax.decoding.evaluate import evaluate_run
    from attnjax.decoding.run import load_run
    from attnjax.training import disk

    out = None if flags.out is None else disk.ready_out(flags.out)

    run = load_run(
        flags.workdir,
        step=flags.step,
        overrides=line.overrides,
        keep_layers=flags.keep_layers,
    )
    look = _looks(flags, run) if flags.judge or flags.features else None
    if flags.shifts is not None:
        from attnjax.analysis import shift_consistency

        around = dict(shifts=flags.shifts, within=flags.within)
        shift_consistency.check(run, **around)
    metrics = evaluate_run(run)
    if flags.shifts is not None:
        metrics |= shift_consistency.measured(run, **around)
    if look is not None:
        metrics |= look()
    for name, value in metrics.items():
        print(
            f"{name:16} {value:.6g}"
            if isinstance(value, float)
            else f"{name:16} {value}"
        )
    if out is not None:
        with disk.disk_errors("--out"):
            out.write_text(json.dumps(metrics, indent=2) + "\n")


def _looks(flags: Flags, run: Any) -> Callable[[], dict[str, Any]]:
    """What draws samples and tells of them; all that can be wrong is, before the time
    is spent."""
    from attnjax.analysis import image_features, sample_quality
    from attnjax.data.vae import open_vae
    from attnjax.decoding.run import load_run, require_denoiser

    owner = "--judge" if flags.judge else "--features"
    run, judge, network = require_denoiser(run, owner=owner), None, None
    if flags.judge is not None:
        judge = sample_quality.Judge(load_run(flags.judge, owner="--judge"), run)
    if flags.features is not None:
        vae = reference = None
        if run.latents is not None and flags.vae is None:
            raise UserError(
                f"--features: are those of pictures, and {run.path} learned latents; "
                "got no --vae. Name the folder of their autoencoder."
            )
        network = image_features.open_network(
            flags.features, size=flags.features_size, pixels=flags.features_input
        )
        if flags.features_reference is None:
            image_features.check_data(run)
        else:
            reference = image_features.read_reference(flags.features_reference)
        if flags.vae is not None:
            run.require_latents("--vae")
            vae = open_vae(flags.vae)
    drawn = draw_flags.given(flags)
    run.draw_settings(**drawn)

    def look() -> dict[str, Any]:
        per_class = flags.per_class or PER_CLASS
        images, labels = sample_quality.samples_of(run, per_class, **drawn)
        found = {}
        if judge is not None:
            found |= {"judge": flags.judge}
            found |= sample_quality.judged_samples(judge, images, labels)
        if network is not None:
            count = flags.features_images
            how = {"vae": vae, "num_images": count, "reference": reference}
            found |= image_features.feature_distances(run, images, network, **how)
        return found

    return look


def _check_samples(flags: Flags) -> None:
    """Raise UserError for settings of samples where none are drawn."""
    if flags.features is None:
        draw_flags.refuse(
            flags,
            _FEATURES,
            lambda name, value: (
                f"--{name}: belongs to --features; got {name}={value} without it. Add "
                "--features torchscript:FILE, or leave it out."
            ),
        )
    if flags.judge is None and flags.features is None:
        draw_flags.refuse(
            flags,
            ("per_class", *draw_flags.FIELDS),
            lambda name, value: (
                f"--{name}: belongs to the samples that --judge looks at; got "
                f"{name}={value} without it. Add --judge RUN, the run of a classifier, "
                "or --features, or leave it out."
            ),
        )
    if flags.features_images is not None:
        if flags.features_reference is not None:
            raise UserError(
                "--features_images: counts images of the data; got "
                f"{flags.features_images} with a --features_reference in place of "
                "them. Leave one out."
            )
        if flags.features_images < 2:
            raise UserError(
                "--features_images: must be at least 2; got "
                f"features_images={flags.features_images}."
            )
    if flags.per_class is not None and flags.per_class < 2:
        raise UserError(
            f"--per_class: must be at least 2; got per_class={flags.per_class}."
        )


if __name__ == "__main__":
    run_main(main)
