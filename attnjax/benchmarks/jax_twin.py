"""The measured training step written by hand in one file of plain JAX.

It shows what the framework's building, merging and scanning of modules costs: the
same mathematics as the config-built step, a dict of arrays, one scan over the layers,
and the same `kernels.attention`. It has no options.
"""

import jax
import jax.numpy as jnp

from attnjax import kernels
from attnjax.benchmarks.recipe import Recipe

ATTENTION = kernels.AttentionSpec(mask=kernels.Causal())


def layer_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Layer norm without bias over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps) * scale


def times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [B, T, I] times [I, O]; rows merged, so that its gradient is one product."""
    rows = x.reshape(-1, x.shape[-1]) @ matrix
    return rows.reshape(*x.shape[:-1], matrix.shape[-1])


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x)."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def block(x: jax.Array, layer: dict, recipe: Recipe) -> jax.Array:
    """One layer: x [B, T, C] -> [B, T, C]."""
    normed = layer_norm(x, layer["norm_mixer"], recipe.norm_eps)
    split = (*x.shape[:2], recipe.num_heads, -1)
    q, k, v = (
        times(normed, layer[n]).reshape(split) for n in ("query", "key", "value")
    )
    heads = kernels.attention(q, k, v, ATTENTION).reshape(x.shape)
    x = x + times(heads, layer["out"])
    normed = layer_norm(x, layer["norm_mlp"], recipe.norm_eps)
    return x + times(gelu(times(normed, layer["up"])), layer["down"])


def loss(params: dict, ids: jax.Array, recipe: Recipe, *, unroll: int = 1) -> jax.Array:
    """Mean nats a token of ids [B, T + 1]."""
    x = jnp.take(params["tokens"], ids[:, :-1], axis=0)
    places = jnp.broadcast_to(jnp.arange(recipe.seq_len), ids[:, :-1].shape)
    x = x + jnp.take(params["positions"], places, axis=0)

    def body(x, layer):
        return block(x, layer, recipe), None

    policy = jax.checkpoint_policies.dots_saveable
    body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    x, _ = jax.lax.scan(body, x, params["layers"], unroll=unroll)
    x = layer_norm(x, params["final_norm"], recipe.norm_eps)
    logits = times(x, params["tokens"].T)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(log_sum - chosen) / chosen.size


def learning_rate(recipe: Recipe, step: jax.Array) -> jax.Array:
    """Linear warm-up, then a cosine."""
    step = step.astype(jnp.float32)
    length = max(recipe.steps - recipe.warmup_steps, 1)
    share = (step - recipe.warmup_steps) / length
    floor = recipe.learning_rate * recipe.final_fraction
    wave = 1 + jnp.cos(jnp.pi * jnp.clip(share, 0.0, 1.0))
    rate = floor + 0.5 * (recipe.learning_rate - floor) * wave
    if not recipe.warmup_steps:
        return rate
    rising = recipe.learning_rate * step / recipe.warmup_steps
    return jnp.where(step < recipe.warmup_steps, rising, rate)


def init_state(params: dict) -> dict:
    """The state before the first step, from the recipe's weights."""
    params = jax.tree.map(jnp.array, params)
    return {
        "params": params,
        "first": jax.tree.map(jnp.zeros_like, params),
        "second": jax.tree.map(jnp.zeros_like, params),
        "step": jnp.zeros((), jnp.int32),
    }


def decays(path, _) -> bool:
    """Whether AdamW shrinks the parameter: everything but the norms' scales."""
    return "norm" not in path[-1].key


def make_step(recipe: Recipe, *, unroll: int = 1):
    """(state, ids [B, T + 1]) -> (state, metrics), to be jitted with state donated.

    Like the framework's step it measures the norms of gradient, parameters and
    update; unlike it, it has no guard against updates that are not finite.
    """

    def step(state: dict, ids: jax.Array) -> tuple[dict, dict]:
        params = state["params"]
        value, grads = jax.value_and_grad(loss)(params, ids, recipe, unroll=unroll)
        norm = global_norm(grads)
        factor = jnp.minimum(1.0, recipe.clip_norm / (norm + 1e-6))
        rate = learning_rate(recipe, state["step"])
        count = (state["step"] + 1).astype(jnp.float32)
        bias1, bias2 = 1 - recipe.beta1**count, 1 - recipe.beta2**count

        def update(path, p, g, m, v):
            g = g * factor
            m = (1 - recipe.beta1) * g + recipe.beta1 * m
            v = (1 - recipe.beta2) * g * g + recipe.beta2 * v
            u = (m / bias1) / (jnp.sqrt(v / bias2) + recipe.eps)
            if decays(path, p):
                u = u + recipe.weight_decay * p
            return -rate * u, m, v

        new = jax.tree_util.tree_map_with_path(
            update, params, grads, state["first"], state["second"]
        )
        updates, first, second = (_pick(new, i) for i in range(3))
        new_params = jax.tree.map(jnp.add, params, updates)
        new_state = {
            "params": new_params,
            "first": first,
            "second": second,
            "step": state["step"] + 1,
        }
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "param_norm": global_norm(new_params),
            "update_norm": global_norm(updates),
            "learning_rate": rate,
        }
        return new_state, metrics

    return step


def global_norm(tree) -> jax.Array:
    """Square root of the sum of squares of every entry."""
    return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))


def _pick(tree, index: int):
    is_triple = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda triple: triple[index], tree, is_leaf=is_triple)
