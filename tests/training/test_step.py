"""The step: sums over micro-batches, updates that are not applied, norms, averages."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.models import lm
from attnjax.models.layout import Layout
from attnjax.tasks import language_modelling
from attnjax.training import optimizers, step
from attnjax.training.step import Recipe

B, C = 12, 3
OPTIM = optimizers.Config(
    learning_rate=0.02, schedule="constant", clip_norm=None, weight_decay=0.1
)


class Toy:
    """A two-layer regression that has a model's and a task's interface."""

    layout = Layout.of(["a", "a"])

    def __init__(self, dtype=jnp.float32):
        self.model, self.dtype = self, dtype

    def init(self, seed):
        key = jax.random.key(seed)
        kernel = jax.random.normal(key, (2, C, C), self.dtype)
        table = jnp.ones((C, C), self.dtype)
        params = {
            "token_embedding": {"table": table},
            "layers": {"group_0": {"sub_0": {"mixer": {"kernel": kernel}}}},
        }
        buffers = {
            "mean": jnp.zeros((C,), self.dtype),
            "count": jnp.zeros((), jnp.int32),
        }
        return params, {"layers": buffers, "streams": {}}

    def weight(self, batch):
        return jnp.sum(batch["weights"])

    def loss(self, params, buffers, batch, *, normaliser, prng_key, train):
        assert train
        kernel = params["layers"]["group_0"]["sub_0"]["mixer"]["kernel"]
        x = batch["x"] @ params["token_embedding"]["table"]
        x = jnp.tanh(x @ kernel[0]) @ kernel[1]
        errors = jnp.sum((x - batch["y"]) ** 2, axis=-1)
        loss = jnp.sum(batch["weights"] * errors) / normaliser
        old = buffers["layers"]
        mean = 0.5 * old["mean"] + 0.5 * jnp.mean(batch["x"], axis=0)
        layers = {"mean": mean, "count": old["count"] + 1}
        noise = jax.random.normal(prng_key, dtype=self.dtype)
        return loss, (
            {"loss": loss, "noise": noise / normaliser},
            {"layers": layers, "streams": {}},
        )


def recipe_of(task=None, *, accumulate=1, **optim):
    return Recipe(
        task=task or Toy(),
        optim=dataclasses.replace(OPTIM, **optim),
        steps=20,
        seed=3,
        accumulate=accumulate,
    )


def batches_of(count, dtype=np.float32):
    """Arrays [count, B, ...] with weights that are not equal."""
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(count, B, C)).astype(dtype),
        "y": rng.normal(size=(count, B, C)).astype(dtype),
        "weights": rng.integers(0, 3, (count, B)).astype(dtype),
    }


def run(recipe, batches, state=None, dispatch=None):
    state = step.init_state(recipe) if state is None else state
    dispatch = dispatch or jax.jit(step.make_dispatch(recipe))
    return dispatch(state, batches)


def kernel_of(tree):
    return np.asarray(tree["layers"]["group_0"]["sub_0"]["mixer"]["kernel"])


def assert_same(left, right, **tolerance):
    left, right = jax.tree.flatten(left), jax.tree.flatten(right)
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def split(batches, parts):
    """[K, B, ...] -> [K, A, B / A, ...]."""
    return jax.tree.map(
        lambda a: a.reshape(a.shape[0], parts, -1, *a.shape[2:]), batches
    )


# ---- micro-batches and dispatches


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_micro_batches_add_up_to_the_batch(parts):
    with jax.enable_x64(True):
        batches = batches_of(4, np.float64)
        whole, metrics = run(recipe_of(Toy(jnp.float64)), batches)
        recipe = recipe_of(Toy(jnp.float64), accumulate=parts)
        cut, cut_metrics = run(recipe, split(batches, parts))
        for name in ("params", "opt"):
            assert_same(whole[name], cut[name], rtol=1e-12, atol=1e-12)
        for name in ("loss", "grad_norm", "update_norm"):
            np.testing.assert_allclose(metrics[name], cut_metrics[name], rtol=1e-12)


def test_buffers_are_a_mean_over_micro_batches_updated_once_a_step():
    batches = batches_of(3)
    whole, _ = run(recipe_of(), batches)
    cut, _ = run(recipe_of(accumulate=4), split(batches, 4))
    assert_same(whole["buffers"], cut["buffers"], rtol=1e-6, atol=1e-6)
    assert cut["buffers"]["layers"]["count"] == 3
    assert cut["buffers"]["layers"]["count"].dtype == jnp.int32


def test_micro_batches_draw_from_keys_of_their_own():
    _, metrics = run(recipe_of(accumulate=2), split(batches_of(1), 2))
    weight = batches_of(1)["weights"].sum()
    key = jax.random.fold_in(jax.random.key(4), 0)  # the seed + 1, then the step
    draws = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)]
    np.testing.assert_allclose(metrics["noise"][0], sum(draws) / weight, rtol=1e-5)


@pytest.fixture(scope="module")
def language_model():
    """A small LM with dropout, and six of its batches."""
    options = dict(
        embed_dim=24, num_heads=2, num_layers=2, mlp_dim=32, max_len=8, dropout=0.1
    )
    model = lm.LM(schema.build(lm.Config, lm.resolve(options)), 13)
    task = language_modelling.LanguageModelling(
        language_modelling.Config(), model, use_segments=False
    )
    ids = np.random.default_rng(0).integers(0, 13, (6, 4, 9)).astype(np.int32)
    ones = np.ones((6, 4, 8), np.float32)
    batches = {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "segment_ids": ones.astype(np.int32),
        "positions": np.broadcast_to(np.arange(8, dtype=np.int32), ones.shape),
        "weights": ones,
    }
    return recipe_of(task, ema_decay=0.9, clip_norm=1.0), batches


def in_dispatches(recipe, batches, sizes):
    """Run one dispatch after the other; final state and metrics of all steps."""
    dispatch = jax.jit(step.make_dispatch(recipe), donate_argnums=0)
    state, at, rows = jax.jit(lambda: step.init_state(recipe))(), 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a buffer that cannot be donated warns
        for size in sizes:
            part = jax.tree.map(lambda b, at=at, n=size: b[at : at + n], batches)
            state, metrics = dispatch(state, part)
            rows.append(jax.device_get(metrics))
            at += size
    metrics = jax.tree.map(lambda *m: np.concatenate(m), *rows)
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def one_at_a_time(language_model):
    return in_dispatches(*language_model, [1] * 6)


@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)], ids=str)
def test_steps_in_one_dispatch_equal_steps_alone_bit_for_bit(
    language_model, one_at_a_time, sizes
):
    state, metrics = in_dispatches(*language_model, sizes)
    assert_same(state, one_at_a_time[0])
    assert_same(metrics, one_at_a_time[1])


def test_a_language_model_learns_and_every_metric_is_there(one_at_a_time):
    state, metrics = one_at_a_time
    assert state["step"] == 6
    assert set(metrics) == {
        "loss",
        "grad_norm",
        "param_norm",
        "update_norm",
        "learning_rate",
        "bad_in_row",
    }
    assert all(np.all(np.isfinite(value)) for value in metrics.values())
    assert metrics["loss"][-1] < metrics["loss"][0]


# ---- norms, clipping, averages, freezing, the rate


def test_norms_are_those_of_all_arrays_together():
    recipe = recipe_of(learning_rate=0.02)
    batches = batches_of(1)
    state = step.init_state(recipe)
    new, metrics = run(recipe, batches, state)
    flat = lambda tree: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])  # noqa: E731
    before, after = flat(state["params"]), flat(new["params"])
    np.testing.assert_allclose(
        metrics["param_norm"], [np.linalg.norm(after)], rtol=1e-6
    )
    moved = np.linalg.norm(np.float64(after) - before)
    np.testing.assert_allclose(metrics["update_norm"], [moved], rtol=1e-4)
    first_moment = new["opt"][0][0].mu  # 0.1 of the gradient
    np.testing.assert_allclose(
        metrics["grad_norm"], [np.linalg.norm(flat(first_moment)) / 0.1], rtol=1e-5
    )


def test_clipping_scales_all_gradients_by_one_factor():
    batches = batches_of(1)
    free, metrics = run(recipe_of(), batches)
    clipped, clipped_metrics = run(recipe_of(clip_norm=0.25), batches)
    norm = metrics["grad_norm"][0]
    assert norm > 1.0
    assert clipped_metrics["grad_norm"][0] == norm  # reported before clipping
    expected = jax.tree.map(lambda m: m * 0.25 / norm, free["opt"][0][0].mu)
    assert_same(clipped["opt"][0][0].mu, expected, rtol=1e-5, atol=1e-9)
    loose, _ = run(recipe_of(clip_norm=1e6), batches)
    assert_same(loose["opt"][0][0].mu, free["opt"][0][0].mu, rtol=1e-6)


def test_the_average_is_its_closed_form():
    recipe = recipe_of(ema_decay=0.75)
    batches = batches_of(5)
    state = step.init_state(recipe)
    expected = kernel_of(state["params"])
    dispatch = jax.jit(step.make_dispatch(recipe))
    for i in range(5):
        part = jax.tree.map(lambda b, i=i: b[i : i + 1], batches)
        state, _ = dispatch(state, part)
        expected = 0.75 * expected + 0.25 * kernel_of(state["params"])
        np.testing.assert_allclose(kernel_of(state["ema"]), expected, rtol=1e-5)
    assert "ema" not in step.init_state(recipe_of())


def test_a_frozen_layer_inside_a_stack_does_not_move():
    recipe = recipe_of(freeze="layers/001/|embedding", weight_decay=0.5)
    start = step.init_state(recipe)
    state, metrics = run(recipe, batches_of(3))
    np.testing.assert_array_equal(
        kernel_of(state["params"])[1], kernel_of(start["params"])[1]
    )
    assert_same(state["params"]["token_embedding"], start["params"]["token_embedding"])
    assert np.all(kernel_of(state["params"])[0] != kernel_of(start["params"])[0])
    # Frozen gradients count neither in the norm nor in the moments.
    moment = kernel_of(state["opt"][0][0].mu)
    assert not np.any(moment[1])
    _, free_metrics = run(recipe_of(), batches_of(1))
    assert metrics["grad_norm"][0] < free_metrics["grad_norm"][0]


def test_a_freeze_that_matches_nothing_is_refused_before_the_first_step():
    with pytest.raises(UserError, match="config.optim.freeze: matches no parameter"):
        step.make_step(recipe_of(freeze="layers/7"))


def test_the_rate_is_that_of_the_step():
    recipe = recipe_of(schedule="cosine", warmup_steps=2)
    _, metrics = run(recipe, batches_of(4))
    rate = optimizers.learning_rate(recipe.optim, 20)
    np.testing.assert_allclose(
        metrics["learning_rate"], [rate(i) for i in range(4)], rtol=1e-6
    )
    assert metrics["update_norm"][0] == 0.0


# ---- updates that are not finite


def poisoned(count, bad):
    batches = batches_of(count)
    for i in bad:
        batches["weights"][i, 0] = np.nan
    return batches


def test_a_bad_step_is_counted_and_not_applied_and_the_next_good_one_is():
    recipe = recipe_of(ema_decay=0.5)
    batches = poisoned(6, [1, 2, 4])
    dispatch = jax.jit(step.make_dispatch(recipe))
    state, states = step.init_state(recipe), []
    for i in range(6):
        states.append(state)
        part = jax.tree.map(lambda b, i=i: b[i : i + 1], batches)
        state, metrics = dispatch(state, part)
        health = state["health"]
        is_bad = i in (1, 2, 4)
        kept = [
            np.array_equal(kernel_of(state[name]), kernel_of(states[-1][name]))
            for name in ("params", "ema")
        ]
        assert kept == [is_bad] * 2
        if is_bad:
            for name in ("params", "ema", "opt", "buffers"):
                assert_same(state[name], states[-1][name])
            assert metrics["update_norm"][0] == 0.0
        assert (health["bad_in_row"], health["bad_steps"], health["first_bad"]) == [
            (0, 0, -1),
            (1, 1, 1),
            (2, 2, 1),
            (0, 2, 1),
            (1, 3, 4),
            (0, 3, 4),
        ][i]
        assert metrics["bad_in_row"][0] == health["bad_in_row"]
    assert state["step"] == 6
    assert np.all(np.isfinite(kernel_of(state["params"])))
    # The same in one dispatch.
    together, _ = run(recipe, batches)
    assert_same(together, state, rtol=1e-6)


def test_a_skipped_step_leaves_the_rest_as_if_its_batch_had_not_been_there():
    recipe = recipe_of()  # with a constant rate
    batches = poisoned(3, [1])
    skipped, _ = run(recipe, batches)
    short, _ = run(recipe, jax.tree.map(lambda b: b[[0, 2]], batches))
    for name in ("params", "opt", "buffers"):
        assert_same(skipped[name], short[name], rtol=1e-6)


def test_health_names_the_arrays_of_the_first_bad_step():
    recipe = recipe_of()
    state = step.init_state(recipe)
    # The gradient of the first kernel overflows, that of the last one does not.
    state["params"]["token_embedding"]["table"] *= 0.0
    batches = batches_of(1)
    batches["x"] *= 1e30
    new, _ = run(recipe, batches, state)
    finite = new["health"]["finite"]
    assert not finite["token_embedding"]["table"]
    assert finite["layers"]["group_0"]["sub_0"]["mixer"]["kernel"]
    good, _ = run(recipe, batches_of(1))
    assert all(np.all(f) for f in jax.tree.leaves(good["health"]["finite"]))


def test_infinite_parameters_stop_every_update():
    recipe = recipe_of()
    state = step.init_state(recipe)
    state["params"]["token_embedding"]["table"] = jnp.full((C, C), jnp.inf)
    new, metrics = run(recipe, batches_of(3), state)
    assert new["health"]["bad_in_row"] == 3
    assert new["health"]["first_bad"] == 0
    assert not np.any(np.isfinite(metrics["loss"]))
    assert_same(new["params"], state["params"])


def test_a_finite_gradient_with_an_update_that_is_not_is_not_applied():
    # Without epsilon Adam divides 0 by 0 where a gradient is exactly zero.
    recipe = recipe_of(eps=0.0)
    batches = batches_of(1)
    batches["x"][..., 0] = 0.0
    new, metrics = run(recipe, batches)
    assert np.isfinite(metrics["grad_norm"][0])
    assert new["health"]["bad_steps"] == 1
    assert not new["health"]["finite"]["token_embedding"]["table"]
    assert new["health"]["finite"]["layers"]["group_0"]["sub_0"]["mixer"]["kernel"]
    assert np.all(np.asarray(new["params"]["token_embedding"]["table"]) == 1.0)
