"""What one run's directory receives while it trains: metrics, evaluations, saves.

The loop decides when; a record says how. Runs that one program trains have a record
each.
"""

import math
from collections.abc import Callable

import jax

from attnjax.core.errors import UserError
from attnjax.models.layout import absolute_names, path_of
from attnjax.training.experiment import Experiment


class BadSteps(UserError):
    """The run was stopped because updates kept being non-finite."""


class Record:
    """Writes one run.

    Args:
        experiment: what is trained.
        services: the run's `loop.Services`.
        pending_eval: whether the evaluation of the first step is still due.
        name: put before lines for people where several runs share a terminal.

    Attributes:
        saved_step: the step of the newest save of this process.
        pending_eval: whether the evaluation of the present step is still due.
        error: why the run was stopped before the others, or None.
    """

    def __init__(
        self,
        experiment: Experiment,
        services,
        *,
        pending_eval: bool = False,
        name: str = "",
    ):
        self.experiment = experiment
        self.services = services
        self.pending_eval = pending_eval
        self.saved_step: int | None = None
        self.error: BadSteps | None = None
        self._train = experiment.train
        self._last_eval: dict | None = None
        self._prefix = f"{name}: " if name else ""

    def say(self, text: str) -> None:
        """A line for people."""
        self.services.reporter.say(self._prefix + text)

    def take(
        self,
        step: int,
        row: dict[str, float],
        *,
        is_due: bool,
        pace: Callable[[int], dict],
        health: Callable[[], dict],
    ) -> dict | None:
        """The numbers of one finished step; the line that was written, or None.

        Args:
            step: how many steps are finished.
            row: the step's metrics.
            is_due: whether they are to be written.
            pace: step -> what stands under "time".
            health: the state's "health", for a message.

        Raises:
            BadSteps: when too many updates in a row were not finite.
        """
        bad = int(row.pop("bad_in_row"))
        for hook in self.services.hooks:
            hook.on_step(step, row)
        settings, line = self._train, None
        stops = settings.on_bad_step == "stop" and bad >= settings.patience
        if is_due or stops:
            line = {"step": step, "split": "train", **row, **pace(step)}
            self._write(line)
        if bad and stops:
            raise self._bad_steps(step, health())
        if bad:
            self.say(
                f"step {step}: the update was not finite and was not applied "
                f"({bad} in a row)."
            )
        return line

    def evaluated(self, step: int, metrics: dict, params: dict, seconds: float) -> None:
        """An evaluation of `step` is done."""
        self.pending_eval = False
        self._last_eval = metrics
        line = {"step": step, "split": "eval", **metrics}
        self._write({**line, "time": {"seconds": seconds}})
        for hook in self.services.hooks:
            hook.on_eval(step, metrics, params)
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}: held-out {text}")

    def save(self, step: int, state: dict) -> None:
        """Start saving the state of `step`."""
        self.services.run.set_phase("save")
        meta = {
            "step": step,
            "pending_eval": self.pending_eval,
            "layout": self.experiment.model.layout.to_json(),
            **self.experiment.feed.sizes_of(self.experiment.model),
        }
        self.services.metrics.sync()
        loss = None if self._last_eval is None else self._last_eval["loss"]
        self.services.checkpoints.save(step, state, meta, metric=loss)
        self._last_eval = None
        self.saved_step = step

    def _write(self, line: dict) -> None:
        self.services.metrics.write(line)
        for tracker in self.services.trackers:
            tracker.log(line)

    def _bad_steps(self, step: int, health: dict) -> BadSteps:
        names = [
            name
            for path, is_finite in jax.tree_util.tree_leaves_with_path(health["finite"])
            if not is_finite
            for name in absolute_names(path_of(path), self.experiment.model.layout)
        ]
        self.services.checkpoints.wait()
        found = self.services.checkpoints.latest()
        good = "there is no checkpoint" if found is None else f"step {found.step}"
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        first_bad = int(health["first_bad"]) + 1
        return BadSteps(
            f"train: {self._train.patience} updates in a row were not finite; the "
            f"first was step {first_bad}, seen at step {step}. Gradients that were not "
            f"finite: {shown or 'none, the loss itself'}. No bad update was applied; "
            f"last good checkpoint: {good}. Lower config.optim.learning_rate, set "
            "config.optim.clip_norm, or go on past bad steps with "
            "config.train.on_bad_step=skip."
        )


def mean_line(lines: list[dict]) -> dict:
    """One line for people about the newest lines of several runs."""
    names = [n for n, v in lines[0].items() if isinstance(v, float)]
    means = {
        n: math.fsum(line[n] for line in lines) / len(lines)
        for n in names
        if all(n in line for line in lines)
    }
    return {**means, "time": lines[0].get("time", {})}
