"""Evaluation on the whole held-out split, with one host sync at the end."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnjax.data.prefetch import to_devices
from attnjax.tasks import sink_metrics
from attnjax.training import sharding


class Stopped(Exception):
    """An evaluation was asked to stop between two batches."""


class Evaluator:
    """Compiles once; call it with parameters as often as needed.

    Args:
        experiment: what is evaluated.
        should_stop: looked at before every batch; True raises `Stopped`.
        members: N, where parameters of N runs are evaluated at once, [N, ...].
    """

    def __init__(
        self,
        experiment,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        members: int | None = None,
    ):
        self.experiment = experiment
        self.should_stop = should_stop
        self.members = members
        mesh = experiment.mesh
        settings = experiment.eval
        self.batch_size = settings.batch_size or experiment.train.batch_size
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        # Padding rows weigh nothing, so a batch may be rounded up to fit the mesh.
        self.batch_size = -(-self.batch_size // shards) * shards
        self._sharding = sharding.batch_sharding(mesh, leading=0)

        def step(params, buffers, totals, batch):
            sums = experiment.task.evaluate(params, buffers, batch)
            return jax.tree.map(lambda a, b: a + b, totals, sums)

        every = step if members is None else jax.vmap(step, in_axes=(0, 0, 0, None))
        # Whole on every host, so that each can read them.
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(every, out_shardings=everywhere)

        def lay_open(params, buffers, batch, most):
            return experiment.task.explain(
                params, buffers, batch, length=settings.explain_len, most=most
            )

        if members is not None:
            lay_open = jax.vmap(lay_open, in_axes=(0, 0, None, None))
        self._lay_open = jax.jit(lay_open, out_shardings=everywhere)

    def _batches(self):
        feed, size = self.experiment.feed, self.batch_size
        rows = feed.host_rows(self.experiment.mesh, size)
        batches = feed.eval_batches(batch_size=size, rows=rows)
        for batch in itertools.islice(batches, self.experiment.eval.batches):
            yield self.experiment.placed(batch)

    def __call__(self, params: dict, buffers: dict) -> dict | list[dict]:
        """Metrics of the held-out split, `task.summary` of the sums; a list of them
        for several members."""
        zero = np.zeros(() if self.members is None else self.members, np.float32)
        totals = dict.fromkeys(self.experiment.task.totals, zero)
        explained, left = None, self.experiment.eval.explain
        for batch in self._batches():
            if self.should_stop():
                raise Stopped
            batch = to_devices(batch, self._sharding)
            if left > 0:
                found = self._lay_open(params, buffers, batch, left)
                left -= self.batch_size
                explained = (
                    found if explained is None else sink_metrics.added(explained, found)
                )
            before, totals = totals, self._step(params, buffers, totals, batch)
            # One batch ahead and no more, or thousands would wait in memory.
            jax.block_until_ready(before)
        totals, explained = jax.device_get((totals, explained or {}))
        if self.members is None:
            return self._summary(totals, explained)
        return [
            self._summary(*jax.tree.map(lambda a, i=i: a[i], (totals, explained)))
            for i in range(self.members)
        ]

    def _summary(self, totals: dict, explained: dict) -> dict:
        found = self.experiment.task.summary(
            {name: float(value) for name, value in totals.items()},
            **self.experiment.feed.summary_facts,
        )
        return found | (sink_metrics.summary(explained) if explained else {})
