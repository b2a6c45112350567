"""How a classifier names images that are shifted in a circle.

What leaves an image at one side comes back at the other, so nothing of it is lost: a
classifier that is invariant to shifts names every one of them alike. Source of the
measures: Ding et al., arXiv 2306.07470 (consistency, and accuracy under the worst
shift).
"""

import itertools
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.errors import UserError
from attnjax.decoding.run import LoadedClassifier
from attnjax.training import experiment


def shifts_of(
    side: int, shifts: int | Literal["all"], within: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shifts that are looked at, int [S, 2] (down, right) in pixels, none of them
    zero; which count for consistency, and which for the worst, bool [S].

    Args:
        side: of the images, pixels.
        shifts: how many are drawn for consistency, the same ones each time; "all".
        within: the worst is of those by at most so many pixels along each axis (None:
            of those for consistency).

    Raises:
        UserError: for numbers out of range.
    """
    every = np.array(list(np.ndindex(side, side)))[1:]
    if shifts != "all" and not 1 <= shifts <= len(every):
        raise UserError(
            f"--shifts: must be from 1 to {len(every)}, the shifts of images of {side} "
            f"x {side} pixels, or all; got shifts={shifts}."
        )
    if within is not None and not 1 <= within < side:
        raise UserError(
            f"--within: must be from 1 to {side - 1} pixels on images of {side} x "
            f"{side}; got within={within}."
        )
    drawn = np.ones(len(every), bool)
    if shifts != "all":
        drawn[:] = False
        chosen = np.random.default_rng(0).choice(len(every), shifts, replace=False)
        drawn[chosen] = True
    near = drawn
    if within is not None:
        near = (np.minimum(every, side - every) <= within).all(axis=1)
    seen = drawn | near
    return every[seen], drawn[seen], near[seen]


def check(run: Any, *, shifts: int | Literal["all"], within: int | None) -> None:
    """Raise what `measured` would, before the time is spent."""
    if not isinstance(run, LoadedClassifier):
        raise UserError(
            "--shifts: names shifted images, so it needs a classifier; got "
            f"{run.path}, config.model.name={run.config['model']['name']}. Leave it "
            "out."
        )
    shifts_of(run.config["data"]["image_size"], shifts, within)


def measured(
    run: Any, *, shifts: int | Literal["all"], within: int | None = None
) -> dict[str, float]:
    """How a run names shifted held-out images of the data that its config names.

    Args:
        run: of a classifier.
        shifts, within: as of `shifts_of`.

    Returns:
        "shifts", how many were drawn; "consistency", the mean share of images that
        keep their name under one; "unchanged", the share that keep it under each;
        "worst_accuracy", the share that are named rightly, unshifted and under each
        shift that counts for the worst; "logit_change", the most that a logit moves.

    Raises:
        UserError: for a run of another kind, and for numbers out of range.
    """
    check(run, shifts=shifts, within=within)
    here = experiment.build(run.config)
    steps, drawn, near = shifts_of(here.model.image_size, shifts, within)
    named, labels, change = [], [], 0.0
    for batch in _batches(here):
        shown = jnp.asarray(batch["image"], jnp.float32)
        found, moved = _named(here.model, run.params, run.buffers, shown, steps)
        kept = np.asarray(batch["weight"]) > 0
        named.append(np.asarray(found)[:, kept])
        labels.append(np.asarray(batch["label"])[kept])
        change = max(change, float(np.asarray(moved)[:, kept].max(initial=0.0)))
    found = summary(np.concatenate(named, 1), np.concatenate(labels), drawn, near)
    return {"shifts": int(drawn.sum()), **found, "logit_change": change}


def summary(
    named: np.ndarray, labels: np.ndarray, drawn: np.ndarray, near: np.ndarray
) -> dict[str, float]:
    """ "consistency", "unchanged" and "worst_accuracy" of `measured`.

    Args:
        named: int [1 + S, N], the class that each image is given, first unshifted.
        labels: its class, int [N].
        drawn, near: which shifts count, bool [S], as of `shifts_of`.
    """
    same = (named[1:] == named[0])[drawn]
    right = np.concatenate([named[:1], named[1:][near]]) == labels
    return {
        "consistency": float(same.mean()),
        "unchanged": float(same.all(axis=0).mean()),
        "worst_accuracy": float(right.all(axis=0).mean()),
    }


def _batches(here: experiment.Experiment):
    """The held-out images that an evaluation reads."""
    size = here.eval.batch_size or here.train.batch_size
    batches = here.feed.eval_batches(batch_size=size)
    return itertools.islice(batches, here.eval.batches)


@partial(jax.jit, static_argnums=0)
def _named(model, params, buffers, images, steps):
    """The likeliest class of each image [B, H, W, Ch], unshifted and in each of S
    shifts, int [1 + S, B], and the most that a logit moves, [1 + S, B]."""

    def logits(step):
        moved = jnp.roll(images, (step[0], step[1]), axis=(1, 2))
        ctx = model.context(batch=len(images))
        return model.logits(params, buffers, moved, ctx)[0]

    plain = logits(jnp.zeros(2, jnp.int32))

    def look(step):
        found = logits(step)
        return jnp.argmax(found, -1), jnp.max(jnp.abs(found - plain), -1)

    steps = jnp.concatenate([jnp.zeros((1, 2), jnp.int32), jnp.asarray(steps)])
    return jax.lax.map(look, steps)
