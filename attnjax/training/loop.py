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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax import kernels
from attnjax.core import chips
from attnjax.core.errors import EXIT_OK, EXIT_SAVED
from attnjax.data.prefetch import Prefetch, dispatches
from attnjax.training import agreement, kernel_log, samples, sharding
from attnjax.training.evaluation import Evaluator, Stopped
from attnjax.training.experiment import Experiment
from attnjax.training.hosts import is_writer
from attnjax.training.profiler import ProfileWindow
from attnjax.training.progress import Reporter
from attnjax.training.record import Record
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
        sample: (experiment, state) -> a picture, drawn after every evaluation where
            the feed says so; None draws none.
    """

    run: Any
    metrics: Any
    checkpoints: Any
    signals: Any
    reporter: Reporter
    trackers: tuple = ()
    hooks: tuple["Hook", ...] = ()
    sample: Any = None


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
        self.records = [Record(experiment, services, pending_eval=pending_eval)]
        self._last_save = time.monotonic()
        self._clock = (time.perf_counter(), self.step)
        self._in_flight: tuple[int, int, Any] | None = None
        self._asked_by: str | None = None
        self._evaluator = self._make_evaluator()
        self._profile = ProfileWindow(
            services.run.path,
            self.train.profile_start if is_writer() else None,
            self.train.profile_steps,
        )
        self._jitted = self._make_program()
        self._programs: dict[int, Any] = {}
        self._flops = 3.0 * experiment.row_flops

    # ---- what a group of runs does otherwise: see `vectorized.GroupLoop`

    def _make_evaluator(self) -> Evaluator:
        return Evaluator(self.experiment, should_stop=self._stop_requested)

    def _make_program(self):
        """The jitted dispatch: (state, batches [K, ...]) -> (state, metrics [K])."""
        placed = sharding.shardings(
            self.state, self.experiment.mesh, self.experiment.rules
        )
        return jax.jit(
            make_dispatch(self.experiment.recipe),
            donate_argnums=0,
            # Metrics are whole on every host, so that each can read them.
            out_shardings=(placed, NamedSharding(self.experiment.mesh, P())),
        )

    def _batch_sharding(self):
        leading = 1 + (self.train.accumulate > 1)
        return sharding.batch_sharding(self.experiment.mesh, leading=leading)

    def _build(self, step: int) -> dict:
        return build_batch(self.experiment, step)

    def _take(self, step: int, row: dict, is_due: bool) -> None:
        """Take in the metrics of one finished step."""
        row = {name: float(value) for name, value in row.items()}
        line = self.records[0].take(
            step, row, is_due=is_due, pace=self._pace, health=self._health
        )
        if line is not None:
            self.services.reporter.metrics(step, line)

    def _health(self) -> dict:
        return jax.device_get(self.state["health"])

    def _evaluate_params(self, params: dict, seconds) -> None:
        """Evaluate and record; `seconds` gives the time since the start."""
        metrics = self._evaluator(params, self.state["buffers"])
        self.records[0].evaluated(self.step, metrics, params, seconds())

    def _save_state(self) -> None:
        self.records[0].save(self.step, self.state)

    def _how_to_go_on(self) -> str:
        path = self.services.run.path
        return f"Go on with: python -m attnjax.train --workdir {path}"

    # ---- the run

    def __call__(self) -> int:
        """Train to the end; the exit code is `EXIT_OK` or `EXIT_SAVED`."""
        try:
            if any(record.pending_eval for record in self.records):
                self._evaluate()
            if self._stop_requested():
                return self._leave()
            if self.step < self.train.steps:
                self._run()
        except Stopped:
            return self._leave()
        except StopRequested:
            # While compiling: XLA's thread goes on, so the process must not unwind.
            code = self._leave()
            for record in self.records:
                record.services.run.end("saved", self.step)
                record.services.run.close()
            leave(code)
        except _Leave:
            return self._leave()
        finally:
            self._profile.close()
        self._save()
        self._wait()
        return EXIT_OK

    def _run(self) -> None:
        source = dispatches(
            self.step, self.train.steps, steps_per_dispatch=self._chunk()
        )
        put = self._batch_sharding()
        with Prefetch(self._build, source, sharding=put) as batches:
            for item in batches:
                if self._stop_requested():
                    raise _Leave
                dispatch = self._dispatch(item)
                self._set_phase("step")
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
            # Clocks differ between processes: one of them says.
            is_time = agreement.broadcast(waited >= 60 * self.train.save_minutes)
            save_due = save_due or is_time
        if eval_due:
            for record in self.records:
                record.pending_eval = True
            self._evaluate()
        if save_due and not at_end:
            self._save()

    def _dispatch(self, item):
        """The compiled program of K steps, K as in `item`."""
        if item.count not in self._programs:
            self._set_phase("compile")
            with self.services.signals.interrupting(), kernels.watching() as watch:
                lowered = self._jitted.lower(self.state, item.batch)
                compiled = lowered.compile()
            if not self._programs:
                self._tell_kernels(watch.choices)
            self._programs[item.count] = compiled
            self._clock = (time.perf_counter(), self.step)
        return self._programs[item.count]

    def _tell_kernels(self, choices) -> None:
        for record in self.records:
            record.services.run.begun_with(kernel_log.records(choices))
        for line in kernel_log.lines(choices):
            self.services.reporter.say(line)

    def _chunk(self) -> int:
        """Steps a dispatch: as configured, cut so that boundaries fall on it."""
        size = self.train.steps_per_dispatch
        every = [
            self.train.log_every,
            self.train.save_every,
            self.experiment.eval.every,
        ]
        return int(np.gcd.reduce([size, *(e for e in every if e is not None)]))

    # ---- metrics

    def _read_metrics(self) -> None:
        """Take in the metrics of the dispatch before the one just sent."""
        if self._in_flight is None:
            return
        first, count, device_metrics = self._in_flight
        self._in_flight = None
        metrics = jax.device_get(device_metrics)
        for index in range(count):
            row = {name: value[index] for name, value in metrics.items()}
            done = first + index + 1
            is_due = done % self.train.log_every == 0 or done == self.train.steps
            self._take(done, row, is_due)

    def _pace(self, step: int) -> dict:
        """{"time": speed since the last call}, or {} when no step lies between."""
        now = time.perf_counter()
        start, start_step = self._clock
        self._clock = (now, step)
        if step <= start_step:
            return {}
        # Runs trained together share the time evenly.
        seconds = (now - start) / (step - start_step) / len(self.records)
        rows, feed = self.train.batch_size / seconds, self.experiment.feed
        times = {
            "seconds_per_step": seconds,
            f"{feed.unit}s_per_second": rows * feed.units_per_row,
        }
        peak = chips.peak_flops(jax.devices()[0].device_kind)
        if peak is not None:
            times["mfu"] = rows * self._flops / peak / self.experiment.mesh.size
        return {"time": times}

    # ---- evaluation, checkpoints, leaving

    def _evaluate(self) -> None:
        self._read_metrics()
        self._set_phase("eval")
        self.services.reporter.at(self.step, phase="evaluating")
        start = time.perf_counter()
        use_ema = "ema" in self.state and self.experiment.eval.use_ema
        params = self.state["ema" if use_ema else "params"]
        self._evaluate_params(params, lambda: time.perf_counter() - start)
        if self.services.sample is not None and self.experiment.feed.draws:
            samples.keep(
                self.services.run,
                self.step,
                self.services.sample(self.experiment, self.state),
            )
        self.services.reporter.at(self.step, phase="training")
        self._clock = (time.perf_counter(), self.step)

    def _save(self) -> None:
        if all(record.saved_step == self.step for record in self.records):
            return
        self._read_metrics()
        self._save_state()
        self._last_save = time.monotonic()
        self._clock = (time.perf_counter(), self.step)

    def _wait(self) -> None:
        for record in self.records:
            record.services.checkpoints.wait()

    def _set_phase(self, word: str) -> None:
        for record in self.records:
            record.services.run.set_phase(word)

    def _stop_requested(self) -> bool:
        self._asked_by = agreement.stop_requested(self.services.signals)
        return self._asked_by is not None

    def _leave(self) -> int:
        """Save and say how to go on."""
        self._read_metrics()
        self._save()
        self._wait()
        self.services.reporter.say(
            f"{self._asked_by or self.services.signals.requested}: saved at step "
            f"{self.step} of "
            f"{self.train.steps}. {self._how_to_go_on()}"
        )
        return EXIT_SAVED


def build_batch(experiment: Experiment, step: int) -> dict:
    """The batch of one step (this host's part), micro-batches in front."""
    settings, feed, parts = experiment.train, experiment.feed, []
    micro = settings.batch_size // settings.accumulate
    own = feed.host_rows(experiment.mesh, micro)
    for index in range(settings.accumulate):
        part = feed.batch(
            seed=settings.seed,
            step=step,
            batch_size=settings.batch_size,
            rows=slice(index * micro + own.start, index * micro + own.stop),
        )
        parts.append(experiment.placed(part))
    if settings.accumulate == 1:
        return parts[0]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


class _Leave(Exception):
    """A signal asked the loop to save and leave."""
