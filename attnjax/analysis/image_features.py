"""Features of pictures by a network that a user has, and distances of them.

The network is a TorchScript file, such as the one of Inception that distances are
commonly reported with: it takes pictures and returns a vector of each. PyTorch runs it,
imported lazily. Source of the distance: Heusel et al., arXiv 1706.08500.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from attnjax.analysis.sample_quality import (
    OF_ENDLESS,
    frechet_distance,
    frechet_of_moments,
)
from attnjax.core.errors import UserError
from attnjax.data import keyed
from attnjax.data.images import geometry
from attnjax.data.progress import progress
from attnjax.data.vae import Vae
from attnjax.decoding.run import LoadedDenoiser

KIND = "torchscript"
AT_ONCE = 50
# Pixels as 0 to 255 in bytes; or as floats, in [0, 1] or in [-1, 1].
Input = Literal["uint8", "unit", "signed"]
INPUTS = get_args(Input)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A TorchScript network from pictures to features.

    Attributes:
        name: what a metric says of it: the file's name and the start of its digest.
        size: side that pictures are resized to, bilinearly; None leaves them.
        input: how pixels are given.
    """

    name: str
    size: int | None
    input: str
    _module: Any = dataclasses.field(repr=False)

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """float32 [N, F] of pictures uint8 [N, H, W, Ch], Ch = 1 or 3; the network
        sees [N, 3, H, W].

        Raises:
            UserError: where it does not take them, or returns something else.
        """
        import torch

        shown = self._shown(pictures)
        # Inception as it is handed round returns class probabilities if not asked.
        asked = {"return_features": True} if _takes_features(self._module) else {}
        try:
            with torch.no_grad():
                found = self._module(torch.from_numpy(shown), **asked)
        except (RuntimeError, torch.jit.Error) as error:
            lines = str(error).strip().splitlines()
            raise UserError(
                f"--features: {self.name} cannot run on {shown.dtype} "
                f"{list(shown.shape)}; got: {lines[-1].strip()[:200]} Set "
                "--features_size or --features_input."
            ) from error
        if not isinstance(found, torch.Tensor) or found.ndim != 2:
            what = list(found.shape) if isinstance(found, torch.Tensor) else type(found)
            raise UserError(
                "--features: the network must return a tensor [N, F]; got "
                f"{what} from {self.name}. Script one that does."
            )
        features = found.float().numpy()
        if not np.isfinite(features).all():
            raise UserError(
                f"--features: must be finite; got others from {self.name}. Check "
                "--features_input."
            )
        return features

    def _shown(self, pictures: np.ndarray) -> np.ndarray:
        """[N, 3, H, W] as the network takes them."""
        if self.size is not None:
            height, width = pictures.shape[1:3]
            box = (0, 0, width, height)
            resized = [geometry.resize(p, self.size, box) for p in pictures]
            pictures = np.stack(resized)
        if pictures.shape[-1] == 1:
            pictures = np.repeat(pictures, 3, axis=-1)
        shown = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
        if self.input == "uint8":
            return shown
        unit = shown.astype(np.float32) / 255.0
        return unit if self.input == "unit" else 2.0 * unit - 1.0


def _takes_features(module: Any) -> bool:
    names = [argument.name for argument in module.forward.schema.arguments]
    return "return_features" in names


def open_network(text: str, *, size: int | None, pixels: str | None) -> Network:
    """The network that --features names, on the CPU.

    Args:
        text: "torchscript:FILE".
        size: see `Network`; at least 1.
        pixels: of `INPUTS`; None for uint8.

    Raises:
        UserError: for another kind, a file that is not there or not TorchScript, or a
            missing PyTorch.
    """
    kind, _, name = text.partition(":")
    if kind != KIND or not name:
        raise UserError(
            f"--features: must be {KIND}:FILE; got {text!r}. FILE is a network that "
            "torch.jit.save wrote."
        )
    if size is not None and size < 1:
        raise UserError(f"--features_size: must be at least 1; got {size}.")
    path = Path(name).expanduser()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"--features: the file must be readable; got {str(path)!r}: "
            f"{error.strerror}. Download it first (docs/dit.md)."
        ) from error
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--features: a TorchScript file is run by torch; got {error}. Install it "
            "with: pip install 'attnjax[vae]'"
        ) from error
    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--features: must be a file that torch.jit.save wrote; got {str(path)!r}. "
            "A state dict holds no network: script the network first."
        ) from error
    return Network(
        f"{path.name} (sha256 {digest[:12]})", size, pixels or "uint8", module
    )


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a set of features is compared by.

    Attributes:
        mean: float64 [F].
        covariance: float64 [F, F].
    """

    mean: np.ndarray
    covariance: np.ndarray


def read_reference(path: str | os.PathLike) -> Moments:
    """The moments of a file .npz with `mu` [F] and `sigma` [F, F].

    Raises:
        UserError: a file that is not there, or holds something else.
    """
    try:
        with np.load(path) as file:
            mean, covariance = (
                np.asarray(file[n], np.float64) for n in ("mu", "sigma")
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "--features_reference: must be a file .npz with mu [F] and sigma [F, F]; "
            f"got {str(path)!r}: {error}."
        ) from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            "--features_reference: must hold mu [F] and sigma [F, F]; got shapes "
            f"{mean.shape} and {covariance.shape}."
        )
    return Moments(mean, covariance)


def check_data(run: LoadedDenoiser) -> None:
    """Raise UserError where a run's samples and its data have other sizes."""
    drawn = (run.model.image_size, run.model.channels)
    if run.feed.image_shape != drawn:
        raise UserError(
            "--features: compares samples with images of their size and channels; got "
            f"{run.feed.image_shape} of {run.feed.data.name}, the samples have "
            f"{drawn}. Name the data that the run learned."
        )


def feature_distances(
    run: LoadedDenoiser,
    samples: np.ndarray,
    network: Network,
    *,
    vae: Vae | None = None,
    num_images: int | None = None,
    reference: Moments | None = None,
) -> dict[str, Any]:
    """How far the features of samples are from those of the data.

    Args:
        run: what drew them.
        samples: [N, H, W, Ch] as drawn.
        network: of the features.
        vae: what decodes samples and data of a run on latents; none on pixels.
        num_images: at most so many images of a split, the same ones every time; None
            for all (of endless data `OF_ENDLESS`).
        reference: moments to compare with in place of those of the data.

    Returns:
        "features" (which network), "samples", "frechet_data" (what they were compared
        with), "frechet_distance" and, where there is no reference,
        "frechet_distance_held_out": that of the held-out images from the training
        images.

    Raises:
        UserError: for a reference with another number of features.
    """
    made = _features(network, _of_samples(run, samples, vae), len(samples), "samples")
    found = {"features": f"{KIND}:{network.name}", "samples": len(samples)}
    if reference is not None:
        if len(reference.mean) != made.shape[1]:
            raise UserError(
                "--features_reference: must be of the same features; got "
                f"{len(reference.mean)} of them, {network.name} has {made.shape[1]}."
            )
        distance = frechet_of_moments(
            made.mean(axis=0, dtype=np.float64),
            np.atleast_2d(np.cov(made, rowvar=False, dtype=np.float64)),
            reference.mean,
            reference.covariance,
        )
        return found | {"frechet_data": "reference", "frechet_distance": distance}
    corpus, sets = run.feed.corpus, []
    for split in (corpus.train, corpus.eval):
        chosen = _chosen(split, num_images)
        pictures = _of_data(run, split, chosen, vae)
        sets.append(_features(network, pictures, len(chosen), f"{split.name} images"))
    real, held_out = sets
    kind = "images" if vae is None else "decoded latents"
    return found | {
        "frechet_data": f"{len(real)} training {kind}",
        "frechet_distance": frechet_distance(made, real),
        "frechet_distance_held_out": frechet_distance(held_out, real),
    }


def _features(
    network: Network, pictures: Iterator[np.ndarray], total: int, what: str
) -> np.ndarray:
    """[N, F] of pictures that come a few at a time."""
    found = []
    with progress(f"features of {what}", total=total) as advance:
        for part in pictures:
            found.append(network.features(part))
            advance(len(part))
    return np.concatenate(found)


def _of_samples(run: LoadedDenoiser, samples: np.ndarray, vae: Vae | None):
    """uint8 pictures of samples, a few at a time."""
    for start in range(0, len(samples), AT_ONCE):
        part = samples[start : start + AT_ONCE]
        yield run.pixels(part) if vae is None else run.decoded(part, vae)


def _chosen(split: Any, count: int | None) -> np.ndarray:
    """Which images of a split are compared with, in stored order."""
    if split.num_images is None:
        return np.arange(count or OF_ENDLESS)
    if count is None or count >= split.num_images:
        return np.arange(split.num_images)
    order = keyed.permutation(0, keyed.HELD_OUT, 0, split.num_images)
    return np.sort(order[:count])


def _of_data(run: LoadedDenoiser, split: Any, chosen: np.ndarray, vae: Vae | None):
    """uint8 pictures of a split, a few at a time; those that can be read."""
    for start in range(0, len(chosen), AT_ONCE):
        part = chosen[start : start + AT_ONCE]
        if vae is not None:
            yield run.decoded(split.held(part)[0], vae)
            continue
        pictures, _, readable = split.read(part)
        if readable.any():
            yield pictures[readable]
