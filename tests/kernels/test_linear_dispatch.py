"""What a call of the linear family refuses, and what it says it runs."""

import jax
import jax.numpy as jnp
import pytest

from attnjax import kernels

GPU = kernels.Target("gpu", "NVIDIA H200")


def shapes(**changes):
    sizes = {"q": (2, 7, 4, 5), "k": (2, 7, 2, 5), "v": (2, 7, 2, 3), **changes}
    return [jax.ShapeDtypeStruct(sizes[name], "float32") for name in "qkv"]


def of(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": "tokens"}, "unknown decay 'tokens'. Did you mean token"),
        ({"delta": True, "normalise": True}, "normalise goes without delta"),
        ({"chunk_size": 48}, "must be a power of 2; got chunk_size=48"),
        ({"chunk_size": 0}, "must be a power of 2; got chunk_size=0"),
    ],
)
def test_spec_refuses_values_it_does_not_have(fields, message):
    with pytest.raises(ValueError, match=message):
        kernels.LinearSpec(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (7, 4, 5)}, r"q must be \[B, T, heads, dim\]; got q.shape=\(7, 4, 5\)"),
        ({"k": (2, 7, 2, 6)}, r"k must be \[B, T, K, D\] = \(2, 7, 2, 5\)"),
        ({"v": (2, 6, 2, 3)}, r"v must be \[B, T, K, E\] = \(2, 7, 2, 3\)"),
        ({"q": (2, 7, 3, 5)}, "multiple of the heads K of k and v; got H=3, K=2"),
        (
            {"q": (2, 0, 4, 5), "k": (2, 0, 2, 5), "v": (2, 0, 2, 3)},
            "T must be at least 1",
        ),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        kernels.explain_linear(*shapes(**changes))


@pytest.mark.parametrize(
    ("spec", "operands", "error", "message"),
    [
        ({"decay": "head"}, {}, ValueError, "needs the operand 'log_decay'"),
        ({"delta": True}, {}, ValueError, r"Pass beta \[B, T, K\] = \(2, 7, 2\)"),
        ({}, {"beta": of(2, 7, 2)}, ValueError, "the spec has no operand 'beta'"),
        (
            {"decay": "channel"},
            {"log_decay": of(2, 7, 2)},
            ValueError,
            r"log_decay must be \[B, T, K, D\] = \(2, 7, 2, 5\)",
        ),
        (
            {"normalise": True},
            {"initial_state": of(2, 2, 5, 3)},
            ValueError,
            r"initial_state must be \[B, K, D, E \+ 1\] = \(2, 2, 5, 4\)",
        ),
        (
            {},
            {"initial_segment": of(2, dtype="int32")},
            ValueError,
            "initial_segment goes with segment_ids",
        ),
        ({}, {"segment_ids": of(2, 7)}, TypeError, "segment_ids must be integer"),
        (
            {"decay": "head"},
            {"log_decay": of(2, dtype="int32")},
            TypeError,
            "log_decay must be floating",
        ),
    ],
)
def test_wrong_operands_are_named(spec, operands, error, message):
    with pytest.raises(error, match=message):
        kernels.explain_linear(*shapes(), kernels.LinearSpec(**spec), operands)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="spec must be a LinearSpec; got str"):
        kernels.explain_linear(*shapes(), "token")
    q, k, v = shapes()
    with pytest.raises(TypeError, match="q must be floating; got q.dtype=int32"):
        kernels.explain_linear(of(*q.shape, dtype="int32"), k, v)


def test_a_name_that_is_not_offered_is_refused_with_those_that_are():
    arrays = [jnp.zeros(x.shape) for x in shapes()]
    with pytest.raises(ValueError, match="unknown implementation 'mosaic'.*mosaic_gpu"):
        kernels.linear_attention(*arrays, implementation="mosaic")


def test_a_step_takes_one_token():
    arrays = [jnp.zeros(x.shape) for x in shapes()]
    with pytest.raises(ValueError, match="T must be 1; got T=7"):
        kernels.linear_attention_step(*arrays, jnp.zeros((2, 2, 5, 3)))


def test_an_implementation_that_cannot_is_refused_by_its_reason(monkeypatch):
    monkeypatch.setattr(
        kernels.LINEAR_IMPLEMENTATIONS[1], "supports", lambda _: "is out"
    )
    arrays = [jnp.zeros(x.shape) for x in shapes()]
    with pytest.raises(NotImplementedError, match="implementation='blocked' is out"):
        kernels.linear_attention(*arrays, implementation="blocked")


def test_explain_says_what_runs_and_why_not_the_others():
    assert kernels.explain_linear(*shapes(), target=GPU) == [
        "uses blocked on gpu",
        "reference: supports it, but only when asked for by name",
        "blocked: supports it",
        "mosaic_gpu: needs q, k and v all bfloat16, not "
        "('float32', 'float32', 'float32'): products of wider factors would be rounded "
        "to 10 bits (tf32), and take no transposed tile",
        "mosaic_tpu: needs platform tpu, not gpu",
    ]


def test_the_empty_state_has_a_column_for_the_normaliser():
    sizes = {"batch": 2, "kv_heads": 3, "dim": 5, "value_dim": 7}
    spec = kernels.LinearSpec(normalise=True)
    assert kernels.empty_linear_state(spec, **sizes).shape == (2, 3, 5, 8)
    assert kernels.empty_linear_state(kernels.LinearSpec(), **sizes).shape[-1] == 7
