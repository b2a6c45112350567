"""From a config to the things it names: resolve, check, build.

The resolved config is plain JSON with every default filled in; a run restarts from
it alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from attnjax.core import schema
from attnjax.core.config import apply_overrides, apply_values
from attnjax.core.errors import UserError, unknown
from attnjax.models import conversions
from attnjax.training import feeds, optimizers, sharding
from attnjax.training.feeds.base import check_at_least
from attnjax.training.settings import EvalConfig, TrainConfig
from attnjax.training.step import Recipe

GROUPS = ("model", "data", "task", "optim", "train", "eval", "mesh")


def resolve(given: dict) -> dict:
    """Fill every default of a config and check it; JSON in, JSON out.

    Raises:
        UserError: for an unknown or missing key or a value that does not fit,
            with its dotted name and what is allowed.
    """
    for group in given:
        if group not in GROUPS:
            raise unknown("config", "group", group, GROUPS)
        if not isinstance(given[group], Mapping):
            raise UserError(
                f"config.{group}: is a group of settings; got {given[group]!r}. Set "
                f"one of its keys, as in --config.{group}.KEY=VALUE."
            )
    feed = feeds.feed_class(given.get("model", {}))

    def fill(cls, group):
        return schema.resolve(cls, given.get(group, {}), path=f"config.{group}")

    config = {
        "model": feed.model_module.resolve(dict(given.get("model", {}))),
        "data": feed.resolve_data(given.get("data", {})),
        "task": fill(feed.task_module.Config, "task"),
        "optim": fill(optimizers.Config, "optim"),
        "train": fill(feed.train_config, "train"),
        "eval": fill(feed.eval_config, "eval"),
        "mesh": fill(sharding.Config, "mesh"),
    }
    train = config["train"]
    train["init_options"] = conversions.plan_settings(
        train["init_convert"], train["init_options"]
    )
    _check(config)
    return config


def changed(config: dict, overrides: Sequence[tuple[str, Any]]) -> dict:
    """A resolved config with other values at dotted keys, resolved again.

    Another source of data keeps those settings of the former that it has too.

    Args:
        config: resolved.
        overrides: (dotted key, value); texts are read as on a command line.

    Raises:
        UserError: as `resolve`.
    """
    name = str(dict(overrides).get("data.name", config["data"]["name"]))
    if name != config["data"]["name"]:
        source = feeds.feed_class(config["model"]).data_class(name)
        known = {field.name for field in dataclasses.fields(source)}
        kept = {k: v for k, v in config["data"].items() if k in known}
        config = {**config, "data": kept}
    for dotted, value in overrides:
        apply = apply_overrides if isinstance(value, str) else apply_values
        config = apply(config, [(dotted, value)])
    return resolve(config)


def _check(config: dict) -> None:
    feed = feeds.make(config)
    optimizers.check(schema.build(optimizers.Config, config["optim"]))
    schema.build(feed.task_module.Config, config["task"], path="config.task")
    sharding.resolve_rules(config["mesh"]["rules"])
    check_at_least(
        config,
        ("train", "steps", 1),
        ("train", "accumulate", 1),
        ("train", "steps_per_dispatch", 1),
        ("train", "log_every", 1),
        ("train", "save_every", 1),
        ("train", "keep_last", 1),
        ("train", "keep_best", 0),
        ("train", "patience", 1),
        ("eval", "every", 1),
        ("eval", "batches", 1),
        ("eval", "batch_size", 1),
        ("eval", "explain", 0),
        ("eval", "explain_len", 2),
    )
    name = config["train"]["init_convert"]
    if name is not None and config["train"]["init_from"] is None:
        raise UserError(
            "config.train.init_convert: makes layers from another run's; got "
            f"init_convert={name!r}, init_from=none. Set config.train.init_from."
        )
    feed.check(config)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a config names, built.

    Attributes:
        config: the resolved config.
        feed: the data, and what kind of run it makes.
        model: the model's static description.
        task: what is learned.
        recipe: the static part of the training step.
        mesh: the devices.
        rules: logical axis -> mesh axes.
        sequence_form: how attention is computed where devices share the tokens of a
            row, else None.
    """

    config: dict
    feed: feeds.Feed
    model: Any
    task: Any
    recipe: Recipe
    mesh: Any
    rules: dict
    sequence_form: str | None = None

    @property
    def corpus(self) -> Any:
        """The opened data."""
        return self.feed.corpus

    def placed(self, batch: dict) -> dict:
        """A batch with its arrays as they lie on this host's devices."""
        return self.feed.placed(batch, self.mesh, self.sequence_form)

    @property
    def row_flops(self) -> float:
        """Forward FLOPs of one row of a batch."""
        return self.feed.row_flops(self.model)

    @property
    def train(self) -> TrainConfig:
        """`config.train`."""
        return schema.build(self.feed.train_config, self.config["train"])

    @property
    def eval(self) -> EvalConfig:
        """`config.eval`."""
        return schema.build(self.feed.eval_config, self.config["eval"])

    @property
    def data(self) -> Any:
        """`config.data`, as its source's dataclass."""
        return self.feed.data


def build(config: dict, *, devices=None) -> Experiment:
    """Open the data and describe the model and the task of a resolved config."""
    feed = feeds.make(config)
    mesh = _mesh(feed, devices)
    model = build_model(config, feed.sizes())
    return describe(feed, model, mesh)


def planned(config: dict, *, devices, platform: str, target) -> Experiment:
    """What `build` makes, for other devices and without data where it can be."""
    feed = feeds.make(config)
    mesh = _mesh(feed, devices)
    model = feed.make_model(
        config, feed.planned_sizes(), platform=platform, target=target
    )
    return describe(feed, model, mesh)


def _mesh(feed: feeds.Feed, devices):
    config = feed.config
    mesh = sharding.make_mesh(schema.build(sharding.Config, config["mesh"]), devices)
    train = config["train"]
    sharding.check_batch(train["batch_size"], train["accumulate"], mesh)
    return mesh


def describe(feed: feeds.Feed, model, mesh) -> Experiment:
    """The experiment of a feed's config with its model on a mesh."""
    config = feed.config
    train = schema.build(feed.train_config, config["train"])
    form = feed.sequence_form(model, mesh)
    task = feed.make_task(model, mesh, sequence_form=form)
    recipe = Recipe(
        task=task,
        optim=schema.build(optimizers.Config, config["optim"]),
        steps=train.steps,
        seed=train.seed,
        accumulate=train.accumulate,
    )
    rules = sharding.resolve_rules(config["mesh"]["rules"])
    return Experiment(config, feed, model, task, recipe, mesh, rules, form)


def like(first: Experiment, config: dict) -> Experiment:
    """The experiment of a config that differs from `first`'s in training alone.

    Data, model, task and mesh are shared.
    """
    train = schema.build(first.feed.train_config, config["train"])
    optim = schema.build(optimizers.Config, config["optim"])
    recipe = dataclasses.replace(
        first.recipe,
        optim=optim,
        steps=train.steps,
        seed=train.seed,
        accumulate=train.accumulate,
    )
    return dataclasses.replace(first, config=config, recipe=recipe)


def build_model(config: dict, sizes: Mapping[str, Any]):
    """The model of a resolved config.

    Args:
        config: resolved.
        sizes: what it must know of the data, such as {"vocab_size": V}; the meta of a
            checkpoint holds it.
    """
    return feeds.feed_class(config["model"]).make_model(
        config, sizes, platform=jax.default_backend(), target=None
    )


def build_task(config: dict, model):
    """The task of a resolved config, on one device."""
    return feeds.make(config).make_task(model, None, sequence_form=None)
