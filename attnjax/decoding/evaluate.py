"""Evaluating a loaded run on the held-out split its config names."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from attnjax.core.errors import UserError
from attnjax.decoding.run import Loaded
from attnjax.training import experiment, state_tree
from attnjax.training.evaluation import Evaluator


def evaluate_run(run: Loaded) -> dict:
    """Metrics of `run` on the held-out split of `run.config`.

    Raises:
        UserError: when the data is tokenised otherwise than the run's, has other
            classes, or images for which the model would need other parameters.
    """
    here = experiment.build(run.config)
    here.feed.check_run(run.path)
    _check_fits(run, here)
    everywhere = NamedSharding(here.mesh, PartitionSpec())
    params, buffers = jax.device_put((run.params, run.buffers), everywhere)
    metrics = Evaluator(here)(params, buffers)
    return {"step": run.step, **here.feed.about, **metrics}


def _check_fits(run: Loaded, here: experiment.Experiment) -> None:
    """Raise UserError unless a model made for the data has the run's parameters."""
    own, wanted = (here.feed.sizes_of(model) for model in (run.model, here.model))
    if own == wanted:
        return
    have = state_tree.signature(state_tree.named((run.params, run.buffers)))
    arrays = jax.eval_shape(here.model.init, 0)
    lines = state_tree.differences(have, state_tree.signature(state_tree.named(arrays)))
    if lines:
        changed = ", ".join(f"{n}={v}" for n, v in wanted.items() if own[n] != v)
        raise UserError(
            f"evaluate: the run's model does not fit this data; got {changed}. These "
            "ask for other parameters than the run has (- has, + wanted):\n"
            + "\n".join(lines[:12] + here.feed.fit_cures(run.model))
        )
    here.feed.check_places(run.model, here.model)
