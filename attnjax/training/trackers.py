"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, your own."""

import math
import os
from pathlib import Path
from typing import Any, Protocol

from attnjax.core.errors import UserError, unknown
from attnjax.training import disk

NAMES = ("none", "tensorboard", "wandb")


class Tracker(Protocol):
    """Takes every record of metrics.jsonl, in order.

    After a resume, records of steps that a killed process had already logged come
    again: a tracker lets the later ones stand.
    """

    def log(self, record: dict) -> None:
        """Take one record: "step", "split" and metrics, `time` being a dict."""

    def finish(self) -> None:
        """Write out what is held back and let go of resources."""


class TensorBoard:
    """Writes RUN/events.*.

    Args:
        directory: the run directory.
        purge_step: the restored step: events of later steps, left by a killed process,
            are hidden; None for a new run.
        flush_secs: seconds between writes to the file.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        purge_step: int | None = None,
        flush_secs: int = 10,
    ):
        from tensorboardX import SummaryWriter

        purge = None if purge_step is None else purge_step + 1
        with disk.disk_errors("tensorboard"):
            self._writer = SummaryWriter(
                str(directory), purge_step=purge, flush_secs=flush_secs
            )

    def log(self, record: dict) -> None:
        """One scalar for each number, tagged `<split>/<name>`."""
        with disk.disk_errors("tensorboard"):
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, record["step"])

    def finish(self) -> None:
        """Flush and close the file."""
        with disk.disk_errors("tensorboard"):
            self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases (extra `wandb`).

    Args:
        directory: the run directory; its name is the run's name there.
        config: the resolved config.
        run_id: the same for every start of one run, so that a resume continues it.
        project: its project there.

    Raises:
        UserError: when the package is missing.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        config: dict,
        run_id: str,
        project: str = "attnjax",
    ):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "tracker: 'wandb' needs the package wandb, which is not installed. "
                "Install the extra: pip install 'attnjax[wandb]', or use tracker=none."
            ) from None
        self._run = wandb.init(
            project=project,
            name=Path(directory).name,
            id=run_id,
            dir=str(directory),
            config=config,
            resume="allow",
        )
        # Its own step may only grow, ours goes back on a resume: ours is the axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict) -> None:
        """One point of every number."""
        self._run.log({**scalars(record), "step": record["step"]})

    def finish(self) -> None:
        """End the run there."""
        self._run.finish()


def scalars(record: dict) -> dict[str, float]:
    """{"train/loss": 2.3, "train/time/step_ms": 4.1} of one record; NaN stays NaN."""
    split = record.get("split", "run")
    return {
        f"{split}/{name}": float(value)
        for name, value in _numbers(record, prefix="")
        if name not in ("step", "split")
    }


def _numbers(record: dict, *, prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, prefix=f"{prefix}{name}/")
        elif hasattr(value, "item") and getattr(value, "size", 0) == 1:
            found.append((f"{prefix}{name}", value.item()))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", value))
        elif value in ("NaN", "Infinity", "-Infinity"):
            number = math.nan if value == "NaN" else float(value.replace("inity", ""))
            found.append((f"{prefix}{name}", number))
    return found


def make(
    name: str,
    directory: str | os.PathLike,
    *,
    config: dict,
    run_id: str,
    purge_step: int | None = None,
) -> list[Tracker]:
    """The tracker called `name`: a list of none or one.

    Raises:
        UserError: for an unknown name or a missing package.
    """
    if name == "none":
        return []
    if name == "tensorboard":
        return [TensorBoard(directory, purge_step=purge_step)]
    if name == "wandb":
        return [WeightsAndBiases(directory, config=config, run_id=run_id)]
    raise unknown("config.train.tracker", "tracker", name, NAMES)
