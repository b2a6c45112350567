"""One program for several runs: their states stacked, their batches side by side.

The members' axis N stands in front of every array of the state and, after the axis
of the dispatch's steps, of every batch.
"""

import time
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.training import members, sharding, start
from attnjax.training.evaluation import Evaluator
from attnjax.training.experiment import Experiment
from attnjax.training.loop import Loop, build_batch
from attnjax.training.record import BadSteps, Record, mean_line
from attnjax.training.step import init_state, make_dispatch, make_group_dispatch, vary


def placement(experiment: Experiment, *, stacked: bool):
    """Where the arrays of a state lie on the mesh; the members' axis is whole."""
    shapes = jax.eval_shape(lambda: init_state(experiment.recipe))
    places = sharding.shardings(shapes, experiment.mesh, experiment.rules)
    if not stacked:
        return places
    return jax.tree.map(lambda p: NamedSharding(p.mesh, P(None, *p.spec)), places)


def new_states(group: Sequence[Experiment]) -> dict:
    """The stacked states before step 0, each as its run's own."""
    recipe = group[0].recipe
    init = jax.jit(
        lambda seed: init_state(vary(recipe, {"seed": seed})),
        out_shardings=placement(group[0], stacked=False),
    )
    return stack(group[0], [init(np.int32(one.train.seed)) for one in group])


def stack(experiment: Experiment, states: Sequence[dict]) -> dict:
    """States of single runs as one, [N, ...]."""
    program = jax.jit(
        lambda *each: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each),
        out_shardings=placement(experiment, stacked=True),
    )
    return program(*states)


def make_member(experiment: Experiment):
    """(stacked state, index) -> the state of one run, a copy."""
    return jax.jit(
        lambda state, index: jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), state
        ),
        out_shardings=placement(experiment, stacked=False),
    )


def group_program(group: Sequence[Experiment]):
    """The jitted dispatch: (state, batches [K, N, ...]) -> (state, metrics [K, N])."""
    values = members.values([one.config for one in group])
    return jax.jit(
        make_group_dispatch(group[0].recipe, values),
        donate_argnums=0,
        out_shardings=(placement(group[0], stacked=True), None),
    )


def build_group_batch(group: Sequence[Experiment], step: int) -> dict:
    """The batches of one step, [N, ...]: each run's own order."""
    parts = [build_batch(one, step) for one in group]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def group_batch_sharding(experiment: Experiment):
    """Of batches [K, N, ...]."""
    leading = 2 + (experiment.train.accumulate > 1)
    return sharding.batch_sharding(experiment.mesh, leading=leading)


class GroupLoop(Loop):
    """The loop for several runs at the same step.

    Args:
        group: the runs' experiments.
        state: the stacked state.
        records: a record for each run; they share a reporter and the signals.
    """

    def __init__(
        self, group: Sequence[Experiment], state: dict, records: Sequence[Record]
    ):
        self.group = tuple(group)
        first = {**state, "step": state["step"][0]}
        super().__init__(group[0], first, records[0].services)
        self.state, self.records = state, list(records)
        self._member = make_member(group[0])

    def alive(self) -> list[tuple[int, Record]]:
        """The runs that have not been stopped."""
        return [(i, r) for i, r in enumerate(self.records) if r.error is None]

    def member(self, index: int) -> dict:
        """The state of one run, a copy."""
        return self._member(self.state, index)

    def _make_evaluator(self) -> Evaluator:
        return Evaluator(
            self.experiment,
            should_stop=self._stop_requested,
            members=len(self.group),
        )

    def _make_program(self):
        return group_program(self.group)

    def _batch_sharding(self):
        return group_batch_sharding(self.experiment)

    def _build(self, step: int) -> dict:
        return build_group_batch(self.group, step)

    def _take(self, step: int, row: dict, is_due: bool) -> None:
        pace, lines = cache(self._pace), []
        for index, record in self.alive():
            own = {name: float(value[index]) for name, value in row.items()}
            try:
                line = record.take(
                    step,
                    own,
                    is_due=is_due,
                    pace=pace,
                    health=partial(self._health, index),
                )
                lines += [line] if line is not None else []
            except BadSteps as error:
                self._drop(record, error, step)
        if lines:
            self.services.reporter.metrics(step, mean_line(lines))
        if not self.alive():
            raise self.records[-1].error

    def _drop(self, record: Record, error: BadSteps, step: int) -> None:
        """Go on without a run: it is computed on, and no longer written."""
        record.error = error
        record.say(str(error))
        record.services.run.end("bad_steps", step)

    def _health(self, index: int = 0) -> dict:
        return jax.device_get(self.member(index)["health"])

    def _evaluate_params(self, params: dict, seconds) -> None:
        results = self._evaluator(params, self.state["buffers"])
        share = seconds() / len(self.records)
        for index, record in self.alive():
            if record.pending_eval:
                own = jax.tree.map(lambda a, i=index: a[i], params)
                record.evaluated(self.step, results[index], own, share)

    def _save_state(self) -> None:
        for index, record in self.alive():
            if record.saved_step != self.step:
                record.save(self.step, self.member(index))

    def _how_to_go_on(self) -> str:
        paths = "\n".join(f"  {record.services.run.path}" for record in self.records)
        return f"The {len(self.records)} runs go on together or alone:\n{paths}"


def measure(group: Sequence[Experiment], *, calls: int = 5, rounds: int = 3) -> float:
    """Time of a step of all runs together over that of as many separate steps.

    Compiles both programs and takes the median of `rounds` of `calls` steps each in
    turns; states are new ones and thrown away.
    """
    one, count = group[0], len(group)
    alone = jax.jit(make_dispatch(one.recipe), donate_argnums=0)
    single = jax.tree.map(lambda a: a[None], build_batch(one, 0))
    every = jax.tree.map(lambda a: a[None], build_group_batch(group, 0))
    single = jax.device_put(
        single,
        sharding.batch_sharding(one.mesh, leading=1 + (one.train.accumulate > 1)),
    )
    every = jax.device_put(every, group_batch_sharding(one))
    programs = [
        [alone, start.new_state(one), single],
        [group_program(group), new_states(group), every],
    ]

    def seconds(entry: list, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            entry[1], metrics = entry[0](entry[1], entry[2])
        jax.block_until_ready((entry[1], metrics))
        return (time.perf_counter() - begin) / calls

    for entry in programs:
        seconds(entry, 1)
    ratios = []
    for _ in range(rounds):
        separate, together = (seconds(entry, calls) for entry in programs)
        ratios.append(together / (count * separate))
    return float(np.median(ratios))
