"""Equal parameters by the width of the FFNs."""

import dataclasses

import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.decoding import run as runs
from attnjax.models import lm, matching
from attnjax.models.layout import Layout
from attnjax.training import experiment, finish

C, DEPTH = 24, 2
# One more unit of width in each FFN: an inner map in, one out.
UNIT = 2 * C * DEPTH


@pytest.fixture(scope="module")
def make(make_model):
    def make(**options):
        sizes = {"num_layers": DEPTH, "num_heads": 4, "mlp_dim": 48}
        return make_model(**sizes | options)

    return make


@pytest.fixture(scope="module")
def baseline(make):
    return make().parameter_count()


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "gated_attention"},
        {"layers": "grouped_differential_attention"},
        {"layers": "moh"},
        {
            "layers": "attention few",
            "mixers": {"few": {"type": "attention", "num_kv_heads": 1}},
        },
        {"layers": "attention", "prefix": {"kind": "registers"}},
    ],
    ids=["gate", "differential", "moh", "grouped queries", "registers"],
)
def test_a_model_gets_the_parameters_of_the_baseline(make, baseline, options):
    model = make(**options, params="match")
    found = model.matched
    assert found.target == baseline
    assert found.parameters == model.parameter_count()
    assert abs(found.difference) <= UNIT / 2
    assert model.block_dims.mlp_dim == model.config.mlp_dim == found.mlp_dim
    other = make(**options, mlp_dim=found.mlp_dim)
    assert other.parameter_count() == found.parameters


def test_a_gate_is_paid_for_by_the_ffns_exactly_where_it_divides(make, baseline):
    """C x H D gate parameters a layer are C / 2 units of 2 C."""
    found = make(layers="gated_attention", params="match").matched
    assert found == matching.Matched(baseline, "attention", baseline, 48 - C // 2, 48)
    assert found.difference == 0


def test_shared_key_heads_of_the_whole_model_are_matched_with_those_of_the_baseline(
    make, baseline
):
    model = make(num_kv_heads=1, params="match", match={"num_kv_heads": 4})
    assert model.matched.target == baseline
    # 2 maps of C x 18 less, in a layer.
    assert model.matched.mlp_dim == 48 + 18
    more = make(num_heads=6, head_dim=6, params="match", match={"num_heads": 4})
    assert more.matched.target == baseline
    assert more.matched.mlp_dim == 48 - 24


def test_the_width_is_a_multiple_and_the_rest_is_told(make, baseline):
    found = make(
        layers="gated_attention", params="match", match={"multiple": 16}
    ).matched
    assert found.mlp_dim == 32
    assert found.difference == found.parameters - baseline == -4 * UNIT
    assert found.line() == (
        f"FFN width 48 -> 32 for the {baseline:,} parameters of attention; -384 "
        f"({-38400 / baseline:+.2g}%) is left"
    )
    assert found.to_json()["difference"] == -384


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_number_of_parameters_is_met_with_biases_too(make, activation):
    options = {"activation": activation, "use_bias": True, "norm": "layer"}
    wanted = make(**options, mlp_dim=61).parameter_count()
    found = make(**options, params=wanted).matched
    assert (found.mlp_dim, found.difference, found.baseline) == (61, 0, "")


def test_the_baseline_has_default_mixers_at_the_configured_width(make):
    gate = {"type": "gated_attention"}
    model = make(
        layers="attention",
        mixers={"attention": {"output": [gate]}},
        params="match",
        match={"layers": "linear_attention attention"},
    )
    plain = make(layers="linear_attention attention")
    assert model.matched.target == plain.parameter_count()
    assert model.matched.baseline == "linear_attention attention"


# ---- what a run does with it


def test_the_summary_tells_the_difference(make):
    model = make(layers="gated_attention", params="match")
    assert finish._matched(model) == {"matched": model.matched.to_json()}
    assert finish._matched(make()) == {}


def test_layers_that_are_left_out_do_not_change_the_width(make):
    model = {
        **dict(embed_dim=C, num_layers=2, num_heads=4, mlp_dim=48, activation="gelu"),
        **dict(layers="gated_attention attention", params="match"),
    }
    config = experiment.resolve({"model": model})
    vocab = 13
    whole = experiment.build_model(config, {"vocab_size": vocab})
    settled = runs._settled(config, {"vocab_size": vocab})
    assert experiment.resolve(settled) == settled
    changed = runs._changed(settled, Layout.of(whole.names), (), (0,))
    part = experiment.build_model(changed, {"vocab_size": vocab})
    assert part.names == ("gated_attention",)
    assert part.config.mlp_dim == whole.config.mlp_dim == 42
    assert part.matched is None


def test_a_resolved_config_keeps_the_wish_and_not_the_width():
    filled = lm.resolve({"layers": "gated_attention", "params": "match"})
    assert (filled["params"], filled["mlp_dim"]) == ("match", None)
    assert lm.resolve(filled) == filled
    config = schema.build(lm.Config, filled)
    assert lm.frozen(config, 7) == dataclasses.replace(config, params=None, mlp_dim=7)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"layers": "gated_attention", "params": "match", "mlp_dim": 8},
            r"parameters at mlp_dim=8 are 1,152 more .* hold only 768, in steps of 96",
        ),
        (
            {"layers": "gated_attention", "params": "match", "mlp_dim": 0},
            "need FFNs to adjust; got mlp_dim=0",
        ),
        ({"params": 0}, "params: must be at least 1; got 0"),
        ({"params": "mach"}, "config.model.params: .*'mach'"),
        ({"match": {"multiple": 8}}, "baseline of params=match; got params=None"),
        ({"params": 9000, "match": {"num_heads": 2}}, "params=match; got params=9000"),
        ({"params": "match", "match": {"multiple": 0}}, "multiple must be at least 1"),
        (
            {"params": "match", "match": {"layers": "atention"}},
            "unknown mixer 'atention'. Did you mean att",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(make, options, text):
    with pytest.raises(UserError, match=text):
        make(**options)
