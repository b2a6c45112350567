"""Batches of images: a pure function of (seed, step, global row).

There is no iterator state. Resuming, skipping, and another number of hosts are the
same thing: asking for a step, or for some of its rows.

Every batch is a dict:
    image        float32 [B, H, W, Ch], normalised; or a latent, scaled
    label        int32 [B]
    other_label  int32 [B], of the image mixed in; `label` where there is none
    mix          float32 [B], in [1/2, 1]: the target is
                 mix onehot(label) + (1 - mix) onehot(other_label)
    weight       float32 [B]: 0 for an image that cannot be decoded, or that fills up
                 the last batch of an evaluation, else 1
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data import keyed
from attnjax.data.images import corruptions, geometry, randaugment
from attnjax.data.images.config import Augment
from attnjax.data.images.corpus import ImageSplit
from attnjax.data.images.latents import LatentSplit

Batch = dict[str, np.ndarray]

# Places of the random numbers of a row: mixup's, the mirror's, two of the padded
# crop, those of the inception crop, then RandAugment's.
_MIX, _FLIP, _PAD, _CROP = 0, 1, slice(2, 4), slice(4, 4 + geometry.INCEPTION_DRAWS)
_RANDAUGMENT = 4 + geometry.INCEPTION_DRAWS
# All of them are drawn whatever is switched on, so that one switch moves no other.
_DRAWS = _RANDAUGMENT + 8 * randaugment.DRAWS


def batch(
    split: ImageSplit | LatentSplit,
    *,
    seed: int,
    step: int,
    batch_size: int,
    augment: Augment,
    rows: slice | None = None,
) -> Batch:
    """The batch of one step, or the part of it that one host needs.

    Args:
        split: where the images are.
        seed: any integer; other seeds give other orders and augmentations.
        step: 0, 1, ...; step s takes rows s B to (s + 1) B of the endless
            sequence of epochs, so a batch may hold the end of one and the start of
            the next.
        batch_size: B, rows of the global batch.
        augment: what to do to the images.
        rows: which rows of the global batch to build; None for all.

    Returns: the dict described above, for the rows asked for.
    """
    wanted = np.arange(batch_size, dtype=np.int64)[rows or slice(None)]
    # Mixup's partner is the row before: a host builds one image more than it has.
    partners = (wanted - 1) % batch_size if augment.mixup else wanted
    needed, places = np.unique(np.stack([wanted, partners]), return_inverse=True)
    own, other = places.reshape(2, -1)
    ordinals = step * batch_size + needed
    draws, indices = _draws(seed, ordinals), _indices(split, seed, ordinals)
    if isinstance(split, LatentSplit):
        mirrored = draws[:, _FLIP] < 0.5 if augment.flip else None
        images, labels = split.drawn(
            indices, seed=seed, ordinals=ordinals, mirrored=mirrored
        )
        readable = np.ones(len(indices), bool)
    else:
        images, labels, readable = _augmented(split, indices, draws, augment)
    mix, image = np.ones(len(wanted), np.float32), images[own]
    if augment.mixup:
        share = mixup_share(draws[own, _MIX], augment.mixup)
        mix = np.where(readable[other], share, 1.0).astype(np.float32)
        weights = mix[:, None, None, None]
        image *= weights
        image += (1 - weights) * images[other]
    return {
        "image": image,
        "label": labels[own],
        "other_label": np.where(mix < 1, labels[other], labels[own]),
        "mix": mix,
        "weight": readable[own].astype(np.float32),
    }


def eval_batches(
    split: ImageSplit | LatentSplit,
    *,
    batch_size: int,
    rows: slice | None = None,
    corruption: str | None = None,
    severity: int = 0,
) -> Iterator[Batch]:
    """Every image of a split once, in stored order, without augmentation.

    The last batch is filled with rows of weight 0, so all batches have one shape.

    Args:
        split: where the images are; not endless.
        batch_size: B, rows of the global batch.
        rows: which of them to build; None for all.
        corruption: a name of `CORRUPTIONS`, or None. Image i is always corrupted in
            the same way.
        severity: 1 to 5; 0 without a corruption.

    Raises:
        UserError: unknown corruption, severity out of range, or a corruption of
            latents.
    """
    corruptions.check(corruption, severity)
    check_corruption(split.config, corruption)
    return _eval_batches(split, batch_size, rows, corruption, severity)


def check_corruption(config: Any, corruption: str | None) -> None:
    """Raise UserError where something is to be done to pixels that are not there."""
    if corruption is not None and config.is_latent:
        raise UserError(
            "config.eval.corruption: is done to pixels, and latents have none; got "
            f"corruption={corruption}, config.data.name={config.name}. Leave it out."
        )


def num_eval_batches(split: ImageSplit | LatentSplit, *, batch_size: int) -> int:
    """How many batches `eval_batches` yields."""
    return -(-split.num_images // batch_size)


def steps_per_epoch(
    split: ImageSplit | LatentSplit, *, batch_size: int
) -> float | None:
    """Steps in which training sees every image once; None where they are endless."""
    return None if split.num_images is None else split.num_images / batch_size


def mixup_share(draws: np.ndarray, alpha: float) -> np.ndarray:
    """[n] float64 in [1/2, 1]: the larger of lambda and 1 - lambda, Beta(alpha, alpha).

    Mixing a with b at lambda is mixing b with a at 1 - lambda, so keeping the larger
    share changes nothing but which of the two labels is called `label`.
    Source: Zhang et al., "mixup" (arXiv:1710.09412), equation 2.

    Args:
        draws: [n] in [0, 1).
        alpha: above 0.
    """
    from scipy.special import betaincinv

    share = betaincinv(alpha, alpha, draws)
    return np.maximum(share, 1.0 - share)


def _eval_batches(split, batch_size, rows, corruption, severity) -> Iterator[Batch]:
    for index in range(num_eval_batches(split, batch_size=batch_size)):
        wanted = np.arange(batch_size, dtype=np.int64)[rows or slice(None)]
        wanted += index * batch_size
        real = wanted < split.num_images
        known = np.where(real, wanted, 0)
        if isinstance(split, LatentSplit):
            image, labels = split.held(known)
            readable = real
        else:
            pixels, labels, readable = split.read(known)
            image = _floats(pixels)
            if corruption is not None:
                image = corruptions.apply(corruption, severity, image, wanted)
            image = split.normalise(image)
        labels = np.where(real, labels, 0).astype(np.int32)
        shown = np.where(real[:, None, None, None], image, 0)
        yield {
            "image": shown.astype(np.float32),
            "label": labels,
            "other_label": labels,
            "mix": np.ones(len(wanted), np.float32),
            "weight": (real & readable).astype(np.float32),
        }


def _floats(pixels: np.ndarray) -> np.ndarray:
    """uint8 in [0, 255] as float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)


def _draws(seed: int, ordinals: np.ndarray) -> np.ndarray:
    """[n, _DRAWS] float64 in [0, 1), one row for each row of the endless sequence."""
    return keyed.unit(keyed.rows(seed, keyed.AUGMENT, ordinals, _DRAWS))


def _indices(
    split: ImageSplit | LatentSplit, seed: int, ordinals: np.ndarray
) -> np.ndarray:
    """Which image each row of the endless sequence of epochs is."""
    if split.num_images is None:
        start = int(keyed.raw(seed, keyed.START, 0, 1)[0] >> np.uint64(16))
        return start + ordinals
    epochs, ranks = np.divmod(ordinals, split.num_images)
    indices = np.empty(len(ordinals), np.int64)
    for epoch in np.unique(epochs):
        order = _order(split, seed, int(epoch))
        here = epochs == epoch
        indices[here] = order[ranks[here]]
    return indices


def _order(split: ImageSplit | LatentSplit, seed: int, epoch: int) -> np.ndarray:
    def make() -> np.ndarray:
        return keyed.permutation(seed, keyed.IMAGES, epoch, split.num_images)

    return split.remember(("order", seed, epoch), make)


def _augmented(split: ImageSplit, indices, draws: np.ndarray, augment: Augment):
    """Images float32 [n, H, W, Ch], normalised, labels [n] and readable [n]."""
    finish = None
    if augment.crop == "inception":
        size, least = split.config.image_size, augment.min_area

        def finish(place: int, image: np.ndarray) -> np.ndarray:
            numbers = draws[place, _CROP]
            box = geometry.inception_box(*image.shape[:2], numbers, min_area=least)
            return geometry.resize(image, size, box)

    images, labels, readable = split.read(indices, finish)
    if augment.crop == "pad":
        images = geometry.pad_and_crop(images, draws[:, _PAD], pad=augment.pad)
    if augment.flip:
        images = geometry.flip(images, draws[:, _FLIP])
    if augment.randaugment_layers:
        images = randaugment.apply(
            images,
            draws[:, _RANDAUGMENT:],
            layers=augment.randaugment_layers,
            magnitude=augment.randaugment_magnitude,
        )
    return split.normalise(_floats(images)), labels, readable
