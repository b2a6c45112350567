"""Every form of attention against dense float64: values and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import blocked, reference

B, T, H, K, D, E = 2, 37, 4, 2, 5, 3


@dataclasses.dataclass(frozen=True)
class EveryOther:
    """A mask with a setting: keys at a distance that the stride divides."""

    stride: int

    def __call__(self, b, h, q, k):
        return (q - k) % (self.stride + 0 * h) == 0


def per_head_reach(b, h, q, k, reach):
    return q - k <= reach


def decaying_log(s, b, h, q, k, strength, tilt, table):
    """Not finite at k > q: what a causal mask hides must stay hidden."""
    penalty = strength * jnp.log((q - k + 1).astype(s.dtype))
    return s * (1 + tilt) - penalty + table[(q + 3 * k) % 7]


MASKS = {
    "full": kernels.Full(),
    "causal": kernels.Causal(),
    "window": kernels.SlidingWindow(5),
    "two-sided window": kernels.SlidingWindow(9, 4),
    "window with sinks": kernels.SlidingWindow(6, sinks=2),
    "prefix": kernels.Causal() | kernels.Prefix(),
    "packed": kernels.Causal() & kernels.Segments(),
    "dilated": kernels.Causal() & kernels.MaskFn(EveryOther(3)),
    "mask with operand": kernels.Causal()
    & kernels.MaskFn(per_head_reach, ("reach",), ("head",)),
}
LOG = kernels.ScoreFn(
    decaying_log, ("strength", "tilt", "table"), ("head", "row", "table")
)
SCORES = {
    "plain": (),
    "soft cap": (kernels.SoftCap(1.5),),
    "bias": (kernels.Bias(),),
    "alibi": (kernels.ALiBi(),),
    "cap, bias, alibi": (kernels.SoftCap(2.0), kernels.Bias(), kernels.ALiBi()),
    "log distance": (LOG,),
}
MAPS = {
    "softmax": kernels.Softmax(),
    "sink": kernels.Softmax(sink="logit"),
    "off by one": kernels.Softmax(sink="off_by_one"),
    "sigmoid": kernels.Sigmoid(-1.5),
}

# Each mask, score, map and number of kv heads at least once, each kind of tile
# (skipped, full, partial, sorted at trace time, sorted on the device) with each map.
CASES = [
    ("full", "plain", "softmax", K),
    ("full", "soft cap", "off by one", 1),
    ("causal", "plain", "softmax", H),
    ("causal", "cap, bias, alibi", "sink", K),
    ("causal", "log distance", "softmax", K),
    ("window", "log distance", "sink", 1),
    ("two-sided window", "bias", "softmax", K),
    ("two-sided window", "plain", "sigmoid", H),
    ("window with sinks", "soft cap", "softmax", K),
    ("prefix", "alibi", "off by one", 1),
    ("packed", "cap, bias, alibi", "sink", K),
    ("packed", "bias", "sigmoid", K),
    ("dilated", "plain", "softmax", K),
    ("mask with operand", "bias", "softmax", K),
]


def arrays(kv_heads, *, dtype=jnp.float64):
    rng = np.random.default_rng(7)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = normal(B, T, H, D), normal(B, T, kv_heads, D), normal(B, T, kv_heads, E)
    segments = np.repeat([[1, 2, 0, 3]], [11, 9, 5, 12], axis=1)
    segments = jnp.asarray(np.concatenate([segments, segments[:, ::-1]]), jnp.int32)
    pool = {
        "bias": normal(1, H, T, T),
        "alibi_slopes": normal(H),
        "sink": normal(H),
        "strength": normal(H),
        "tilt": 0.3 * normal(B, 1, T),
        "table": normal(7),
        "prefix_len": jnp.asarray([5, 20], jnp.int32),
        "q_segment_ids": segments,
        "k_segment_ids": segments,
        "reach": jnp.asarray([0, 3, 50, -1], jnp.int32),
    }
    return q, k, v, pool, (normal(B, T, H, E), normal(B, T, H))


def value_and_grads(run, spec, q, k, v, operands, cotangents):
    """Output, log-sum and gradients of a random projection of both."""

    @jax.jit
    def everything(q, k, v, operands):
        trained = {n: x for n, x in operands.items() if x.dtype == q.dtype}

        def project(q, k, v, trained):
            given = operands | trained
            target = kernels.default_target()
            request = kernels.make_request(q, k, v, spec, given, target)
            out, lse = run(request, q, k, v, given)
            total = (out * cotangents[0]).sum()
            if lse is not None:
                total += jnp.where(lse > -1e9, lse * cotangents[1], 0).sum()
            return total, (out, lse)

        return jax.grad(project, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, trained)

    return everything(q, k, v, operands)


@pytest.mark.parametrize(("mask", "score", "weights", "kv_heads"), CASES)
def test_blocked_equals_dense_float64(mask, score, weights, kv_heads):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        spec = kernels.AttentionSpec(
            mask=MASKS[mask], score=SCORES[score], weight_map=MAPS[weights]
        )
        q, k, v, pool, cotangents = arrays(kv_heads)
        operands = {op.name: pool[op.name] for op in spec.operands}
        given = (spec, q, k, v, operands, cotangents)
        wanted = value_and_grads(reference.run, *given)
        paths = jax.tree_util.tree_leaves_with_path(wanted)
        for sizes in (None, (16, 16)):
            run = functools.partial(blocked.run, block_sizes=sizes)
            got = jax.tree.leaves(value_and_grads(run, *given))
            for (path, right), left in zip(paths, got, strict=True):
                assert left.dtype == right.dtype == jnp.float64
                note = f"{sizes} {path}"
                np.testing.assert_allclose(left, right, atol=2e-13, err_msg=note)
