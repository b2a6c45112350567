"""How good the samples of a denoiser are, by the features of a classifier.

A trained classifier of the same classes names the samples and embeds them: the vectors
that its head reads are the features of the distances here. Numbers with other features
(such as Inception's) are other numbers.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.errors import UserError
from attnjax.decoding.run import LoadedClassifier, LoadedDenoiser
from attnjax.training.feeds.images import load_latents

AT_ONCE = 250
# Rows of distances that are in memory, and images that are taken of endless data.
ROWS = 1_000
OF_ENDLESS = 5_000


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The squared Frechet distance of two sets' normal distributions.

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), in float64. Source: Heusel et al., arXiv
    1706.08500, equation 6.

    Args:
        one, other: features [N, F] and [M, F]; N and M are at least 2.
    """
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, other))
    return frechet_of_moments(one.mean(axis=0), first, other.mean(axis=0), second)


def frechet_of_moments(
    mean: np.ndarray, first: np.ndarray, other: np.ndarray, second: np.ndarray
) -> float:
    """`frechet_distance` from means [F] and covariances [F, F], float64."""
    gap = mean - other
    # The roots of S S' are those of S^(1/2) S' S^(1/2), which is symmetric.
    root = _symmetric_root(first)
    values = np.linalg.eigvalsh(root @ second @ root)
    cross = np.sqrt(np.clip(values, 0.0, None)).sum()
    return float(gap @ gap + np.trace(first) + np.trace(second) - 2.0 * cross)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def precision_recall(
    real: np.ndarray, made: np.ndarray, *, neighbours: int = 3
) -> tuple[float, float]:
    """(share of samples among the data, share of the data among the samples).

    A point is among a set where it is as close to one of its points as that point's
    k-th nearest neighbour in the set. Source: Kynkaanniemi et al., arXiv 1904.06991,
    equations 1 and 2.

    Args:
        real, made: features [N, F] and [M, F]; both have more than k rows.
        neighbours: k.
    """
    real, made = (np.asarray(x, np.float64) for x in (real, made))
    if min(len(real), len(made)) <= neighbours:
        raise ValueError(
            "precision_recall: both sets must have more rows than neighbours; got "
            f"{len(real)} and {len(made)}, neighbours={neighbours}."
        )
    return (
        _share_among(real, made, neighbours),
        _share_among(made, real, neighbours),
    )


def _share_among(points: np.ndarray, others: np.ndarray, neighbours: int) -> float:
    """The share of the others that are among the points."""
    radii = _radii(points, neighbours)
    near = [np.any(_distances(b, points) <= radii, axis=1) for b in _blocks(others)]
    return float(np.mean(np.concatenate(near)))


def _blocks(points: np.ndarray) -> list[np.ndarray]:
    """The rows, a few at a time: all distances at once would not fit."""
    return [points[i : i + ROWS] for i in range(0, len(points), ROWS)]


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances [N, M]."""
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2.0 * one @ other.T
    return np.maximum(squares, 0.0)


def _radii(points: np.ndarray, neighbours: int) -> np.ndarray:
    """[N] squared distance to the k-th nearest other point."""
    return np.concatenate(
        [
            np.partition(_distances(b, points), neighbours, axis=1)[:, neighbours]
            for b in _blocks(points)
        ]
    )


@dataclasses.dataclass(frozen=True)
class Judge:
    """A classifier that names and embeds another run's images.

    Args:
        classifier: the loaded run.
        denoiser: the run whose images it is shown; both have the same classes and
            sizes of images.

    Raises:
        UserError: when they have not.
    """

    classifier: LoadedClassifier
    denoiser: LoadedDenoiser

    def __post_init__(self):
        if not isinstance(self.classifier, LoadedClassifier):
            raise UserError(
                "--judge: must be a run of a classifier of images (config.model.name="
                f"vit); got {self.classifier.path}, config.model.name="
                f"{self.classifier.config['model']['name']}."
            )
        size, own = self.denoiser.model.image_size, self.denoiser.feed.image_shape[0]
        if own != size:
            raise UserError(
                "--judge: compares samples with images of their size; got "
                f"config.data.image_size={own}, the samples have {size}. "
                "Leave it out."
            )
        kinds = [_encoded(run) for run in (self.classifier, self.denoiser)]
        if kinds[0] != kinds[1]:
            raise UserError(
                "--judge: must have learned what is drawn; got a classifier of "
                f"{kinds[0]}, the samples are {kinds[1]}. Train one on the same data, "
                "or use --features with --vae."
            )
        for name in ("image_size", "channels"):
            own, wanted = (
                getattr(r.model, name) for r in (self.classifier, self.denoiser)
            )
            if own != wanted:
                raise UserError(
                    f"--judge: must take images of the same {name}; got {own}, the "
                    f"samples have {wanted}. Train it with config.data.{name}={wanted}."
                )
        if self.classifier.class_names != self.denoiser.class_names:
            raise UserError(
                "--judge: must have the same classes; got "
                f"{list(self.classifier.class_names)}, the samples have "
                f"{list(self.denoiser.class_names)}."
            )

    def look(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 [N, C] and named classes int [N] of the denoiser's images,
        normalised as its training data."""
        features, logits = self._outputs(images)
        return features.astype(np.float32), logits.argmax(axis=-1)

    def log_probabilities(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """float [N]: log p(label) of such images, in nats."""
        _, logits = self._outputs(images)
        found = jax.nn.log_softmax(logits.astype(np.float32), axis=-1)
        return np.asarray(found)[np.arange(len(images)), np.asarray(labels)]

    def _outputs(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, C] and logits [N, classes]."""
        own, theirs = (_normalisation(run) for run in (self.classifier, self.denoiser))
        shown = (images * theirs[1] + theirs[0] - own[0]) / own[1]
        arrays = self.classifier.params, self.classifier.buffers
        found = []
        for start in range(0, len(shown), AT_ONCE):
            part = jnp.asarray(shown[start : start + AT_ONCE], jnp.float32)
            found.append(jax.device_get(_looks(self.classifier.model, *arrays, part)))
        features, logits = (np.concatenate(x) for x in zip(*found, strict=True))
        return features, logits


@partial(jax.jit, static_argnums=0)
def _looks(model, params, buffers, part):
    ctx = model.context(batch=len(part))
    features, _ = model.features(params, buffers, part, ctx)
    return features, model.logits(params, buffers, part, ctx)[0]


def _normalisation(run: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation of a run's `config.data`; latents are
    scaled as they are encoded."""
    data = run.config["data"]
    if _is_latent(data):
        return np.float32(0.0), np.float32(1.0)
    return np.asarray(data["mean"], np.float32), np.asarray(data["std"], np.float32)


def _is_latent(data: dict) -> bool:
    from attnjax.data import images

    return images.config_class(data["name"]).is_latent


def _encoded(run: Any) -> str:
    """What a run's images are, for a comparison."""
    if not _is_latent(run.config["data"]):
        return "pixels"
    facts = load_latents(run.path)
    of = str(facts.encoder.get("fingerprint", "unknown"))[:12]
    return f"latents (scale {facts.scale}, shift {facts.shift}, encoder {of})"


def judged(
    denoiser: LoadedDenoiser,
    classifier: Any,
    *,
    per_class: int,
    **settings: Any,
) -> dict[str, float]:
    """How a classifier sees the samples of a denoiser.

    Args:
        denoiser: the loaded run.
        classifier: of the same classes.
        per_class: samples of each class.
        settings: of `LoadedDenoiser.draw`.

    Returns:
        "samples"; "named" (share of the samples that the classifier names by their
        class); "frechet" (distance of the samples' features from those of the training
        images), "frechet_held_out" (the same of the held-out images: what real images
        have); "precision" and "recall" against the training images.
    """
    judge = Judge(classifier, denoiser)
    return judged_samples(judge, *samples_of(denoiser, per_class, **settings))


def samples_of(
    denoiser: LoadedDenoiser, per_class: int, **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Samples float32 [N, H, W, Ch] as they are drawn, and their classes int [N]."""
    labels = np.repeat(np.arange(len(denoiser.class_names)), per_class)
    parts = [
        denoiser.draw(labels[start : start + AT_ONCE].tolist(), **_own(settings, start))
        for start in range(0, len(labels), AT_ONCE)
    ]
    return np.concatenate(parts), labels


def judged_samples(
    judge: Judge, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """`judged` of samples [N, H, W, Ch] that are there."""
    real, held_out = data_features(judge)
    found = compared(judge, images, labels, real=real)
    return {**found, "frechet_held_out": frechet_distance(held_out, real)}


def data_features(judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """Features of all training and of all held-out images of the denoiser's data."""
    corpus = judge.denoiser.feed.corpus
    real, held_out = (judge.look(_all(s))[0] for s in (corpus.train, corpus.eval))
    return real, held_out


def compared(
    judge: Judge, images: np.ndarray, labels: np.ndarray, *, real: np.ndarray
) -> dict[str, float]:
    """ "samples", "named", "frechet", "precision" and "recall" of `judged`.

    Args:
        images: samples [N, H, W, Ch], normalised as the denoiser's data.
        labels: their classes, int [N].
        real: features [M, C] of the data.
    """
    made, named = judge.look(images)
    precision, recall = precision_recall(real, made)
    return {
        "samples": len(labels),
        "named": float(np.mean(named == labels)),
        "frechet": frechet_distance(made, real),
        "precision": precision,
        "recall": recall,
    }


def _own(settings: dict, start: int) -> dict:
    """The settings of one part: noise of its own."""
    return settings | {"seed": settings.get("seed", 0) * 1_000_003 + start}


def _all(split: Any) -> np.ndarray:
    """The readable images of a split, in stored order and normalised; of endless data
    the first `OF_ENDLESS`."""
    from attnjax.data import images

    if split.num_images is None:
        plain = images.Augment()
        batches = [
            images.batch(split, seed=0, step=i, batch_size=AT_ONCE, augment=plain)
            for i in range(OF_ENDLESS // AT_ONCE)
        ]
    else:
        batches = images.eval_batches(split, batch_size=AT_ONCE)
    return np.concatenate([batch["image"][batch["weight"] > 0] for batch in batches])
