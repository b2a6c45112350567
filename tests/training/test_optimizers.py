"""Learning rates against closed forms, every optimizer, decay and freezing by name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from attnjax.core.errors import UserError
from attnjax.models.layout import Layout
from attnjax.training import optimizers
from attnjax.training.optimizers import Config

LAYOUT = Layout.of(["a", "b", "a", "b"])  # one group of two places, two repeats


def params_of():
    """A tree like a model's: two kernels and a scale a layer, and both ends."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def place():
        return {
            "mixer": {"query": {"kernel": normal(2, 5, 7), "bias": normal(2, 7)}},
            "norm_mixer": {"scale": normal(2, 5)},
        }

    return {
        "token_embedding": {"table": normal(11, 5)},
        "final_norm": {"scale": normal(5)},
        "layers": {"group_0": {"sub_0": place(), "sub_1": place()}},
    }


def update(config, grads=None, steps=1):
    """The sum of the updates of some steps from `params_of`."""
    params = params_of()
    optimizer = optimizers.make(config, LAYOUT)
    grads = params_of() if grads is None else grads

    @jax.jit
    def run(params):
        state, start = optimizer.init(params), params
        for _ in range(steps):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(jnp.subtract, params, start)

    return run(params)


def rates(config, steps, at):
    rate = jax.jit(optimizers.learning_rate(config, steps))
    return [float(rate(step)) for step in at]


# ---- schedules


def test_cosine_falls_from_the_peak_to_its_floor():
    config = Config(learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    got = rates(config, 110, [10, 35, 60, 110, 500])
    quarter = 0.2 + 0.5 * 1.8 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(got, [2.0, quarter, 1.1, 0.2, 0.2], rtol=1e-6)


def test_wsd_is_flat_then_falls_in_a_line():
    config = Config(
        learning_rate=2.0, schedule="wsd", decay_fraction=0.2, final_fraction=0.5
    )
    got = rates(config, 100, [0, 40, 80, 90, 100, 200])
    np.testing.assert_allclose(got, [2.0, 2.0, 2.0, 1.5, 1.0, 1.0], rtol=1e-6)


def test_constant_stays():
    config = Config(learning_rate=2.0, schedule="constant")
    assert rates(config, 100, [0, 50, 100, 1000]) == [2.0] * 4


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_a_line_from_zero_to_the_peak(schedule):
    config = Config(learning_rate=2.0, schedule=schedule, warmup_steps=8)
    got = rates(config, 1000, [0, 1, 4, 8])
    np.testing.assert_allclose(got, [0.0, 0.25, 1.0, 2.0], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_decay_steps_replace_the_length_of_the_run(schedule):
    config = Config(learning_rate=2.0, schedule=schedule, decay_steps=50)
    assert rates(config, 1000, [50, 60]) == pytest.approx([0.2, 0.2])


# ---- optimizers


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_optimizer_lowers_the_loss_of_a_small_problem(name):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(64, 5)), rng.normal(size=(64, 7))
    config = Config(name=name, weight_decay=0.01)
    optimizer = optimizers.make(config, LAYOUT)
    start = jax.tree.map(jnp.zeros_like, params_of())

    def loss(params):
        subs = params["layers"]["group_0"].values()
        out = sum(
            x @ sub["mixer"]["query"]["kernel"][i] + sub["mixer"]["query"]["bias"][i]
            for sub in subs
            for i in range(2)
        )
        return jnp.mean((out - y) ** 2) + jnp.mean(params["final_norm"]["scale"] ** 2)

    @jax.jit
    def train(params):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            updates = jax.tree.map(lambda u: 0.01 * u, updates)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, optimizer.init(params)), length=60)[1]

    losses = train(start)
    assert losses[-1] < losses[0] - 0.05
    assert np.all(np.isfinite(losses))


def test_adamw_is_optax_with_the_mask():
    config = Config(name="adamw", beta2=0.9, eps=1e-6, weight_decay=0.3)
    names = {"kernel", "table"}
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in names, params_of()
    )
    theirs = optax.adamw(1.0, b1=0.9, b2=0.9, eps=1e-6, weight_decay=0.3, mask=mask)
    params = params_of()
    expected, _ = theirs.update(params, theirs.init(params), params)
    got = update(config)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_each_layer_of_a_stack_on_its_own():
    config = Config(name="muon", weight_decay=0.0)
    got = update(config, steps=2)
    optimizer = optax.contrib.muon(1.0, beta=0.9, adam_b1=0.9, adam_b2=0.95)
    for sub in ("sub_0", "sub_1"):
        for layer in range(2):
            kernel = params_of()["layers"]["group_0"][sub]["mixer"]["query"]["kernel"]
            kernel = {"kernel": kernel[layer]}
            state, total = optimizer.init(kernel), 0.0
            for _ in range(2):
                updates, state = optimizer.update(kernel, state, kernel)
                total = total + updates["kernel"]
            mine = got["layers"]["group_0"][sub]["mixer"]["query"]["kernel"][layer]
            np.testing.assert_allclose(mine, total, rtol=1e-3, atol=1e-4)
            values = np.linalg.svd(np.asarray(mine) / 2, compute_uv=False)
            scale = math.sqrt(7 / 5)  # fan out / fan in
            assert np.all((values > 0.6 * scale) & (values < 1.3 * scale))


def test_muon_leaves_tables_and_scales_to_adam():
    got = update(Config(name="muon", weight_decay=0.0))
    adam = optax.nadamw(1.0, b1=0.9, b2=0.95, weight_decay=0.0)
    params = params_of()
    expected, _ = adam.update(params, adam.init(params), params)
    for name, leaf in (("token_embedding", "table"), ("final_norm", "scale")):
        np.testing.assert_allclose(got[name][leaf], expected[name][leaf], rtol=1e-4)


def test_adafactor_clips_a_layer_at_a_time():
    grads = params_of()
    kernel = grads["layers"]["group_0"]["sub_0"]["mixer"]["query"]["kernel"]
    config = Config(name="adafactor", weight_decay=0.0)

    def second(factor):
        """The second update after one of `factor` less: larger than 1 is clipped."""
        params, optimizer = params_of(), optimizers.make(config, LAYOUT)
        state = optimizer.init(params)
        first = jax.tree.map(jnp.array, grads)
        first["layers"]["group_0"]["sub_0"]["mixer"]["query"]["kernel"] = (
            kernel * jnp.asarray(factor)[:, None, None]
        )
        _, state = optimizer.update(first, state, params)
        updates, _ = optimizer.update(grads, state, params)
        return updates["layers"]["group_0"]["sub_0"]["mixer"]["query"]["kernel"]

    alone, beside = second([1.0, 1.0]), second([1.0, 1e-3])
    np.testing.assert_allclose(alone[0], beside[0], rtol=1e-6)
    assert np.sqrt(np.mean(np.square(beside[1]))) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_numbers_may_be_traced_and_differ_in_one_program(name):
    traced = {"beta1": (0.9, 0.7), "beta2": (0.95, 0.8), "eps": (1e-8, 0.3)}
    traced["weight_decay"] = (0.1, 0.4)
    fixed = Config(name=name)

    def one(values):
        return update(dataclasses.replace(fixed, **values), steps=2)

    every = jax.vmap(one)({key: jnp.asarray(v) for key, v in traced.items()})
    for index in range(2):
        alone = one({key: value[index] for key, value in traced.items()})
        for a, b in zip(jax.tree.leaves(every), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[index], b, rtol=1e-4, atol=1e-5)
    both = jax.tree.leaves(every)
    assert all(np.abs(a[0] - a[1]).max() > 1e-3 for a in both if a.ndim > 3)


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_weight_decay_is_decoupled_and_reaches_the_named_arrays_alone(name):
    without = update(Config(name=name, weight_decay=0.0))
    decayed = update(Config(name=name, weight_decay=0.25))
    moved = jax.tree.map(jnp.subtract, decayed, without)

    def check(path, difference, value):
        expected = -0.25 * value if path[-1].key in ("kernel", "table") else 0 * value
        np.testing.assert_allclose(difference, expected, atol=2e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, moved, params_of())


def test_decay_can_choose_layers_inside_a_stack():
    config = Config(weight_decay=0.25, decay_pattern=r"layers/00[03]/.*kernel$")
    without = update(dataclasses.replace(config, weight_decay=0.0))
    moved = jax.tree.map(jnp.subtract, update(config), without)
    params = params_of()["layers"]["group_0"]
    for sub, decays in (("sub_0", [1, 0]), ("sub_1", [0, 1])):
        got = moved["layers"]["group_0"][sub]["mixer"]["query"]["kernel"]
        kernel = params[sub]["mixer"]["query"]["kernel"]
        expected = -0.25 * np.reshape(decays, (2, 1, 1)) * kernel
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.any(moved["token_embedding"]["table"])


# ---- freezing


def test_nothing_is_frozen_unless_asked():
    assert optimizers.frozen(Config(), params_of(), LAYOUT) is None


def test_freezing_chooses_layers_inside_a_stack():
    config = Config(freeze=r"layers/00[01]/|embedding")
    factors = optimizers.frozen(config, params_of(), LAYOUT)
    assert factors["token_embedding"]["table"] == 0.0
    assert factors["final_norm"]["scale"] == 1.0
    for sub in ("sub_0", "sub_1"):
        kernel = factors["layers"]["group_0"][sub]["mixer"]["query"]["kernel"]
        assert kernel.shape == (2, 1, 1)
        np.testing.assert_array_equal(kernel.ravel(), [0.0, 1.0])


@pytest.mark.parametrize("option", ["freeze", "decay_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    config = Config(**{option: "layer_0"})
    with pytest.raises(
        UserError, match=f"config.optim.{option}: matches no parameter; got 'layer_0'"
    ):
        optimizers.frozen(config, params_of(), LAYOUT)
        update(config)


# ---- refusals


def test_an_unknown_optimizer_lists_the_nearest():
    with pytest.raises(UserError, match=r"unknown optimizer 'adamv'. Did you mean ada"):
        optimizers.check(Config(name="adamv"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("warmup_steps", -1),
        ("final_fraction", 1.5),
        ("decay_steps", 0),
        ("decay_fraction", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("ema_decay", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused(name, value):
    with pytest.raises(
        UserError, match=rf"config\.optim\.{name}: must be .*; got {value}\."
    ):
        optimizers.check(Config(**{name: value}))


@pytest.mark.parametrize("name", ["freeze", "decay_pattern"])
def test_a_pattern_that_is_none_is_refused(name):
    with pytest.raises(
        UserError, match=rf"{name}: must be a regular expression; got '\['"
    ):
        optimizers.check(Config(**{name: "["}))
