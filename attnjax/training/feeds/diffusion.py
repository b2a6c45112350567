"""Images with labels for denoisers."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import mappings, schema
from attnjax.core.errors import UserError
from attnjax.models import dit
from attnjax.tasks import denoising, diffusion
from attnjax.tasks.denoising import perturbing
from attnjax.training import disk
from attnjax.training.feeds.base import Batch, Reference
from attnjax.training.feeds.images import ImageEvalConfig, ImageFeed
from attnjax.training.settings import DrawConfig


@dataclasses.dataclass(frozen=True)
class DiffusionEvalConfig(ImageEvalConfig):
    """`config.eval` of a denoiser.

    Attributes:
        draw: the picture of samples that every evaluation draws; see
            `training.settings.DrawConfig`.
    """

    draw: DrawConfig = dataclasses.field(default_factory=DrawConfig)


class DiffusionFeed(ImageFeed):
    """Images for `models.dit` and `tasks.diffusion`.

    Attributes:
        size_names: the sizes of the data that the model is made with.
    """

    model_module = dit
    model_class = dit.DiT
    size_names = ("image_size", "channels", "num_classes")
    task_module = diffusion
    eval_config = DiffusionEvalConfig
    no_decoding = "a denoiser of images has no decode step."
    shown = ()

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """See `Feed`."""
        super().check(config)
        mixup = config["data"]["augment"]["mixup"]
        if mixup:
            raise UserError(
                "config.data.augment.mixup: mixed images are no samples of the data; "
                f"got mixup={mixup}, config.model.name={config['model']['name']}. Set "
                "it to 0."
            )
        task = schema.build(diffusion.Config, config["task"], path="config.task")
        process = denoising.make(task.noise)
        draw = schema.build(DrawConfig, config["eval"]["draw"], path="config.eval.draw")
        if not draw.per_class:
            return
        draw.sampler_settings(process)
        option = cls.model_class.dropout_option
        if draw.guidance != 1.0 and not config["model"][option]:
            raise UserError(
                "config.eval.draw.guidance: needs a model that was also trained "
                f"without {cls.model_class.told}s; got guidance={draw.guidance:g}, "
                f"config.model.{option}=0. Set {option}, e.g. to 0.1, or guidance=1."
            )

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Feed`."""
        shapes = super().row_shapes()
        told = jax.ShapeDtypeStruct(self.told_shape, jnp.int32)
        names = ("image", "weight")
        return {n: shapes[n] for n in names} | {self.model_class.told: told}

    @property
    def told_shape(self) -> tuple[int, ...]:
        """The shape of what the model is told of one image."""
        return ()

    # ---- the model and the task

    @classmethod
    def make_model(
        cls, config: Mapping[str, Any], sizes: Mapping[str, int], *, platform, target
    ) -> Any:
        """See `Feed`."""
        task = schema.build(diffusion.Config, config["task"], path="config.task")
        channels = sizes["channels"]
        return cls.model_class(
            schema.build(cls.model_module.Config, config["model"]),
            **{name: sizes[name] for name in cls.size_names},
            out_channels=denoising.make(task.noise).output_channels(channels),
            platform=platform,
            target=target,
        )

    def make_task(self, model: Any, mesh=None, *, sequence_form=None):
        """See `Feed`."""
        draw = schema.build(DrawConfig, self.config["eval"]["draw"])
        if draw.per_class and draw.perturb_scale:
            perturbing.choose(model, target=draw.perturb, heads=draw.perturb_heads)
        rows = self.batch_rows(mesh)
        return diffusion.Diffusion(self.task_config, model, rows=rows)

    def search_facts(self, model: Any) -> dict[str, int]:
        """See `Feed`: what it predicts of an image, all at a time."""
        outputs = model.config.patch_size**2 * model.out_channels
        patches = math.prod(model.grid)
        return {
            "seq_len": model.num_tokens,
            "vocab": outputs,
            "tables": 1,
            "loss_tokens": self.config["train"]["batch_size"] * patches,
        }

    # ---- the data

    def batch(self, *, seed, step, batch_size, rows=None) -> Batch:
        """See `Feed`."""
        made = super().batch(seed=seed, step=step, batch_size=batch_size, rows=rows)
        return self._used(made)

    def _used(self, made: Batch) -> Batch:
        """What of a batch the task reads."""
        told = {self.model_class.told: self.told(made["label"])}
        return {"image": made["image"], "weight": made["weight"], **told}

    def told(self, labels: np.ndarray) -> np.ndarray:
        """What the model is told of images with labels int32 [B]: the labels."""
        return labels

    def eval_batches(self, *, batch_size, rows=None) -> Iterator[Batch]:
        """See `Feed`; with the place of each image in its split."""
        own = np.arange(batch_size, dtype=np.int32)[rows or slice(None)]
        batches = super().eval_batches(batch_size=batch_size, rows=rows)
        for number, made in enumerate(batches):
            yield self._used(made) | {"index": own + np.int32(number * batch_size)}

    # ---- what a run keeps and says of it

    def check_run(self, path: Path) -> None:
        """See `Feed`: the classes, and what was learned, must be the same."""
        super().check_run(path)
        cure = "Restore the file from a copy."
        trained = disk.read_json(path / "config.json", owner="--workdir", cure=cure)
        old, new = (
            {"task": {"noise": c["task"]["noise"]}} for c in (trained, self.config)
        )
        changed = mappings.diff(old, new)
        if changed:
            raise UserError(
                "evaluate: config.task.noise must be what the run learned; got (- "
                "learned, + asked for):\n" + "\n".join(changed)
            )

    @property
    def loss_measure(self) -> str:
        """See `Feed`; a learned variance adds bits per dimension."""
        parts = denoising.make(self.task_config.noise).output_channels(1)
        return "mean squared error" + (" + bits" if parts > 1 else "")

    @property
    def draws(self) -> bool:
        """See `Feed`."""
        return self.config["eval"]["draw"]["per_class"] > 0

    def reference(self) -> Reference:
        """Nothing: what the loss of no knowledge is depends on the process."""
        return Reference({})
