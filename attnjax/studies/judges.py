"""Which point of a sweep judges the samples of another, settled before any runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from attnjax.core.errors import UserError
from attnjax.studies.table import matches, show_labels
from attnjax.training import experiment

# What the images of both must have alike.
_ALIKE = ("name", "image_size", "channels")


def settle(points: Sequence[Any]) -> list[Any]:
    """The points, with the hash of the judge in place of its labels.

    Args:
        points: `sweep_file.Planned`.

    Raises:
        UserError: labels of no point or of several, a judge that is no classifier, a
            point judged that is no denoiser, images that differ, or settings of
            samples that do not hold.
    """
    return [_settled(one, points) for one in points]


def _settled(point: Any, points: Sequence[Any]) -> Any:
    if all(one.judge is None for one in point.evaluations):
        return point
    found = []
    for one in point.evaluations:
        if one.judge is not None:
            try:
                judge = _judge(one.judge, points)
                _check(point.config, judge.config, one.samples)
            except UserError as error:
                raise UserError(
                    f"{point.name}: evaluation {one.name}: {error}"
                ) from None
            one = dataclasses.replace(one, judge=judge.hash)
        found.append(one)
    return dataclasses.replace(point, evaluations=tuple(found))


def _judge(labels: Any, points: Sequence[Any]) -> Any:
    """The point that has these labels."""
    found = [one for one in points if matches(labels, one.labels)]
    if len(found) != 1:
        few = "; ".join(one.name for one in found[:4]) or "none"
        raise UserError(
            f"judge: must be the labels of one point; got {show_labels(labels)}, which "
            f"{len(found)} points have ({few})."
        )
    return found[0]


def _check(config: dict, judge: dict, samples: dict) -> None:
    from attnjax.decoding import draw_flags
    from attnjax.training import feeds

    kinds = [feeds.feed_class(one["model"]) for one in (config, judge)]
    if not issubclass(kinds[0], feeds.DiffusionFeed):
        raise UserError(
            "judge: looks at the samples of a denoiser; got config.model.name="
            f"{config['model']['name']}. Leave it out."
        )
    draws = issubclass(kinds[1], feeds.DiffusionFeed)
    if draws or not issubclass(kinds[1], feeds.ImageFeed):
        raise UserError(
            "judge: must be a classifier of images; got config.model.name="
            f"{judge['model']['name']}."
        )
    for name in _ALIKE:
        # Latents have the sizes of their folder.
        own, theirs = config["data"].get(name), judge["data"].get(name)
        if own != theirs:
            raise UserError(
                f"judge: must have learned from the same images; got its config.data."
                f"{name}={theirs}, the samples' is {own}."
            )
    settings = {"per_class": 2, **samples}
    per_class = settings["per_class"]
    if not isinstance(per_class, int) or per_class < 2:
        raise UserError(f"samples: per_class must be at least 2; got {per_class!r}.")
    draw_flags.check_names({k: v for k, v in settings.items() if k != "per_class"})
    try:
        # What holds for samples during a training holds for these.
        drawn = {f"eval.draw.{name}": value for name, value in settings.items()}
        experiment.changed(config, tuple(drawn.items()))
    except UserError as error:
        raise UserError(f"samples: {error}") from None
