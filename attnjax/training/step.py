"""The training step: a pure function of (state, batches), with donated state.

State is a dict of plain arrays:
    params, opt, buffers    as the model and the optimizer made them
    ema                     average of params, where config.optim.ema_decay is set
    step                    int32, the next step to run
    health                  "bad_steps" int32, how many updates were not applied;
                            "bad_in_row" int32, how many of the latest; "first_bad"
                            int32, the first of the latest row or -1; "finite" bool per
                            array of params: whether its gradient and its update were
                            at that first bad step
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnjax.training import optimizers


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything static that the step needs.

    Attributes:
        task: has `weight(batch)` and `loss(...)`.
        optim: `config.optim`.
        steps: train.steps, for the schedule.
        seed: train.seed: all randomness is a function of it and the step.
        accumulate: micro-batches a step.
    """

    task: Any
    optim: optimizers.Config
    steps: int
    seed: int
    accumulate: int = 1


def init_state(recipe: Recipe) -> dict:
    """The state before step 0; call it under jax.jit."""
    model = recipe.task.model
    params, buffers = model.init(recipe.seed)
    optimizer = optimizers.make(recipe.optim, model.layout)
    state = {
        "params": params,
        "opt": optimizer.init(params),
        "buffers": buffers,
        "step": jnp.zeros((), jnp.int32),
        "health": {
            "bad_steps": jnp.zeros((), jnp.int32),
            "bad_in_row": jnp.zeros((), jnp.int32),
            "first_bad": jnp.full((), -1, jnp.int32),
            "finite": jax.tree.map(lambda _: jnp.ones((), bool), params),
        },
    }
    if recipe.optim.ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_step(recipe: Recipe):
    """(state, batch of one step) -> (state, metrics): pure, for jit and scan.

    Batch arrays are [B, T], or [A, B / A, T] with A = recipe.accumulate > 1.
    """
    model = recipe.task.model
    optimizer = optimizers.make(recipe.optim, model.layout)
    rate_at = optimizers.learning_rate(recipe.optim, recipe.steps)
    abstract = jax.eval_shape(model.init, recipe.seed)[0]
    trains = optimizers.frozen(recipe.optim, abstract, model.layout)

    def step(state: dict, batch: dict) -> tuple[dict, dict]:
        prng_key = jax.random.fold_in(jax.random.key(recipe.seed + 1), state["step"])
        grads, metrics, buffers = _gradients(recipe, state, batch, prng_key)
        if trains is not None:
            grads = _scale(grads, trains)
        squares = _squares(grads)
        norm = _root(squares)
        if recipe.optim.clip_norm is not None:
            factor = jnp.minimum(1.0, recipe.optim.clip_norm / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        rate = rate_at(state["step"])
        updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
        if trains is not None:
            updates = _scale(updates, trains)
        params = optax.apply_updates(state["params"], updates)
        moved = _squares(updates)
        # Finite gradients can still give an update that is not (0 / 0 in Adam).
        finite = jax.tree.map(
            lambda g, u: jnp.isfinite(g) & jnp.isfinite(u), squares, moved
        )
        is_good = jnp.isfinite(metrics["loss"])
        is_good &= jnp.all(jnp.stack(jax.tree.leaves(finite)))

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(is_good, n, o), new, old)

        new = {
            "params": keep(params, state["params"]),
            "opt": keep(opt, state["opt"]),
            "buffers": keep(buffers, state["buffers"]),
            "step": state["step"] + 1,
            "health": _health(state, finite, is_good),
        }
        if "ema" in state:
            ema = _average(state["ema"], params, recipe.optim.ema_decay)
            new["ema"] = keep(ema, state["ema"])
        metrics |= {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(new["params"]),
            "update_norm": jnp.where(is_good, optax.tree.norm(updates), 0.0),
            "learning_rate": rate,
            "bad_in_row": new["health"]["bad_in_row"],
        }
        return new, metrics

    return step


def make_dispatch(recipe: Recipe):
    """(state, batches [K, ...]) -> (state, metrics [K]): K steps in one program.

    On the CPU the results do not depend on K, bit for bit.
    """
    return _over_steps(make_step(recipe))


def vary(recipe: Recipe, values: dict) -> Recipe:
    """`recipe` with "seed" and settings of `optim` replaced, by traced scalars too."""
    optim = {name: value for name, value in values.items() if name != "seed"}
    return dataclasses.replace(
        recipe,
        optim=dataclasses.replace(recipe.optim, **optim),
        seed=values.get("seed", recipe.seed),
    )


def make_group_dispatch(recipe: Recipe, values: dict):
    """`make_dispatch` for N runs at once that differ in `values`.

    Args:
        recipe: what the runs have in common.
        values: "seed" and names of `optimizers.TRACEABLE` -> numpy [N].

    Returns:
        (state [N, ...], batches [K, N, ...]) -> (state, metrics [K, N]).
    """

    def one(values: dict, state: dict, batch: dict) -> tuple[dict, dict]:
        return make_step(vary(recipe, values))(state, batch)

    return _over_steps(partial(jax.vmap(one), values))


def _over_steps(step):
    """A dispatch from a step."""
    step = jax.jit(step)  # a jit of its own: traced once for every use

    def dispatch(state: dict, batches: dict) -> tuple[dict, dict]:
        return jax.lax.platform_dependent(
            state,
            batches,
            cpu=partial(_dynamic_loop, step),
            default=partial(jax.lax.scan, step),
        )

    return dispatch


def _dynamic_loop(step, state: dict, batches: dict) -> tuple[dict, dict]:
    """A scan of `step` whose numbers are those of any other number of batches.

    XLA inlines a loop of known length 1, and a cut from an array of length 1 is none;
    either way sums are fused, hence rounded, otherwise than in a longer loop. So the
    length is made to look dynamic, and a single batch is stored twice. Accelerators,
    which read a dynamic length back to the host before each turn, take the scan.
    """
    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 1:
        batches = jax.tree.map(lambda b: jnp.concatenate([b, b]), batches)

    def batch(index):
        return jax.tree.map(
            lambda b: jax.lax.dynamic_index_in_dim(b, index, keepdims=False), batches
        )

    def body(index, carry):
        state, rows = carry
        state, row = step(state, batch(index))
        return state, jax.tree.map(lambda r, value: r.at[index].set(value), rows, row)

    _, row = jax.eval_shape(step, state, jax.eval_shape(batch, 0))
    room = max(count, 2)
    rows = jax.tree.map(lambda r: jnp.zeros((room, *r.shape), r.dtype), row)
    dynamic = jnp.where(jnp.all(state["step"] >= 0), count, 0)  # never negative
    state, rows = jax.lax.fori_loop(0, dynamic, body, (state, rows))
    return state, jax.tree.map(lambda r: r[:count], rows)


def _gradients(recipe: Recipe, state: dict, batch: dict, prng_key):
    """(gradients, metrics, new buffers) of the mean loss of the whole batch."""
    task = recipe.task

    def loss(params, micro, key, normaliser):
        return task.loss(
            params,
            state["buffers"],
            micro,
            normaliser=normaliser,
            prng_key=key,
            train=True,
        )

    gradient = jax.value_and_grad(loss, has_aux=True)
    normaliser = jnp.maximum(task.weight(batch), 1.0)
    if recipe.accumulate == 1:
        (_, (metrics, buffers)), grads = gradient(
            state["params"], batch, prng_key, normaliser
        )
        return grads, metrics, buffers

    def one(index, micro):
        key = jax.random.fold_in(prng_key, index)
        (_, aux), grads = gradient(state["params"], micro, key, normaliser)
        return grads, aux

    def body(carry, xs):
        return jax.tree.map(jnp.add, carry, one(*xs)), None

    indices = jnp.arange(recipe.accumulate)
    first = jax.tree.map(lambda b: b[0], batch)
    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, indices[0], first)
    )
    (grads, (metrics, buffers)), _ = jax.lax.scan(body, zero, (indices, batch))
    buffers = jax.tree.map(
        lambda b: (
            b / recipe.accumulate
            if jnp.issubdtype(b.dtype, jnp.floating)
            else b // recipe.accumulate
        ),
        buffers,
    )
    return grads, metrics, buffers


def _scale(tree, factors):
    return jax.tree.map(lambda a, f: a * jnp.asarray(f, a.dtype), tree, factors)


def _squares(tree):
    """The sum of squares of each array, float32 or wider."""
    return jax.tree.map(
        lambda a: jnp.sum(
            jnp.square(a.astype(jnp.promote_types(a.dtype, jnp.float32)))
        ),
        tree,
    )


def _root(squares) -> jax.Array:
    """The norm of a whole tree from its `_squares`."""
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def _average(ema, params, decay: float):
    return jax.tree.map(
        lambda e, p: e + (1.0 - decay) * (p - e).astype(e.dtype), ema, params
    )


def _health(state: dict, finite, is_good) -> dict:
    old = state["health"]
    starts = ~is_good & (old["bad_in_row"] == 0)
    return {
        "bad_steps": old["bad_steps"] + ~is_good,
        "bad_in_row": jnp.where(is_good, 0, old["bad_in_row"] + 1),
        "first_bad": jnp.where(starts, state["step"], old["first_bad"]),
        "finite": jax.tree.map(
            lambda now, was: jnp.where(starts, now, was), finite, old["finite"]
        ),
    }
