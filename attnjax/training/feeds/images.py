"""Images with labels for classifiers."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.data import images
from attnjax.data.images import corruptions
from attnjax.models import vit
from attnjax.tasks import classification
from attnjax.training import disk
from attnjax.training.feeds.base import Batch, Feed, Reference
from attnjax.training.settings import EvalConfig, TrainConfig

CLASSES = "classes.json"
# What a folder of latents says of itself; beside the classes where they were learned.
LATENTS = "latents.json"


@dataclasses.dataclass(frozen=True)
class ImageTrainConfig(TrainConfig):
    """`config.train` of a classifier: no text is sampled at the end."""

    sample_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class ImageEvalConfig(EvalConfig):
    """`config.eval` of a classifier.

    Attributes:
        corruption: what is done to held-out images: gaussian_noise, blur, contrast
            (none: nothing).
        severity: how strongly, 1 to 5 (0 without a corruption).
    """

    corruption: str | None = None
    severity: int = 0


class ImageFeed(Feed):
    """Images for a classifier, `models.vit`, and `tasks.classification`.

    Attributes:
        model_class: of `model_module`.
    """

    model_module = vit
    model_class: ClassVar[type] = vit.ViT
    task_module = classification
    unit = "image"
    train_config = ImageTrainConfig
    eval_config = ImageEvalConfig
    default_source = "digits"
    no_decoding = "a classifier of images has no decode step."
    shown = ("accuracy",)

    data_class = staticmethod(images.config_class)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """See `Feed`."""
        name = config["model"]["name"]
        for group, option, what in (
            ("train", "sample_tokens", "text is sampled from language models"),
            ("eval", "explain", "the maps of the first tokens are those of texts"),
        ):
            value = config[group][option]
            if value:
                raise UserError(
                    f"config.{group}.{option}: {what}; got {option}={value}, "
                    f"config.model.name={name}. Set it to 0."
                )
        corruption = config["eval"]["corruption"]
        corruptions.check(corruption, config["eval"]["severity"])
        data = schema.build(cls.data_class(config["data"]["name"]), config["data"])
        images.check_corruption(data, corruption)

    @property
    def units_per_row(self) -> int:
        """1."""
        return 1

    @cached_property
    def image_shape(self) -> tuple[int, int]:
        """H = W and the channels of its images, or latents."""
        return images.image_shape(self.data)

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Feed`."""
        side, channels = self.image_shape
        number = jax.ShapeDtypeStruct((), jnp.float32)
        label = jax.ShapeDtypeStruct((), jnp.int32)
        return {
            "image": jax.ShapeDtypeStruct((side, side, channels), jnp.float32),
            "label": label,
            "other_label": label,
            "mix": number,
            "weight": number,
        }

    @property
    def about(self) -> dict[str, Any]:
        """See `Feed`."""
        found = {"data": self.data.name, "image_size": self.image_shape[0]}
        settings = self.config["eval"]
        if settings["corruption"] is not None:
            found |= {name: settings[name] for name in ("corruption", "severity")}
        return found

    # ---- the model and the task

    def _sizes(self, num_classes: int) -> dict[str, int]:
        return {
            "image_size": self.image_shape[0],
            "channels": self.image_shape[1],
            "num_classes": num_classes,
        }

    def sizes(self) -> dict[str, int]:
        """{"image_size", "channels", "num_classes"}."""
        return self._sizes(self.corpus.num_classes)

    def planned_sizes(self) -> dict[str, int]:
        """See `Feed`."""
        return self._sizes(images.num_classes(self.data))

    @staticmethod
    def sizes_of(model: Any) -> dict[str, int]:
        """See `Feed`."""
        names = ("image_size", "channels", "num_classes")
        return {name: getattr(model, name) for name in names}

    @classmethod
    def make_model(
        cls, config: Mapping[str, Any], sizes: Mapping[str, int], *, platform, target
    ) -> Any:
        """See `Feed`."""
        return cls.model_class(
            schema.build(cls.model_module.Config, config["model"]),
            image_size=sizes["image_size"],
            channels=sizes["channels"],
            num_classes=sizes["num_classes"],
            platform=platform,
            target=target,
        )

    def make_task(self, model: Any, mesh=None, *, sequence_form=None):
        """See `Feed`."""
        rows = self.batch_rows(mesh)
        return classification.Classification(self.task_config, model, rows=rows)

    def sequence_form(self, model: Any, mesh) -> None:
        """See `Feed`: the tokens of an image stay on one device."""
        devices = mesh.shape["sequence"]
        if devices > 1:
            raise UserError(
                "config.mesh.sequence: the tokens of an image stay on one device; got "
                f"sequence={devices}. Set config.mesh.sequence=1 and use data or fsdp."
            )

    def row_flops(self, model: Any) -> float:
        """See `Feed`."""
        return model.flops()

    def search_facts(self, model: Any) -> dict[str, int]:
        """See `Feed`: one row of outputs for an image, all at a time."""
        return {
            "seq_len": model.num_tokens,
            "vocab": model.num_classes,
            "tables": 1,
            "loss_tokens": self.config["train"]["batch_size"],
        }

    # ---- the data

    @cached_property
    def corpus(self) -> images.ImageCorpus:
        """The images."""
        return images.open_corpus(self.data)

    @property
    def description(self) -> str:
        """See `Feed`."""
        return self.corpus.describe()

    def batch(self, *, seed, step, batch_size, rows=None) -> Batch:
        """See `Feed`."""
        return images.batch(
            self.corpus.train,
            seed=seed,
            step=step,
            batch_size=batch_size,
            augment=self.data.augment,
            rows=rows,
        )

    def eval_batches(self, *, batch_size, rows=None) -> Iterator[Batch]:
        """See `Feed`."""
        settings = self.config["eval"]
        return images.eval_batches(
            self.corpus.eval,
            batch_size=batch_size,
            rows=rows,
            corruption=settings["corruption"],
            severity=settings["severity"],
        )

    # ---- what a run keeps and says of it

    def save(self, path: Path) -> None:
        """The names of the classes; of latents, how they were made."""
        disk.write_json(path / CLASSES, list(self.corpus.class_names))
        if self.data.is_latent:
            disk.write_json(path / LATENTS, dataclasses.asdict(self.corpus.facts))

    def check_source(self, path: Path) -> None:
        """See `Feed`: any classifier; arrays of one name must have one shape."""

    def check_run(self, path: Path) -> None:
        """See `Feed`: the classes, and the scale of latents, must be the same."""
        stored, own = load_classes(path), tuple(self.corpus.class_names)
        if stored != own:
            raise UserError(
                f"evaluate: the classes of {self.data.name} must be those of the run; "
                f"got {len(own)} ({_some(own)}), the run has {len(stored)} "
                f"({_some(stored)})."
            )
        self._check_latents(path)

    def _check_latents(self, path: Path) -> None:
        """Raise UserError where pixels meet a run on latents, or other latents."""

        def told(facts: images.LatentFacts | None) -> str:
            if facts is None:
                return "pixels"
            scale, shift = list(facts.scale), list(facts.shift)
            return f"latents of scale {scale} and shift {shift}"

        stored = told(load_latents(path) if (path / LATENTS).exists() else None)
        own = told(self.corpus.facts if self.data.is_latent else None)
        if stored != own:
            raise UserError(
                f"evaluate: {self.data.name} must hold what the run learned; got "
                f"{own}, the run learned {stored}. Name other data in config.data."
            )

    def fit_cures(self, model: Any) -> list[str]:
        """See `Feed`: positions of another grid are resampled on request."""
        if model.image_size == self.image_shape[0]:
            return []
        grid = model.positions_grid[0]
        return [f"Positions are resampled with --config.model.positions_grid={grid}."]

    def check_places(self, model: Any, own: Any) -> None:
        """See `Feed`: fixed positions of a grid; learned ones have another shape."""
        if any(one.config.positions != "sincos" for one in (model, own)):
            return
        trained, grid = model.positions_grid[0], own.positions_grid[0]
        if trained == grid or own.config.positions_grid is not None:
            return
        raise UserError(
            "config.model.positions_grid: must be said for images of another size, "
            f"where positions=sincos were trained on {trained} x {trained} patches; "
            f"got none, and {grid} x {grid} patches. Set it: {trained} keeps them "
            f"within the trained ones, {grid} counts on from the corner."
        )

    def more_summary(self, model: Any) -> dict[str, Any]:
        """How many images could not be read while the run went on; they had no weight
        (those found when the data was opened are in the manifest)."""
        return {"unreadable_images": len(self.corpus.unreadable)}

    def reference(self) -> Reference:
        """What is known without a look: nothing but the number of classes."""
        return Reference({"uniform guess": math.log(self.corpus.num_classes)})


def load_classes(path: Path) -> tuple[str, ...]:
    """The names of a run's classes, from its directory."""
    cure = "Train the run again, or restore the file from a copy."
    return tuple(disk.read_json(path / CLASSES, owner="--workdir", cure=cure))


def load_latents(path: Path) -> images.LatentFacts:
    """How the latents of a run were made, from its directory."""
    cure = "Train the run again, or restore the file from a copy."
    return images.facts_of(disk.read_json(path / LATENTS, owner="--workdir", cure=cure))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
