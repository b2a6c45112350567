"""Evaluating a loaded run on the held-out split its config names."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from attnjax.data import tokenizers
from attnjax.decoding.run import LoadedRun
from attnjax.training import experiment
from attnjax.training.evaluation import Evaluator


def evaluate_run(run: LoadedRun) -> dict:
    """Metrics of `run` on the held-out split of `run.config`.

    Raises:
        UserError: when the data is tokenised otherwise than the run's.
    """
    here = experiment.build(run.config)
    tokenizers.check_same_tokenizer(
        run.tokenizer, here.corpus.tokenizer, owner="evaluate"
    )
    everywhere = NamedSharding(here.mesh, PartitionSpec())
    params, buffers = jax.device_put((run.params, run.buffers), everywhere)
    metrics = Evaluator(here)(params, buffers)
    return {
        "step": run.step,
        **here.feed.about,
        **metrics,
    }
