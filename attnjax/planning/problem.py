"""The programs of a config, described without an array: what a run would compile."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.decoding.sampling import Sampler, draw
from attnjax.models.layout import path_of
from attnjax.planning.targets import PlanTarget
from attnjax.training import experiment as experiments
from attnjax.training import sharding, source_run, start
from attnjax.training.experiment import Experiment
from attnjax.training.step import make_dispatch


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
        name: "train" or "decode".
        jitted: under jax.jit.
        arguments: of shapes, dtypes and shardings.
    """

    name: str
    jitted: Any
    arguments: tuple


def experiment(config: dict, target: PlanTarget, devices: list) -> Experiment:
    """What `training.experiment.build` makes, for the target and without its data."""
    return experiments.planned(
        source_run.completed(config),
        devices=devices,
        platform=target.platform,
        target=target.kernel_target,
    )


def training(here: Experiment) -> Program:
    """The training step as `training.loop` compiles it, one step in a dispatch."""
    state = start.abstract_state(here)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(
        make_dispatch(here.recipe), donate_argnums=0, out_shardings=(placed, None)
    )
    settings = here.train
    parts = (settings.accumulate,) if settings.accumulate > 1 else ()
    rows = settings.batch_size // settings.accumulate
    place = sharding.batch_sharding(here.mesh, leading=1 + len(parts))
    batch = {
        name: jax.ShapeDtypeStruct(
            (1, *parts, rows, *row.shape), row.dtype, sharding=place
        )
        for name, row in here.feed.row_shapes().items()
    }
    return Program("train", jitted, (state, batch))


def decoding(here: Experiment, *, batch: int, max_len: int) -> Program:
    """One token for each of `batch` sequences in rooms of `max_len` tokens.

    Parameters are placed as in training. Of the state, sequences lie over data and
    fsdp, heads over tensor where they divide.

    Raises:
        UserError: a model without a decode form.
    """
    if here.feed.no_decoding:
        raise UserError(here.feed.no_decoding)
    model, mesh = here.model, here.mesh
    params, buffers = jax.eval_shape(lambda: model.init(here.recipe.seed))
    arrays = jax.eval_shape(model.unstack, params, buffers)
    arrays = _placed(arrays, lambda path, leaf: _array_spec(here, path, leaf))
    states = jax.eval_shape(lambda a: model.init_state(a, batch, max_len), arrays)
    states = _placed(states, lambda _, leaf: _state_place(here, leaf, batch))
    rows = NamedSharding(mesh, _rows(mesh, batch))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=rows)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)

    def step(arrays, states, tokens, positions, key):
        ctx = Context(positions=positions, segment_ids=jnp.ones_like(positions))
        hidden, states = model.step(arrays, states, tokens, ctx)
        logits = model.logits(arrays["ends"], hidden[:, 0])
        return draw(logits, Sampler(), key), states

    kept = jax.tree.map(lambda leaf: leaf.sharding, states)
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(None, kept))
    return Program("decode", jitted, (arrays, states, tokens, tokens, key))


def _placed(tree, place):
    def one(key_path, leaf):
        where = place(path_of(key_path), leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, tree)


def _array_spec(here: Experiment, path, leaf) -> NamedSharding:
    """The place of an unstacked parameter: that of one layer of the stacked one."""
    inner = tuple(part for part in path if part not in ("ends", "layers"))
    while inner and inner[0].isdecimal():
        inner = inner[1:]
    if not inner:
        return NamedSharding(here.mesh, P())
    spec = sharding.param_spec(inner, leaf.shape, here.mesh, here.rules)
    return NamedSharding(here.mesh, spec)


def _rows(mesh, batch: int) -> P:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return P(("data", "fsdp")) if batch % shards == 0 else P()


def _state_place(here: Experiment, leaf, batch: int) -> NamedSharding:
    """Sequences over data and fsdp; the first axis of heads over tensor."""
    mesh, dims = here.mesh, here.model.dims
    spec: list = [None] * leaf.ndim
    if leaf.ndim and leaf.shape[0] == batch:
        rows = _rows(mesh, batch)
        spec[0] = rows[0] if len(rows) else None
        tensor = mesh.shape["tensor"]
        heads = (dims.num_kv_heads, dims.num_heads)
        for axis in range(1, leaf.ndim):
            size = leaf.shape[axis]
            if tensor > 1 and size in heads and size % tensor == 0:
                spec[axis] = "tensor"
                break
    return NamedSharding(mesh, P(*spec))


def decode_batch(here: Experiment, wanted: int | None) -> int:
    """Sequences decoded at a time: as asked, or one for each shard of the batch.

    Raises:
        UserError: fewer than one.
    """
    shards = here.mesh.shape["data"] * here.mesh.shape["fsdp"]
    if wanted is not None and wanted < 1:
        raise UserError(f"--decode_batch: must be at least 1; got {wanted}.")
    return shards if wanted is None else wanted


def device_bytes(tree) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = (
            leaf.shape
            if leaf.sharding is None
            else leaf.sharding.shard_shape(leaf.shape)
        )
        total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total
