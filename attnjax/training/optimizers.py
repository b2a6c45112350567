"""Optimizers and learning-rate schedules, from optax, by config.

Every optimizer is built with a learning rate of 1; the step multiplies its updates
by the schedule's value at the step of the run. A skipped step therefore does not
shift the schedule, and the rate is one scalar that a program may vary.
"""

import dataclasses
import math
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
            momentum is beta1, its AdamW part uses all three).
        weight_decay: decoupled weight decay, times the learning rate.
        decay_pattern: regular expression of the parameter names that decay.
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


def _adamw(c: Config, mask, _matrices):
    return optax.adamw(
        1.0, b1=c.beta1, b2=c.beta2, eps=c.eps, weight_decay=c.weight_decay, mask=mask
    )


def _lion(c: Config, mask, _matrices):
    return optax.lion(
        1.0, b1=c.beta1, b2=c.beta2, weight_decay=c.weight_decay, mask=mask
    )


def _muon(c: Config, mask, matrices):
    return optax.contrib.muon(
        1.0,
        beta=c.beta1,
        eps=c.eps,
        weight_decay=c.weight_decay,
        weight_decay_mask=mask,
        adam_b1=c.beta1,
        adam_b2=c.beta2,
        adam_weight_decay=c.weight_decay,
        muon_weight_dimension_numbers=matrices,
    )


def _adafactor(c: Config, mask, _matrices):
    return optax.adafactor(
        1.0,
        decay_rate=0.8,
        multiply_by_parameter_scale=False,
        weight_decay_rate=c.weight_decay or None,
        weight_decay_mask=mask,
    )


OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "muon": _muon, "adafactor": _adafactor}


def check(config: Config) -> None:
    """Raise UserError for values that no optimizer takes."""
    if config.name not in OPTIMIZERS:
        raise unknown("config.optim.name", "optimizer", config.name, OPTIMIZERS)
    if config.learning_rate < 0 or not math.isfinite(config.learning_rate):
        raise UserError(
            "config.optim.learning_rate: must be finite and not negative; got "
            f"{config.learning_rate}."
        )
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
    last = config.decay_steps or steps
    floor = peak * config.final_fraction

    def at(step) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        if config.schedule == "cosine":
            share = jnp.clip((step - warm) / max(last - warm, 1), 0.0, 1.0)
            rate = floor + 0.5 * (peak - floor) * (1 + jnp.cos(jnp.pi * share))
        elif config.schedule == "wsd":
            length = max(config.decay_fraction * last, 1.0)
            share = jnp.clip((step - (last - length)) / length, 0.0, 1.0)
            rate = peak + (floor - peak) * share
        else:
            rate = jnp.full_like(step, peak)
        if warm:
            rate = jnp.where(step < warm, peak * step / warm, rate)
        return rate

    return at


def _per_leaf(params, layout: Layout, fn):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(
            path_of(path), absolute_names(path_of(path), layout), leaf
        ),
        params,
    )


def _matrix_axes(params):
    """Which axes of each array muon orthogonalises: the last two of a kernel."""

    def axes(path, leaf):
        keys = path_of(path)
        if keys[-1] != "kernel" or keys[0] != "layers":
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def make(config: Config, layout: Layout) -> optax.GradientTransformation:
    """The optimizer (learning rate 1, no clipping: the step clips)."""
    check(config)
    pattern = re.compile(config.decay_pattern)

    def mask(params):
        return _per_leaf(
            params, layout, lambda _, names, __: pattern.search(names[0]) is not None
        )

    return OPTIMIZERS[config.name](config, mask, _matrix_axes)


def frozen(config: Config, params, layout: Layout) -> dict | None:
    """Per array 1.0 where it trains and 0.0 where it is frozen; None: all train.

    A stacked array gets one factor a layer, shaped to broadcast.
    """
    if config.freeze is None:
        return None
    pattern = re.compile(config.freeze)
    matched = []

    def factor(path, names, leaf):
        held = [pattern.search(name) is not None for name in names]
        matched.extend(
            name for name, is_held in zip(names, held, strict=True) if is_held
        )
        trains = 1.0 - np.asarray(held, np.float32)
        if path[0] != "layers":
            return trains[0]
        return trains.reshape((-1,) + (1,) * (leaf.ndim - 1))

    factors = _per_leaf(params, layout, factor)
    if not matched:
        raise UserError(
            f"config.optim.freeze: matches no parameter; got {config.freeze!r}. Names "
            'look like "layers/000/mixer/query/kernel" and "token_embedding/table".'
        )
    return factors
