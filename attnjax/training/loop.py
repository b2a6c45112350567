"""THE training loop.

Order of things at a step boundary: metrics, evaluation, checkpoint. A run that ends
between two of them resumes before the first one that is missing, so nothing is
skipped or done twice. The host never waits for the step it has just dispatched:
metrics are read one dispatch late.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from attnjax import data
from attnjax.core import chips
from attnjax.core.errors import EXIT_OK, EXIT_SAVED, UserError
from attnjax.data.prefetch import Prefetch, dispatches
from attnjax.models.layout import absolute_names, path_of
from attnjax.training import sharding
from attnjax.training.evaluation import Evaluator, Stopped
from attnjax.training.experiment import Experiment
from attnjax.training.hosts import host_rows
from attnjax.training.profiler import ProfileWindow
from attnjax.training.progress import Reporter
from attnjax.training.signals import StopRequested, leave
from attnjax.training.step import make_dispatch


@dataclasses.dataclass
class Services:
    """What the loop writes to and listens to.

    Attributes:
        run: the RunDirectory.
        metrics: the MetricsLog.
        checkpoints: the Checkpointer.
        signals: the StopSignal.
        reporter: the Reporter.
        trackers: further sinks of metrics.
        hooks: the caller's own, see `Hook`.
    """

    run: Any
    metrics: Any
    checkpoints: Any
    signals: Any
    reporter: Reporter
    trackers: tuple = ()
    hooks: tuple["Hook", ...] = ()


class Hook:
    """What a caller of `training.run.train` does during a run; override either.

    The numbers of a step arrive one dispatch late: the loop does not wait for them.
    """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """After every training step: `step` counts finished steps."""

    def on_eval(self, step: int, metrics: dict[str, float], params: dict) -> None:
        """After every evaluation, with the parameters that were evaluated."""


class Loop:
    """Trains an experiment from a state to its last step.

    Args:
        experiment: what is trained.
        state: the state to go on from, on the devices.
        services: where things are written.
        pending_eval: whether the evaluation of the state's step is still due.
    """

    def __init__(
        self,
        experiment: Experiment,
        state: dict,
        services: Services,
        *,
        pending_eval: bool = False,
    ):
        self.experiment = experiment
        self.services = services
        self.state = state
        self.train = experiment.train
        self.step = int(state["step"])
        self.pending_eval = pending_eval
        self.saved_step: int | None = None
        self.last_eval: dict | None = None
        self._last_save = time.monotonic()
        self._clock = (time.perf_counter(), self.step)
        self._in_flight: tuple[int, int, Any] | None = None
        self._evaluator = Evaluator(
            experiment, should_stop=lambda: services.signals.requested is not None
        )
        self._profile = ProfileWindow(
            services.run.path, self.train.profile_start, self.train.profile_steps
        )
        placed = sharding.shardings(state, experiment.mesh, experiment.rules)
        self._jitted = jax.jit(
            make_dispatch(experiment.recipe),
            donate_argnums=0,
            out_shardings=(placed, None),
        )
        self._programs: dict[int, Any] = {}
        self._flops = 3.0 * experiment.model.flops(experiment.data.seq_len)

    # ---- the run

    def __call__(self) -> int:
        """Train to the end; the exit code is `EXIT_OK` or `EXIT_SAVED`."""
        try:
            if self.pending_eval:
                self._evaluate()
            if self._stop_requested():
                return self._leave()
            if self.step < self.train.steps:
                self._run()
        except Stopped:
            self.pending_eval = True
            return self._leave()
        except StopRequested:
            # While compiling: XLA's thread goes on, so the process must not unwind.
            code = self._leave()
            self.services.run.end("saved", self.step)
            self.services.run.close()
            leave(code)
        except _Leave:
            return self._leave()
        finally:
            self._profile.close()
        self._save()
        self.services.checkpoints.wait()
        return EXIT_OK

    def _run(self) -> None:
        source = dispatches(
            self.step, self.train.steps, steps_per_dispatch=self._chunk()
        )
        put = sharding.batch_sharding(
            self.experiment.mesh, leading=1 + (self.train.accumulate > 1)
        )
        with Prefetch(self._build, source, sharding=put) as batches:
            for item in batches:
                if self._stop_requested():
                    raise _Leave
                dispatch = self._dispatch(item)
                self.services.run.set_phase("step")
                self._profile.before(item.step)
                self.state, metrics = dispatch(self.state, item.batch)
                self._read_metrics()
                self._in_flight = (item.step, item.count, metrics)
                self.step = item.step + item.count
                self._profile.after(self.step, metrics)
                self._boundary()
        self._read_metrics()

    def _boundary(self) -> None:
        """What is due after the steps so far."""
        eval_every, save_every = self.experiment.eval.every, self.train.save_every
        at_end = self.step == self.train.steps
        eval_due = at_end or (eval_every and self.step % eval_every == 0)
        save_due = save_every and self.step % save_every == 0
        if self.train.save_minutes is not None:
            waited = time.monotonic() - self._last_save
            save_due = save_due or waited >= 60 * self.train.save_minutes
        if eval_due:
            self._evaluate()
        if save_due and not at_end:
            self._save()

    def _dispatch(self, item):
        """The compiled program of K steps, K as in `item`."""
        if item.count not in self._programs:
            self.services.run.set_phase("compile")
            with self.services.signals.interrupting():
                lowered = self._jitted.lower(self.state, item.batch)
                self._programs[item.count] = lowered.compile()
            self._clock = (time.perf_counter(), self.step)
        return self._programs[item.count]

    def _chunk(self) -> int:
        """Steps a dispatch: as configured, cut so that boundaries fall on it."""
        size = self.train.steps_per_dispatch
        every = [
            self.train.log_every,
            self.train.save_every,
            self.experiment.eval.every,
        ]
        return int(np.gcd.reduce([size, *(e for e in every if e is not None)]))

    def _build(self, step: int) -> dict:
        """The batch of one step (this host's rows), micro-batches in front."""
        settings, parts = self.train, []
        source = self.experiment.data
        micro = settings.batch_size // settings.accumulate
        own = host_rows(micro) or slice(0, micro)
        for index in range(settings.accumulate):
            rows = slice(index * micro + own.start, index * micro + own.stop)
            parts.append(
                data.batch(
                    self.experiment.corpus.train,
                    seed=settings.seed,
                    step=step,
                    batch_size=settings.batch_size,
                    seq_len=source.seq_len,
                    mode=source.packing,
                    isolate=source.isolate,
                    rows=rows,
                )
            )
        if settings.accumulate == 1:
            return parts[0]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    # ---- metrics

    def _read_metrics(self) -> None:
        """Take in the metrics of the dispatch before the one just sent."""
        if self._in_flight is None:
            return
        first, count, device_metrics = self._in_flight
        self._in_flight = None
        metrics = jax.device_get(device_metrics)
        for index in range(count):
            row = {name: float(value[index]) for name, value in metrics.items()}
            bad = int(row.pop("bad_in_row"))
            done = first + index + 1
            for hook in self.services.hooks:
                hook.on_step(done, row)
            if bad and self.train.on_bad_step == "stop" and bad >= self.train.patience:
                self._write_train(done, row)
                self._stop_on_bad(done)
            if bad:
                self.services.reporter.say(
                    f"step {done}: the update was not finite and was not applied "
                    f"({bad} in a row)."
                )
            if done % self.train.log_every == 0 or done == self.train.steps:
                self._write_train(done, row)

    def _write_train(self, step: int, row: dict) -> None:
        now = time.perf_counter()
        start, start_step = self._clock
        line = {"step": step, "split": "train", **row}
        if step > start_step:
            seconds = (now - start) / (step - start_step)
            sequences = self.train.batch_size / seconds
            line["time"] = {
                "seconds_per_step": seconds,
                "tokens_per_second": sequences * self.experiment.data.seq_len,
            }
            peak = chips.peak_flops(jax.devices()[0].device_kind)
            if peak is not None:
                line["time"]["mfu"] = (
                    sequences * self._flops / peak / self.experiment.mesh.size
                )
        self._clock = (now, step)
        self._write(line)
        self.services.reporter.metrics(step, line)

    def _write(self, line: dict) -> None:
        self.services.metrics.write(line)
        for tracker in self.services.trackers:
            tracker.log(line)

    def _stop_on_bad(self, step: int) -> None:
        health = jax.device_get(self.state["health"])
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
        raise BadSteps(
            f"train: {self.train.patience} updates in a row were not finite; the first "
            f"was step {int(health['first_bad']) + 1}, seen at step {step}. Gradients "
            f"that were not finite: {shown or 'none, the loss itself'}. No bad update "
            f"was applied; last good checkpoint: {good}. Lower "
            "config.optim.learning_rate, set config.optim.clip_norm, or go on past bad "
            "steps with config.train.on_bad_step=skip."
        )

    # ---- evaluation, checkpoints, leaving

    def _evaluate(self) -> None:
        self._read_metrics()
        self.services.run.set_phase("eval")
        self.services.reporter.at(self.step, phase="evaluating")
        start = time.perf_counter()
        use_ema = "ema" in self.state and self.experiment.eval.use_ema
        params = self.state["ema" if use_ema else "params"]
        metrics = self._evaluator(params, self.state["buffers"])
        self.pending_eval = False
        self.last_eval = metrics
        elapsed = time.perf_counter() - start
        line = {"step": self.step, "split": "eval", **metrics}
        self._write({**line, "time": {"seconds": elapsed}})
        for hook in self.services.hooks:
            hook.on_eval(self.step, metrics, params)
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.services.reporter.say(f"step {self.step}: held-out {text}")
        self.services.reporter.at(self.step, phase="training")
        self._clock = (time.perf_counter(), self.step)

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        self._read_metrics()
        self.services.run.set_phase("save")
        meta = {
            "step": self.step,
            "pending_eval": self.pending_eval,
            "layout": self.experiment.model.layout.to_json(),
            "vocab_size": self.experiment.model.vocab_size,
        }
        self.services.metrics.sync()
        loss = None if self.last_eval is None else self.last_eval["loss"]
        self.services.checkpoints.save(self.step, self.state, meta, metric=loss)
        self.last_eval = None
        self.saved_step = self.step
        self._last_save = time.monotonic()
        self._clock = (time.perf_counter(), self.step)

    def _stop_requested(self) -> bool:
        return self.services.signals.requested is not None

    def _leave(self) -> int:
        """Save and say how to go on."""
        self._read_metrics()
        self._save()
        self.services.checkpoints.wait()
        self.services.reporter.say(
            f"{self.services.signals.requested}: saved at step {self.step} of "
            f"{self.train.steps}. Go on with: python -m attnjax.train --workdir "
            f"{self.services.run.path}"
        )
        return EXIT_SAVED


class BadSteps(UserError):
    """The run was stopped because updates kept being non-finite."""


class _Leave(Exception):
    """A signal asked the loop to save and leave."""
