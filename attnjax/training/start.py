"""The first state of a run: new, restored from its checkpoint, or from another run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from attnjax.core.errors import UserError
from attnjax.models import conversions
from attnjax.training import sharding, source_run, transfer
from attnjax.training.experiment import Experiment
from attnjax.training.step import init_state


def abstract_state(experiment: Experiment) -> Any:
    """Shapes, dtypes and shardings of the state on this mesh."""
    shapes = jax.eval_shape(lambda: init_state(experiment.recipe))
    places = sharding.shardings(shapes, experiment.mesh, experiment.rules)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        shapes,
        places,
    )


def new_state(experiment: Experiment) -> dict:
    """The state before step 0, placed on the mesh."""
    shapes = jax.eval_shape(lambda: init_state(experiment.recipe))
    places = sharding.shardings(shapes, experiment.mesh, experiment.rules)
    return jax.jit(lambda: init_state(experiment.recipe), out_shardings=places)()


def start_from(experiment: Experiment, checkpointer, say) -> dict:
    """A new state whose parameters come from another run.

    Args:
        experiment: the new run.
        checkpointer: of the other run.
        say: takes lines of the report.
    """
    settings = experiment.train
    source, meta = source_run.read_arrays(checkpointer, settings.init_from)
    _check_places(experiment, meta)
    layers = settings.init_layers
    if settings.init_convert is not None:
        source = conversions.convert(
            settings.init_convert,
            source,
            source_run.read_model(settings.init_from, meta),
            experiment.model,
            layers=layers,
        )
        layers = None
    state = new_state(experiment)
    params, report = transfer.transfer(
        jax.tree.map(_whole, state["params"]),
        experiment.model.layout,
        source,
        layers=layers,
    )
    for line in report.lines():
        say(line)
    state["params"] = jax.tree.map(_put, params, state["params"])
    if "ema" in state:
        state["ema"] = jax.tree.map(jnp.copy, state["params"])
    return state


def _check_places(experiment: Experiment, meta: dict) -> None:
    """Raise UserError where tokens have other fixed positions than in the other run,
    and nobody said so: arrays of another shape are found without this."""
    if getattr(experiment.model.config, "positions", None) == "sincos":
        source = source_run.read_model(experiment.train.init_from, meta)
        experiment.feed.check_places(source, experiment.model)


def _whole(value: jax.Array) -> np.ndarray:
    """An array's value in this process's memory, wherever its parts are."""
    if value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def _put(new: np.ndarray, old: jax.Array) -> jax.Array:
    """A value that every process has, placed like `old`."""
    new = np.asarray(new, old.dtype)
    return jax.make_array_from_callback(new.shape, old.sharding, lambda i: new[i])


def restore(experiment: Experiment, checkpointer, step: int) -> tuple[dict, dict]:
    """The state and meta of a checkpoint, placed on this mesh whatever it was on."""
    state, meta = checkpointer.restore(step, abstract_state(experiment))
    here = experiment.model.layout.to_json()
    if meta["layout"] != here:
        raise UserError(
            "train: the checkpoint's layers are laid out differently; got "
            f"{meta['layout']['names']}, expected {here['names']}."
        )
    return state, meta
