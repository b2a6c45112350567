"""Images with labels for denoisers."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
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

_USED = ("image", "label", "weight")


@dataclasses.dataclass(frozen=True)
class DiffusionEvalConfig(ImageEvalConfig):
    """`config.eval` of a denoiser.

    Attributes:
        draw: the picture of samples that every evaluation draws; see
            `training.settings.DrawConfig`.
    """

    draw: DrawConfig = dataclasses.field(default_factory=DrawConfig)


class DiffusionFeed(ImageFeed):
    """Images for `models.dit` and `tasks.diffusion`."""

    model_module = dit
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
                f"got mixup={mixup}, config.model.name=dit. Set it to 0."
            )
        task = schema.build(diffusion.Config, config["task"], path="config.task")
        process = denoising.make(task.noise)
        draw = schema.build(DrawConfig, config["eval"]["draw"], path="config.eval.draw")
        if not draw.per_class:
            return
        draw.sampler_settings(process)
        if draw.guidance != 1.0 and not config["model"]["label_dropout"]:
            raise UserError(
                "config.eval.draw.guidance: needs a model that was also trained "
                f"without classes; got guidance={draw.guidance:g}, "
                "config.model.label_dropout=0. Set label_dropout, e.g. to 0.1, or "
                "guidance=1."
            )

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Feed`."""
        shapes = super().row_shapes()
        return {name: shapes[name] for name in _USED}

    # ---- the model and the task

    @classmethod
    def make_model(
        cls, config: Mapping[str, Any], sizes: Mapping[str, int], *, platform, target
    ) -> dit.DiT:
        """See `Feed`."""
        task = schema.build(diffusion.Config, config["task"], path="config.task")
        channels = sizes["channels"]
        return dit.DiT(
            schema.build(dit.Config, config["model"]),
            image_size=sizes["image_size"],
            channels=channels,
            out_channels=denoising.make(task.noise).output_channels(channels),
            num_classes=sizes["num_classes"],
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
        facts = super().search_facts(model)
        outputs = model.config.patch_size**2 * model.out_channels
        rows = facts["loss_tokens"] * model.num_tokens
        return facts | {"vocab": outputs, "loss_tokens": rows}

    # ---- the data

    def batch(self, *, seed, step, batch_size, rows=None) -> Batch:
        """See `Feed`."""
        made = super().batch(seed=seed, step=step, batch_size=batch_size, rows=rows)
        return {name: made[name] for name in _USED}

    def eval_batches(self, *, batch_size, rows=None) -> Iterator[Batch]:
        """See `Feed`; with the place of each image in its split."""
        own = np.arange(batch_size, dtype=np.int32)[rows or slice(None)]
        batches = super().eval_batches(batch_size=batch_size, rows=rows)
        for number, made in enumerate(batches):
            batch = {name: made[name] for name in _USED}
            yield batch | {"index": own + np.int32(number * batch_size)}

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
