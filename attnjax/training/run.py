"""One run from its directory to its last line: open, start or resume, train, finish."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from attnjax.core import mappings
from attnjax.core.errors import EXIT_OK, EXIT_SAVED, UserError
from attnjax.training import (
    agreement,
    finish,
    hosts,
    identity,
    samples,
    source_run,
    start,
    trackers,
)
from attnjax.training import experiment as experiments
from attnjax.training.checkpoint_reader import CheckpointReader
from attnjax.training.checkpoints import Checkpointer
from attnjax.training.disk import disk_errors
from attnjax.training.loop import Hook, Loop, Services
from attnjax.training.metrics import MetricsLog
from attnjax.training.progress import Reporter
from attnjax.training.record import BadSteps
from attnjax.training.run_directory import CONFIG, RunDirectory
from attnjax.training.signals import StopRequested, StopSignal, leave


def train(
    config: dict,
    workdir: str | Path,
    *,
    extend: bool = False,
    sample: Callable | None = None,
    hooks: tuple[Hook, ...] = (),
    signals: StopSignal | None = None,
) -> int:
    """Train or resume the run of a resolved config in `workdir`.

    Args:
        config: from `experiment.resolve`.
        workdir: the run directory.
        extend: allow train.steps to be raised over that of the run.
        sample: (experiment, state) -> text kept and shown at the end, or a picture
            kept after every evaluation, as its feed has it; None makes none.
        hooks: called after every step and every evaluation.
        signals: already entered by the caller; None enters one here.

    Returns:
        `EXIT_OK`, or `EXIT_SAVED` when a signal asked for an end.
    """
    if signals is None:
        with StopSignal() as own:
            return train(
                config,
                workdir,
                extend=extend,
                sample=sample,
                hooks=hooks,
                signals=own,
            )
    hosts.refuse_several()
    # A mistake in the config shows here, before it has claimed the directory.
    try:
        with signals.interrupting(), agreement.shared_failure():
            config = source_run.completed(config, workdir)
            experiment = experiments.build(config)
            if not (Path(workdir) / CONFIG).exists():
                check_source(experiment)
        _check_others(experiment)
    except StopRequested:
        print(f"{signals.requested}: nothing was begun; run the command again.")
        leave(EXIT_SAVED)
    with contextlib.ExitStack() as stack:
        with agreement.shared_failure():
            run = stack.enter_context(
                RunDirectory.open(
                    workdir,
                    config,
                    resolve=experiments.resolve,
                    identity_excludes=identity.EXCLUDES,
                    extend=extend,
                    primary=hosts.is_writer(),
                )
            )
        run.follow(agreement.broadcast(run.manifest))
        run.set_phase("start")
        if run.finished:
            if hosts.is_writer():
                say_done(run)
            return EXIT_OK
        try:
            return go_on(experiment, run, signals, sample, hooks)
        except StopRequested:
            # Nothing was trained since the last checkpoint. A compilation may still
            # be running in a thread that cannot be stopped.
            print(
                f"{signals.requested}: nothing new to save. Go on with: python -m "
                f"attnjax.train --workdir {run.path}",
                flush=True,
            )
            run.close()
            leave(EXIT_SAVED)


def _check_others(experiment) -> None:
    """Raise UserError unless all processes train the same on the same data."""
    if agreement.is_several():
        same = mappings.without(experiment.config, ("data.cache_dir", "data.data_dir"))
        agreement.require_same("the config (by its hash)", mappings.digest(same))
        agreement.require_same("the data", experiment.corpus.fingerprint)


def say_done(run: RunDirectory) -> None:
    """The line for a run that is finished."""
    print(
        f"{run.path} is finished at step {run.finished_step}; nothing to do. More "
        "steps: --extend --config.train.steps=N."
    )


def check_source(experiment) -> None:
    """Raise UserError unless train.init_from is a run that this one may start from."""
    source = experiment.train.init_from
    if source is None:
        return
    if not (Path(source) / CONFIG).is_file():
        raise UserError(
            f"config.train.init_from: {source!r} is not a run directory (it has no "
            f"{CONFIG})."
        )
    stored = json.loads((Path(source) / CONFIG).read_text())
    kind, own = stored["model"].get("name", "lm"), experiment.config["model"]["name"]
    if kind != own:
        raise UserError(
            "config.train.init_from: must be a run of the same kind of model; got "
            f"{source!r}, which is a {kind}, for a {own}."
        )
    experiment.feed.check_source(Path(source))


def go_on(experiment, run: RunDirectory, signals: StopSignal, sample, hooks) -> int:
    """Train an opened run from where it is; see `train`."""
    with opened(experiment, run) as (metrics, checkpoints):
        state, pending_eval = _first_state(experiment, run, checkpoints, signals)
        step = int(state["step"])
        sinks = begin(experiment, run, metrics, step)
        # The evaluation was done after this checkpoint, before a kill.
        is_due = pending_eval and not metrics.has(step, "eval")
        pending_eval = agreement.broadcast(is_due)
        _say_start(experiment, run, step)
        quiet = not hosts.is_writer()
        with Reporter(experiment.train.steps, start=step, quiet=quiet) as reporter:
            services = Services(
                run,
                metrics,
                checkpoints,
                signals,
                reporter,
                sinks,
                tuple(hooks),
                sample,
            )
            loop = Loop(experiment, state, services, pending_eval=pending_eval)
            try:
                code = loop()
            except BadSteps:
                run.end("bad_steps", loop.step)
                raise
            except Exception:
                run.end("failed", loop.step)
                raise
        conclude(experiment, services, code, loop.step, loop.state, sample)
        return code


@contextlib.contextmanager
def opened(experiment, run: RunDirectory):
    """A run's (MetricsLog, Checkpointer), closed at the end of the block."""
    with agreement.shared_failure(), disk_errors("workdir"):
        if hosts.is_writer():
            experiment.feed.save(run.path)
    settings = experiment.train
    with (
        MetricsLog(run.metrics, primary=hosts.is_writer()) as metrics,
        Checkpointer(
            run.checkpoints,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
        ) as checkpoints,
    ):
        yield metrics, checkpoints


def begin(experiment, run: RunDirectory, metrics: MetricsLog, step: int) -> tuple:
    """Record that a process goes on from `step`; the run's trackers."""
    with agreement.shared_failure():
        changes = run.start(
            step,
            data_fingerprint=experiment.corpus.fingerprint,
            data=experiment.corpus.provenance,
        )
        for line in changes:
            print(line, flush=True)
        metrics.cut_back(step)
        return _trackers(experiment, run, step)


def conclude(
    experiment, services: Services, code: int, step: int, state: dict, sample
) -> None:
    """Write what a run that ended at `step` with this exit code leaves behind."""
    run = services.run
    for sink in services.trackers:
        sink.finish()
    if code == EXIT_OK:
        with agreement.shared_failure():
            _finish(experiment, run, services.metrics, state, sample)
    run.end("finished" if code == EXIT_OK else "saved", step)
    run.set_phase("done")


def _first_state(experiment, run, checkpoints, signals) -> tuple[dict, bool]:
    """The state to go on from, and whether its evaluation is still due."""
    found = checkpoints.latest()
    for step, reason in found.skipped if found and hosts.is_writer() else ():
        print(f"checkpoint of step {step} is damaged and was skipped: {reason}")
    run.set_phase("compile")
    with signals.interrupting():
        if found is not None:
            if hosts.is_writer():
                print(f"resuming from step {found.step} ({found.path})")
            state, meta = start.restore(experiment, checkpoints, found.step)
            return state, bool(meta["pending_eval"])
        if experiment.train.init_from is None:
            return start.new_state(experiment), False
        return state_from_source(experiment), False


def state_from_source(experiment) -> dict:
    """The first state of a run with train.init_from."""
    check_source(experiment)
    reader = CheckpointReader(Path(experiment.train.init_from) / "checkpoints")
    say = print if hosts.is_writer() else lambda line: None
    return start.start_from(experiment, reader, say)


def _trackers(experiment, run, step: int) -> tuple:
    settings = experiment.train
    if not hosts.is_writer():
        return ()
    names = (["tensorboard"] if settings.tensorboard else []) + [settings.tracker]
    made = []
    for name in names:
        made += trackers.make(
            name,
            run.path,
            config=experiment.config,
            run_id=run.run_id,
            purge_step=step or None,
        )
    return tuple(made)


def _say_start(experiment, run, step: int) -> None:
    if not hosts.is_writer():
        return
    config = experiment.config
    devices = jax.devices()
    print(
        f"{experiment.model.parameter_count():,} parameters, "
        f"{experiment.feed.description}, {len(devices)} x "
        f"{devices[0].device_kind}; step {step} of {experiment.train.steps}",
        flush=True,
    )
    if experiment.model.matched is not None:
        print(experiment.model.matched.line(), flush=True)
    if run.extended_from is not None and config["optim"]["schedule"] != "constant":
        print(
            f"extended from {run.extended_from} steps: the "
            f"{config['optim']['schedule']} schedule now ends at the new last step, so "
            "the learning rate jumps.",
            flush=True,
        )


def _finish(experiment, run, metrics, state: dict, sample) -> None:
    picture = None
    if sample is not None and experiment.feed.draws:
        # All processes draw; runs that were trained together have none yet.
        step = int(state["step"])
        if not agreement.broadcast(samples.path(run, step, "png").exists()):
            samples.keep(run, step, sample(experiment, state))
        picture = str(samples.path(run, step, "png").relative_to(run.path))
    if not hosts.is_writer():
        return
    text = None
    if sample is not None and experiment.train.sample_tokens:
        own = hosts.on_this_host(state)
        if own is None:
            print(
                "no sample: the parameters are split over several processes. In one: "
                f"python -m attnjax.generate --workdir {run.path}"
            )
        else:
            text = sample(experiment, own)
            samples.keep(run, int(jnp.asarray(state["step"])), text)
    with disk_errors("workdir"):
        ending = finish.finish(experiment, run, metrics.records(), picture=picture)
    for line in finish.lines(ending, run, text):
        print(line)
