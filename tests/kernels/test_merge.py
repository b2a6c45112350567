"""Parts of the keys merged equal the whole, for every map that merges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import AttentionSpec, merge

MAPS = {
    "softmax": kernels.Softmax(),
    "sink": kernels.Softmax("logit"),
    "bounded, off by one": kernels.Softmax("off_by_one", bound=30.0),
    "softpick": kernels.Softpick(),
    "softplus": kernels.SoftplusL1(eps=0.3),
    "sigmoid": kernels.Sigmoid(-1.0),
}
T, CUTS = 13, ((0, 4), (4, 9), (9, 13))


def arrays():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, 2, 5)), jnp.float32) for _ in "qkv")
    return q, k, v, jnp.asarray(rng.normal(size=2), jnp.float32)


def in_parts(weight_map, q, k, v, sink):
    """Causal attention over three parts of the keys; the first query sees one part."""
    bare = weight_map.bare()
    spec = AttentionSpec(
        mask=kernels.Causal(), weight_map=bare, return_lse=bare.needs_sum
    )
    parts = []
    for first, last in CUTS:
        places = {
            "q_positions": jnp.arange(T, dtype=jnp.int32)[None],
            "k_positions": jnp.arange(first, last, dtype=jnp.int32)[None],
        }
        keys = k[:, first:last], v[:, first:last]
        part = kernels.attention(q, *keys, spec, places)
        parts.append(part if spec.return_lse else (part, None))
    operands = {"sink": sink} if weight_map.operands else None
    return merge(parts, weight_map=weight_map, operands=operands)


def whole(weight_map, q, k, v, sink):
    summed = weight_map.needs_sum
    spec = AttentionSpec(
        mask=kernels.Causal(), weight_map=weight_map, return_lse=summed
    )
    operands = {"sink": sink} if weight_map.operands else None
    got = kernels.attention(q, k, v, spec, operands, implementation="reference")
    return got if summed else (got, None)


@pytest.mark.parametrize("name", MAPS)
def test_parts_merged_are_the_whole(name):
    got = in_parts(MAPS[name], *arrays())
    wanted = whole(MAPS[name], *arrays())
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-6)
    assert (got[1] is None) == (wanted[1] is None)
    if got[1] is not None:
        np.testing.assert_allclose(got[1], wanted[1], atol=2e-6)


@pytest.mark.parametrize("name", ["sink", "softpick"])
def test_gradients_go_through_the_merge(name):
    def total(form, *given):
        out, lse = form(MAPS[name], *given)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    got, wanted = (
        jax.grad(functools.partial(total, form), (0, 1, 2, 3))(*arrays())
        for form in (in_parts, whole)
    )
    for left, right in zip(got, wanted, strict=True):
        np.testing.assert_allclose(left, right, atol=5e-6)


def test_rows_that_no_part_sees_are_zero_without_nan():
    out, lse = jnp.zeros((1, 2, 1, 3)), jnp.full((1, 2, 1), -jnp.inf)

    def total(out, lse):
        merged, log = merge([(out, lse), (out, lse)])
        return jnp.sum(merged) + jnp.sum(jnp.where(log > -1, log, 0)), (merged, log)

    grads, (merged, log) = jax.grad(total, (0, 1), has_aux=True)(out, lse)
    assert not merged.any()
    np.testing.assert_array_equal(log, -np.inf)
    for gradient in grads:
        assert not gradient.any()


def test_parts_that_cannot_be_merged_are_refused():
    with pytest.raises(ValueError, match="parts must not be empty"):
        merge([])
    with pytest.raises(ValueError, match="each part must come with its log-sum"):
        merge([(jnp.ones((1, 1, 1, 1)), None)])
