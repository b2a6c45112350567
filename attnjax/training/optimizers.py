"""Optimizers and learning-rate schedules, from optax, by config.

Every optimizer is built with a learning rate of 1; the step multiplies its updates
by the schedule's value at the step of the run. A skipped step therefore does not
shift the schedule, and the rate is one scalar that a program may vary.
"""

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from attnjax.core.errors import UserError, unknown
from attnjax.models.layout import Layout, absolute_names, path_of


@dataclasses.dataclass(frozen=True)
class Config:
    """`config.optim`.

    Attributes:
        name: "adamw", "lion", "muon" or "adafactor".
        learning_rate: peak learning rate.
        schedule: "cosine", "wsd" (constant, then linear decay) or "constant", each
            after a linear warm-up.
        warmup_steps: steps of warm-up.
        final_fraction: last learning rate as a fraction of the peak.
        decay_steps: step at which the last rate is reached (none: train.steps).
        decay_fraction: share of the steps that "wsd" spends decaying.
        beta1, beta2, eps: moment decays and epsilon (lion uses the betas; muon's
            momentum is beta1, its AdamW part, with Nesterov momentum, uses all three;
            adafactor has constants of its own and uses none).
        weight_decay: decoupled weight decay, times the learning rate.
        decay_pattern: regular expression of the parameter names that decay, e.g.
            "kernel$" or "layers/00[0-3]/.*kernel$".
        clip_norm: global gradient norm above which gradients are scaled (none: off).
        ema_decay: decay of an average of the parameters used by evaluation (none:
            off).
        freeze: regular expression of parameter names that do not train, e.g.
            "layers/00[0-3]/" or "embedding" (none: everything trains).
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_steps: int | None = None
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_pattern: str = r"(kernel|table)$"
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    freeze: str | None = None


# Settings that may be traced scalars: one program then trains several values of each.
# Those of FLOAT32_ONLY meet moments and averages in the parameters' dtype, which a
# traced float32 would widen.
TRACEABLE = (
    *("learning_rate", "warmup_steps", "final_fraction", "decay_steps"),
    *("decay_fraction", "weight_decay", "clip_norm"),
    *("beta1", "beta2", "eps", "ema_decay"),
)
FLOAT32_ONLY = ("beta1", "beta2", "eps", "ema_decay")


def _adamw(c: Config):
    return optax.adamw(1.0, b1=c.beta1, b2=c.beta2, eps=c.eps, weight_decay=0.0)


def _lion(c: Config):
    return optax.lion(1.0, b1=c.beta1, b2=c.beta2, weight_decay=0.0)


def _muon(c: Config):
    return optax.contrib.muon(
        1.0,
        beta=c.beta1,
        eps=c.eps,
        adam_b1=c.beta1,
        adam_b2=c.beta2,
        muon_weight_dimension_numbers=_matrix_axes,
    )


def _adafactor(_):
    optimizer = optax.adafactor(
        1.0, multiply_by_parameter_scale=False, clipping_threshold=None
    )
    return optax.chain(optimizer, optax.stateless(_clip_by_rms))


def _clip_by_rms(updates, _params):
    """Adafactor's clipping (arXiv 1804.04235, section 6), a layer at a time."""

    def clip(path, u):
        axes = tuple(range(path_of(path)[0] == "layers", u.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=axes, keepdims=True))
        return u / jnp.maximum(1.0, rms)

    return jax.tree_util.tree_map_with_path(clip, updates)


def _matrix_axes(params):
    """Which axes of each array muon orthogonalises: the last two of a kernel."""

    def axes(path, leaf):
        keys = path_of(path)
        if keys[-1] != "kernel" or keys[0] != "layers":
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "muon": _muon, "adafactor": _adafactor}


def check(config: Config) -> None:
    """Raise UserError for values that no optimizer takes; traced ones pass."""
    if config.name not in OPTIMIZERS:
        raise unknown("config.optim.name", "optimizer", config.name, OPTIMIZERS)
    for name, rule, is_good in (
        ("learning_rate", "at least 0", lambda v: v >= 0),
        ("warmup_steps", "at least 0", lambda v: v >= 0),
        ("final_fraction", "in [0, 1]", lambda v: 0 <= v <= 1),
        ("decay_steps", "at least 1", lambda v: v >= 1),
        ("decay_fraction", "in (0, 1]", lambda v: 0 < v <= 1),
        ("beta1", "in [0, 1)", lambda v: 0 <= v < 1),
        ("beta2", "in [0, 1)", lambda v: 0 <= v < 1),
        ("eps", "at least 0", lambda v: v >= 0),
        ("weight_decay", "at least 0", lambda v: v >= 0),
        ("clip_norm", "positive", lambda v: v > 0),
        ("ema_decay", "in [0, 1)", lambda v: 0 <= v < 1),
    ):
        value = getattr(config, name)
        if _is_number(value) and not is_good(value):
            raise UserError(f"config.optim.{name}: must be {rule}; got {value}.")
    for name in ("decay_pattern", "freeze"):
        pattern = getattr(config, name)
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise UserError(
                f"config.optim.{name}: must be a regular expression; got {pattern!r} "
                f"({error})."
            ) from error


def learning_rate(config: Config, steps: int):
    """The schedule: int32 step (0-based) -> float32 learning rate.

    Warm-up is linear from 0 at step 0 to the peak at step warmup_steps.
    """
    peak, warm = config.learning_rate, config.warmup_steps
    last = steps if config.decay_steps is None else config.decay_steps
    floor = peak * config.final_fraction

    def at(step) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        if config.schedule == "cosine":
            share = jnp.clip((step - warm) / _at_least(last - warm, 1), 0.0, 1.0)
            rate = floor + 0.5 * (peak - floor) * (1 + jnp.cos(jnp.pi * share))
        elif config.schedule == "wsd":
            length = _at_least(config.decay_fraction * last, 1.0)
            share = jnp.clip((step - (last - length)) / length, 0.0, 1.0)
            rate = peak + (floor - peak) * share
        else:
            rate = jnp.full_like(step, peak)
        if not (_is_number(warm) and warm == 0):
            rate = jnp.where(step < warm, peak * step / _at_least(warm, 1), rate)
        return rate

    return at


def _is_number(value) -> bool:
    """Whether a setting is known while tracing."""
    return isinstance(value, int | float)


def _at_least(value, floor):
    return max(value, floor) if _is_number(value) else jnp.maximum(value, floor)


def _per_leaf(params, layout: Layout, fn):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(
            path_of(path), absolute_names(path_of(path), layout), leaf
        ),
        params,
    )


def make(config: Config, layout: Layout) -> optax.GradientTransformation:
    """The optimizer (learning rate 1, no clipping: the step clips)."""
    check(config)
    optimizer = OPTIMIZERS[config.name](config)
    if _is_number(config.weight_decay) and not config.weight_decay:
        return optimizer

    def decay(updates, params):
        factors = _chosen("decay_pattern", config.decay_pattern, params, layout)

        def one(u, p, factor):
            if not np.any(factor):
                return u
            return u - (config.weight_decay * factor).astype(u.dtype) * p

        return jax.tree.map(one, updates, params, factors)

    return optax.chain(optimizer, optax.stateless(decay))


def frozen(config: Config, params, layout: Layout) -> dict | None:
    """Per array 1.0 where it trains and 0.0 where it is frozen; None: all train.

    A stacked array gets one factor a layer, shaped to broadcast.
    """
    if config.freeze is None:
        return None
    held = _chosen("freeze", config.freeze, params, layout)
    return jax.tree.map(lambda factor: 1 - factor, held)


def _chosen(option: str, pattern: str, params, layout: Layout):
    """Per array float32 1.0 where `pattern` is found in its name, else 0.0."""
    matches = re.compile(pattern).search

    def factor(path, names, leaf):
        found = np.asarray([matches(name) is not None for name in names], np.float32)
        if path[0] != "layers":
            return found[0]
        return found.reshape((-1,) + (1,) * (leaf.ndim - 1))

    factors = _per_leaf(params, layout, factor)
    if not any(np.any(f) for f in jax.tree.leaves(factors)):
        raise UserError(
            f"config.optim.{option}: matches no parameter; got {pattern!r}. Names "
            'look like "layers/000/mixer/query/kernel" and "token_embedding/table".'
        )
    return factors
