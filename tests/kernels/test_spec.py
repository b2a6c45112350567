"""What a spec refuses, and the formulas of its parts at the ends of their range."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import AttentionSpec
from attnjax.kernels.weight_maps import WeightMap, log_one_plus

REFUSED = {
    "Softmax: bound must be > 0 and at most 40.0": lambda: kernels.Softmax(bound=41),
    "SoftplusL1: eps must be >= 0; got eps=-1": lambda: kernels.SoftplusL1(eps=-1),
    "power must be an integer >= 1; got power=1.5": lambda: kernels.ReluPower(1.5),
    "factor has no use when weights are normalised": lambda: kernels.ReluPower(
        2, factor=0.5, normalise=True
    ),
    "Clip: low must be <= 0 and high >= 1": lambda: kernels.Clip(0.1, 1.0),
    "Sharpen: power must be an integer >= 1": lambda: kernels.Sharpen(0),
    "Sharpen: eps must be >= 0": lambda: kernels.Sharpen(3, -1.0),
    "per must be 'element' or 'head'; got per='row'": lambda: kernels.OutputGate("row"),
    "activation must be 'sigmoid' or 'none'": lambda: kernels.OutputGate(
        activation="silu"
    ),
    "HeadRMSNorm: eps must be > 0": lambda: kernels.HeadRMSNorm(0.0),
    "LowRankBias must be the first score step": lambda: AttentionSpec(
        score=(kernels.SoftCap(2.0), kernels.LowRankBias())
    ),
    "return_lse has no use with reweight": lambda: AttentionSpec(
        reweight=kernels.Clip(), return_lse=True
    ),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_values_outside_their_rule_are_refused(rule):
    with pytest.raises(ValueError, match=rule):
        REFUSED[rule]()


def test_dropout_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="random bits.*dropout_rate=0.1"):
        AttentionSpec(dropout_rate=0.1)
    assert AttentionSpec(dropout_rate=0.0) == AttentionSpec()


@pytest.mark.parametrize(
    ("field", "value"), [("epilogue", "gate"), ("epilogue", (3,)), ("reweight", 1)]
)
def test_fields_are_checked(field, value):
    with pytest.raises(TypeError, match=f"AttentionSpec: {field} must be a "):
        AttentionSpec(**{field: value})


def test_a_low_rank_bias_is_no_function_of_one_score():
    x = jnp.ones((1, 3, 2, 4))
    spec = AttentionSpec(score=kernels.LowRankBias())
    factors = {"bias_q": jnp.ones((1, 3, 2, 2)), "bias_k": jnp.ones((1, 3, 2, 1))}
    with pytest.raises(ValueError, match="must have one rank R"):
        kernels.attention(x, x, x, spec, factors)
    with pytest.raises(NotImplementedError, match="no tile of scores can apply"):
        kernels.LowRankBias().apply(x, None)
    gpu = kernels.Target("gpu", "NVIDIA H200")
    factors["bias_k"] = factors["bias_q"]
    wide_q, wide_k, rest, others = kernels.widen(x, x, spec, factors, gpu)
    assert wide_q.shape == wide_k.shape == (1, 3, 2, 8)
    assert rest == AttentionSpec(scale=1.0)
    assert not others
    lines = kernels.explain(x, x, x, spec, factors)
    assert lines[0] == "uses blocked on cpu"


def test_base_classes_leave_their_formulas_to_others():
    x = jnp.ones(2)
    for call in (
        lambda: WeightMap().unnormalized(x, None),
        lambda: WeightMap().slope(x, x),
        lambda: WeightMap().summed(x, None),
        lambda: WeightMap().slopes(x, None),
        lambda: kernels.Reweight().apply(x, x, None),
        lambda: kernels.Reweight().slope(x, x, None),
        lambda: kernels.EpilogueStep().apply(x, {}),
    ):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(NotImplementedError, match=r"slopes.s, shift."):
        kernels.Softpick().slope(x, x)
    assert WeightMap().bare().sink_logit({}) is None


def test_log_one_plus_keeps_small_numbers():
    x = np.concatenate([[0.0], np.logspace(-30, 0, 400)])
    got = np.asarray(log_one_plus(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, np.log1p(x), rtol=4e-7)


MAPS = {
    "softplus": kernels.SoftplusL1(),
    "sigmoid": kernels.Sigmoid(0.3),
    "relu": kernels.ReluPower(1, factor=0.1),
    "relu cubed": kernels.ReluPower(3),
    "polynomial": kernels.Polynomial(),
    "elu": kernels.EluPlusOne(),
    "softmax": kernels.Softmax(),
}


@pytest.mark.parametrize("name", MAPS)
def test_slope_is_the_derivative(name):
    weight_map, s = MAPS[name], jnp.linspace(-8.0, 8.0, 80)
    shift = jnp.float32(3.0) if weight_map.exponential else None
    u, pull = jax.vjp(lambda s: weight_map.unnormalized(s, shift), s)
    (wanted,) = pull(jnp.ones_like(u))
    np.testing.assert_allclose(weight_map.slope(s, u), wanted, rtol=2e-5, atol=1e-6)
    low = jnp.full(3, -1e30)
    if weight_map.vanishes:
        u = weight_map.unnormalized(low, shift)
        assert not u.any()
        assert not weight_map.slope(low, u).any()


EVERYWHERE = {
    *("add", "sub", "mul", "div", "neg", "abs", "max", "min", "sign", "square"),
    *("exp", "logistic", "integer_pow", "select_n", "gt", "lt", "ge", "le", "eq"),
    *("broadcast_in_dim", "convert_element_type", "pjit", "jit", "copy"),
}


def test_formulas_are_made_of_what_every_kernel_compiler_has():
    def names(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from names(inner)

    x = jnp.ones((4, 4))
    for weight_map in (*MAPS.values(), kernels.Softpick()):
        shift = x if weight_map.exponential else None
        calls = [functools.partial(weight_map.unnormalized, shift=shift)]
        if weight_map.split:
            calls.append(functools.partial(weight_map.summed, shift=shift))
            calls.append(functools.partial(weight_map.slopes, shift=shift))
        else:
            calls.append(functools.partial(weight_map.slope, u=x))
        for call in calls:
            found = set(names(jax.make_jaxpr(call)(x).jaxpr))
            assert found <= EVERYWHERE, (weight_map, found - EVERYWHERE)
