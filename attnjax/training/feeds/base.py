"""The seam between training and what is learned from."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.training import sharding
from attnjax.training.settings import EvalConfig, TrainConfig

Batch = dict[str, np.ndarray]


class Feed(abc.ABC):
    """The data, the model and the task of a config, and how they are counted.

    Training, evaluation, recording and planning know rows [B, ...] of dicts of arrays,
    and this. The data is opened when it is first read, so that a plan needs none.

    Args:
        config: resolved.

    Attributes:
        model_module: the model's module: `Config`, `resolve`.
        task_module: the task's: `Config`.
        unit: what is counted: "token" or "image".
        train_config, eval_config: the dataclasses of `config.train`, `config.eval`.
        default_source: the name of the data where none is given.
        no_decoding: why the model has no decode form, "" where it may have one.
        shown: final metrics that a run's last lines name beside the loss.
    """

    model_module: ClassVar[Any]
    task_module: ClassVar[Any]
    unit: ClassVar[str]
    train_config: ClassVar[type[TrainConfig]] = TrainConfig
    eval_config: ClassVar[type[EvalConfig]] = EvalConfig
    default_source: ClassVar[str]
    no_decoding: ClassVar[str] = ""
    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    # ---- what the config says

    @staticmethod
    @abc.abstractmethod
    def data_class(name: str) -> type:
        """The options of a source, by its name."""

    @classmethod
    def resolve_data(cls, given: Mapping[str, Any]) -> dict:
        """Fill and check `config.data`."""
        name = str(given.get("name", cls.default_source))
        named = {"name": name, **given}
        return schema.resolve(cls.data_class(name), named, path="config.data")

    @classmethod
    @abc.abstractmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raise UserError where groups of a resolved config do not fit one another."""

    @cached_property
    def data(self) -> Any:
        """`config.data`, as its source's dataclass."""
        given = self.config["data"]
        return schema.build(self.data_class(given["name"]), given, path="config.data")

    @property
    def task_config(self) -> Any:
        """`config.task`, as its dataclass."""
        return schema.build(
            self.task_module.Config, self.config["task"], path="config.task"
        )

    @property
    @abc.abstractmethod
    def units_per_row(self) -> int:
        """How many of `unit` a row of a batch holds."""

    @abc.abstractmethod
    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch, without their first axis."""

    @property
    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """What an evaluation read, as JSON values: "data", ..."""

    # ---- the model and the task

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """What the model must know of the data, for `make_model`."""

    def planned_sizes(self) -> dict[str, int]:
        """`sizes`, without opening the data where the config says them."""
        return self.sizes()

    @staticmethod
    @abc.abstractmethod
    def sizes_of(model: Any) -> dict[str, int]:
        """The sizes that a model was made with; a checkpoint keeps them."""

    @classmethod
    @abc.abstractmethod
    def make_model(
        cls, config: Mapping[str, Any], sizes: Mapping[str, int], *, platform, target
    ) -> Any:
        """The model of a resolved config.

        Args:
            config: resolved.
            sizes: of the data; other keys are passed over.
            platform: where it will run.
            target: a `kernels.Target`, or None.
        """

    @abc.abstractmethod
    def make_task(self, model: Any, mesh: Mesh | None, *, sequence_form: str | None):
        """The task, over the devices of a mesh."""

    @staticmethod
    def batch_rows(mesh: Mesh | None):
        """How batches lie on the devices of a mesh; None on one device."""
        if mesh is None or mesh.size == 1:
            return None
        return sharding.batch_sharding(mesh, leading=0)

    @abc.abstractmethod
    def sequence_form(self, model: Any, mesh: Mesh) -> str | None:
        """How attention is computed where devices share the tokens of a row.

        Raises:
            UserError: when they cannot.
        """

    @abc.abstractmethod
    def row_flops(self, model: Any) -> float:
        """Forward FLOPs (2 a multiply-add) of one row."""

    @abc.abstractmethod
    def search_facts(self, model: Any) -> dict[str, int]:
        """For `planning.formulas`: "seq_len" tokens of a row in the layers; "vocab"
        outputs, of which `tables` tables [outputs, C] are parameters; "loss_tokens"
        rows of outputs a device holds at a time."""

    # ---- the data

    @cached_property
    @abc.abstractmethod
    def corpus(self) -> Any:
        """The opened data: `train`, `eval`, `fingerprint`, `provenance`."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """How much there is of what, for the first line of a run."""

    @abc.abstractmethod
    def batch(
        self, *, seed: int, step: int, batch_size: int, rows: slice | None
    ) -> Batch:
        """The training batch of a step, or the rows of it that one host needs."""

    @abc.abstractmethod
    def eval_batches(self, *, batch_size: int, rows: slice | None) -> Iterator[Batch]:
        """The held-out split once, in batches of one shape."""

    def placed(self, batch: Batch, mesh: Mesh, sequence_form: str | None) -> Batch:
        """A batch with its arrays as they lie on this host's devices."""
        return batch

    def host_rows(self, mesh: Mesh, batch_size: int) -> slice:
        """The rows of a batch that lie on this host's devices."""
        return sharding.host_rows_of(mesh, batch_size)

    # ---- what a run keeps and says of it

    @abc.abstractmethod
    def save(self, path: Path) -> None:
        """Keep in a run directory what reading its model needs beside the config."""

    @abc.abstractmethod
    def check_source(self, path: Path) -> None:
        """Raise UserError unless a run on this data may start from the run `path`."""

    @abc.abstractmethod
    def check_run(self, path: Path) -> None:
        """Raise UserError unless the run `path` can be evaluated on this data."""

    def fit_cures(self, model: Any) -> list[str]:
        """Lines on how a model that was made for other data can read this data."""
        return []

    def check_places(self, model: Any, own: Any) -> None:
        """Raise UserError where the tokens of this data have other positions in `own`,
        the model that is made for it, than in the run's `model`, and nobody said so."""
        del model, own

    @property
    def summary_facts(self) -> dict[str, Any]:
        """What `task.summary` must know of the held-out split."""
        return {}

    @property
    def loss_measure(self) -> str:
        """What losses are counted in."""
        return f"nats per {self.unit}"

    @property
    def draws(self) -> bool:
        """Whether every evaluation draws a picture of samples."""
        return False

    @abc.abstractmethod
    def reference(self) -> "Reference":
        """What stands beside the held-out loss of a finished run."""

    def more_summary(self, model: Any) -> dict[str, Any]:
        """Entries of summary.json that only this kind of run has."""
        return {}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Losses to compare a model's with.

    Attributes:
        levels: name -> a loss, for the loss curve and the last lines.
        summary: the entries of summary.json.
        bytes_per_unit: of text, where losses are shown in bits per byte too.
    """

    levels: dict[str, float]
    summary: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes_per_unit: float | None = None


def check_at_least(config: Mapping[str, Any], *limits: tuple[str, str, float]) -> None:
    """Raise UserError for a value of (group, name) below its least one."""
    for group, name, least in limits:
        value = config[group][name]
        if value is not None and value < least:
            raise UserError(
                f"config.{group}.{name}: must be at least {least}; got {value}."
            )
