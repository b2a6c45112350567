"""Which heads a guiding pass perturbs: how they are told, found, and moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers.slots import blending
from attnjax.models import dit
from attnjax.tasks.denoising import perturbing

SMALL = dict(embed_dim=12, num_heads=3, num_layers=3, patch_size=2, mlp_dim=8)


def make(**options):
    config = schema.build(dit.Config, dit.resolve({**SMALL, **options}))
    return dit.DiT(config, image_size=4, channels=1, out_channels=1, num_classes=2)


def start(model):
    rng = np.random.default_rng(0)
    params, buffers = jax.eval_shape(model.init, 0)
    params = jax.tree.map(
        lambda a: (0.4 * rng.normal(size=a.shape)).astype(np.float32), params
    )
    return params, buffers


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", None),
        ("3:all", {3: None}),
        ("2:0,1; 3:all", {2: (0, 1), 3: None}),
        ("0: 5 , 2", {0: (5, 2)}),
    ],
)
def test_texts_name_layers_and_their_heads(text, chosen):
    assert perturbing.parse(text) == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "must be 'all' or layers with their heads, as '2:0,1;3:all'; got '2'"),
        ("2:a", "got '2:a'"),
        ("", "got ''"),
        ("1:0;1:2", "names layer 1 twice"),
        ("1:0,0", "names a head of layer 1 twice"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        perturbing.parse(text)
    with pytest.raises(UserError, match="perturb: .*" + message):
        perturbing.choose(make(), target="identity", heads=text)


def test_pairs_are_written_as_they_are_read():
    pairs = [(2, 1), (0, 3), (2, 0)]
    assert perturbing.text_of(pairs) == "0:3;2:0,1"
    found = perturbing.choose(
        make(), target="identity", heads=perturbing.text_of([(2, 1), (2, 0)])
    )
    assert found[1] == ((2, 0), (2, 1)) and found[0].sites == ((2, 3),)


def test_an_array_of_layers_and_heads_moves_what_named_heads_move():
    model = make()
    arrays = start(model)
    found, pairs = perturbing.choose(model, target="identity", heads="0:2;2:all")
    every, _ = perturbing.choose(model, target="identity", heads="all")
    assert every.pairs() == tuple((i, h) for i in range(3) for h in range(3))
    images = np.random.default_rng(1).normal(size=(1, 4, 4, 1)).astype(np.float32)
    inputs = (images, np.float32([300.0]), np.int32([1]))

    @jax.jit
    def run(shares):
        ctx = every.context(model.context(batch=1), shares)
        return model.predict(*arrays, *inputs, ctx)[0]

    @jax.jit
    def by_name(operands):
        hooks = tuple(
            Hook(n, "weights", layers=(i,), heads=h, action="blend_identity")
            for n, i, h in (("a", 0, (2,)), ("b", 2, None))
        )
        ctx = model.context(batch=1).replace(hooks=hooks, interventions=operands)
        return model.predict(*arrays, *inputs, ctx)[0]

    shares = found.shares(pairs, 0.5)
    np.testing.assert_array_equal(shares, every.shares(pairs, 0.5))
    expected = by_name({"a": jnp.float32(0.5), "b": jnp.float32(0.5)})
    np.testing.assert_allclose(run(shares), expected, atol=1e-5, rtol=1e-4)
    plain = by_name({"a": jnp.float32(0), "b": jnp.float32(0)})
    np.testing.assert_allclose(run(0 * shares), plain, atol=1e-5, rtol=1e-4)
    assert np.abs(expected - plain).max() > 1e-3


def test_layers_with_other_numbers_of_heads_have_their_own():
    mixers = {"few": {"type": "attention", "num_heads": 2}}
    model = make(layers="attention few", num_layers=None, mixers=mixers)
    found, pairs = perturbing.choose(model, target="uniform", heads="all")
    assert found.sites == ((0, 3), (1, 2)) and len(pairs) == 5
    assert found.shares(pairs, 1.0).tolist() == [[1, 1, 1], [1, 1, 0]]


def test_targets_are_those_of_the_hooks_and_the_rest_is_left_as_it_is():
    assert perturbing.TARGETS == blending.TARGETS
    made, _ = perturbing.choose(make(), target="temperature", heads="1:2")
    assert made.action == blending.TEMPERATURE
    assert made.unmoved().tolist() == [[1, 1, 1]] * 3
    numbers = made.shares([(1, 2)], 0.5)
    assert numbers.tolist() == [[1, 1, 1], [1, 1, 0.5], [1, 1, 1]]
    curve, _ = perturbing.choose(make(), target="slerp", heads="all")
    assert not curve.unmoved().any()


@pytest.mark.parametrize(
    ("options", "choice", "message"),
    [
        ({}, {"heads": "3:0"}, r"layers must be in 0..2; got layer 3"),
        ({}, {"heads": "1:3"}, r"\{1: 3\} \(layer: heads\); got layer 1, head 3"),
        ({}, {"target": "slurp"}, "unknown target 'slurp'. Did you mean slerp"),
        (
            {},
            {"target": "image_identity"},
            "text and image in one row; .*config.model.name=dit. Use identity",
        ),
        (
            {"layers": "linear_attention"},
            {"target": "uniform"},
            "needs a mechanism that tells which keys",
        ),
        ({"layers": "gaam"}, {}, r"layer 0 \(gaam\) has no weights of heads"),
    ],
    ids=["layer", "head", "target", "no text", "mean without a mask", "no heads"],
)
def test_what_a_model_has_not_is_refused(options, choice, message):
    with pytest.raises(UserError, match=message):
        perturbing.choose(
            make(**options), **({"target": "identity", "heads": "all"} | choice)
        )


def test_no_heads_and_arrays_of_another_depth_are_refused():
    model = make()
    made, _ = perturbing.choose(model, target="identity", heads="all")
    with pytest.raises(UserError, match="at least one head must be chosen; got none"):
        made.shares((), 1.0)
    short = made.shares(made.pairs(), 1.0)[:2]
    with pytest.raises(UserError, match=r"needs 3 rows, one a layer.*\(2, 3\)"):
        perturbing._trace(model, lambda ctx: made.context(ctx, jnp.asarray(short)))
