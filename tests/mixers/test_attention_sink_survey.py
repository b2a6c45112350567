"""Facts of the weight maps of the attention-sink survey (arXiv 2604.10098)."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_layers import DIMS, ROPE, H, call, close, context, inputs, make, run
from flax import nnx

from attnjax import kernels
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention
from attnjax.mixers import attention_sink_survey as survey

NAME = "attention_sink_survey"
SCORES = np.random.default_rng(3).normal(size=(3, 5)) * 2


def weights_of(scores, sink=None, **options):
    """Weights [T, S] of scores [T, S] of one head, made by the kernels."""
    scores = np.asarray(scores, np.float32)
    slot = survey.Slot(
        survey.Config(**options),
        survey.Heads(1, 1, scores.shape[1], scores.shape[1]),
        DIMS,
        rngs=nnx.Rngs(0),
    )
    if sink is not None:
        slot.sink[...] = jnp.full((1,), sink)
    spec, operands = slot.attend(None, kernels.AttentionSpec(scale=1.0), {}, None)
    eye = np.eye(scores.shape[1], dtype=np.float32)[None, :, None]
    out = kernels.attention(scores[None, :, None], eye, eye, spec, operands)
    return np.asarray(out)[0, :, 0]


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer(dims=DIMS, more=(), **options):
    return make({"output": ({"type": NAME, **options}, *more)}, dims)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_map": "off_by_one"},
        {"weight_map": "sink_logit"},
        {"weight_map": "clipped", "low": -0.2, "high": 1.1},
        {"weight_map": "softpick"},
        {"weight_map": "sigmoid", "bias": -1.5},
    ],
    ids=lambda options: options["weight_map"],
)
def test_weights_are_those_of_the_formula(options):
    sink = 0.7 if options["weight_map"] == "sink_logit" else None
    told = survey.reference(
        jnp.asarray(SCORES)[None, None],
        jnp.ones((1, 1, 3, 5), bool),
        survey.Config(**options),
        None if sink is None else jnp.full((1,), sink),
    )
    close(weights_of(SCORES, sink, **options), np.asarray(told)[0, 0], 1e-6)


def test_softmax_off_by_one_sums_to_z_over_one_plus_z():
    z = np.exp(SCORES).sum(-1)
    close(weights_of(SCORES, weight_map="off_by_one").sum(-1), z / (1 + z), 1e-6)


def test_softmax_off_by_one_is_softmax_with_a_zero_logit_and_value():
    longer = np.concatenate([np.zeros((3, 1)), SCORES], axis=1)
    close(weights_of(SCORES, weight_map="off_by_one"), softmax(longer)[:, 1:], 1e-6)


def test_softmax_off_by_one_of_hugely_negative_logits_is_0():
    np.testing.assert_array_equal(
        weights_of(np.full((2, 5), -1e4), weight_map="off_by_one"), 0
    )


def test_sink_logit_is_an_output_gate_from_the_rows_log_sum():
    lse = np.log(np.exp(SCORES).sum(-1, keepdims=True))
    gate = 1 / (1 + np.exp(0.7 - lse))
    told = softmax(SCORES) * gate
    close(weights_of(SCORES, 0.7, weight_map="sink_logit"), told, 1e-6)


def test_sink_logit_of_0_is_off_by_one_and_of_minus_infinity_is_softmax():
    zero = weights_of(SCORES, 0.0, weight_map="sink_logit")
    np.testing.assert_array_equal(zero, weights_of(SCORES, weight_map="off_by_one"))
    low = weights_of(SCORES, -1e4, weight_map="sink_logit")
    close(low, softmax(SCORES), 1e-6)


def test_sink_logit_does_not_carry_the_scale():
    base = make({"weight_map": "sink_logit", "scale": 0.1})
    sink = np.asarray(base.sink[...])
    ours = layer(weight_map="sink_logit")
    getattr(ours, f"slot_{NAME}").sink[...] = sink
    scaled = make(
        {"scale": 0.1, "output": ({"type": NAME, "weight_map": "sink_logit"},)}
    )
    getattr(scaled, f"slot_{NAME}").sink[...] = sink
    x = inputs()
    close(run(scaled, x, context()), run(base, x, context()), 1e-6)


def test_clipped_softmax_from_0_to_1_is_softmax():
    close(
        weights_of(SCORES, weight_map="clipped", low=0.0, high=1.0),
        softmax(SCORES),
        1e-6,
    )


def test_clipped_softmax_gives_exact_zeros_and_ones():
    found = weights_of([[9.0, 0, 0, 0, -3]], weight_map="clipped", low=-0.1, high=1.1)
    np.testing.assert_array_equal(found, [[1, 0, 0, 0, 0]])


def test_softpick_rows_sum_to_at_most_1_and_are_0_at_scores_of_0_and_below():
    found = weights_of(SCORES, weight_map="softpick")
    assert np.all(found.sum(-1) <= 1 + 1e-6)
    np.testing.assert_array_equal(found[SCORES <= 0], 0)
    assert np.all(found[SCORES > 0] > 0)


def test_softpick_of_scores_that_are_all_0_is_0():
    np.testing.assert_array_equal(
        weights_of(np.zeros((2, 5)), weight_map="softpick"), 0
    )


def test_softpick_of_large_positive_scores_is_softmax():
    close(weights_of(SCORES + 40, weight_map="softpick"), softmax(SCORES), 1e-5)


def test_sigmoid_weights_do_not_depend_on_other_keys():
    whole = weights_of(SCORES, weight_map="sigmoid")
    close(weights_of(SCORES[:, :4], weight_map="sigmoid"), whole[:, :4], 1e-6)


def test_value_gate_depends_on_the_keys_token_alone():
    mixer = layer(weight_map="softmax", value_gate=True)
    ctx = context(hooks=(Hook("gate", "value_gate"),))
    x = inputs()
    changed = x.copy()
    changed[:, 5] += 1
    before, after = (
        np.asarray(call(*nnx.split(mixer), one, ctx)[1].records["gate"])
        for one in (x, changed)
    )
    same = np.arange(x.shape[1]) != 5
    np.testing.assert_array_equal(before[:, same], after[:, same])
    assert not np.allclose(before[:, 5], after[:, 5])


@pytest.mark.parametrize("name", ["softpick", "clipped", "sink_logit"])
def test_hooks_see_the_weights_that_the_kernels_use(name):
    options = {"low": -0.1} if name == "clipped" else {}
    mixer = layer(ROPE, weight_map=name, **options)
    ctx = context(hooks=(Hook("w", "weights"),))
    y, out = call(*nnx.split(mixer), inputs(), ctx)
    close(np.asarray(y), run(mixer, inputs(), context()))
    weights = np.asarray(out.records["w"])
    assert weights.shape[1] == H
    assert np.all(np.triu(weights, 1) == 0)


def test_combines_with_a_gate():
    mixer = layer(ROPE, ({"type": "gated_attention"},), weight_map="softpick")
    gate = mixer.slot_gated_attention.gate.kernel
    gate[...] = jnp.zeros_like(gate[...])
    close(
        run(mixer, inputs(), context()),
        run(layer(ROPE, weight_map="softpick"), inputs(), context()) / 2,
    )


def test_two_weight_maps_are_refused():
    with pytest.raises(UserError, match="one weight map; got .*off_by_one.*softpick"):
        make(
            {
                "weight_map": "off_by_one",
                "output": ({"type": NAME, "weight_map": "softpick"},),
            }
        )
    with pytest.raises(UserError, match="one weight map"):
        layer(more=({"type": NAME, "weight_map": "sigmoid"},))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"low": -0.1}, "go with weight_map=clipped"),
        ({"bias": 1.0}, "bias goes with weight_map=sigmoid"),
        ({"weight_map": "clipped", "low": 0.1}, "low must be <= 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        survey.Config(**options)


def test_cross_is_said_on_the_layer():
    with pytest.raises(UserError, match="Set cross=true on the layer"):
        layer(cross=True)
    assert survey.preset(survey.Config(cross=True)).cross
    assert isinstance(survey.preset(survey.Config()), attention.Config)
