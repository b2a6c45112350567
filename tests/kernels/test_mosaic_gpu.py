"""The Hopper kernels, interpreted on the CPU with race detection, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import mosaic_gpu, reference
from attnjax.kernels.mosaic_gpu import distances
from attnjax.kernels.mosaic_gpu.tiles import Tiles

pytestmark = pytest.mark.pallas

interpret_params = pytest.importorskip(
    "jax._src.pallas.mosaic_gpu.interpret.params",
    reason="this jax has no interpreter of Mosaic GPU kernels",
)

H200 = kernels.Target("gpu", "NVIDIA H200")
SMALL = (Tiles(64, 2), Tiles(64, 2, ping_pong=False))
CAUSAL = kernels.Causal()
# Relative to the norm of the whole array: two roundings to 8 or to 11 bits. Gradients
# of operands are sums of thousands of terms that cancel.
TOLERANCE = {jnp.bfloat16: 6e-3, jnp.float16: 1e-3}
CANCELLED = 3


def log_distance(s, b, h, q, k, strength, tilt):
    """Not finite at k > q: what a causal mask hides must stay hidden."""
    return s * (1 + tilt) - strength * jnp.log((q - k + 1).astype(s.dtype))


def column_tilt(s, b, h, q, k, weight):
    return s * jnp.tanh(weight)


def case(spec, *, dtype=jnp.bfloat16, b=1, t=100, s=None, h=2, kv=1, d=64, e=64):
    return spec, dtype, (b, t, s or t, h, kv, d, e)


LOG = kernels.ScoreFn(log_distance, ("strength", "tilt"), ("head", "row"))
COLUMN = kernels.ScoreFn(column_tilt, ("weight",), ("column",))
CASES = {
    "causal over several tiles": case(kernels.AttentionSpec(CAUSAL), t=200, h=1),
    "packed, log distance, distances, learned sink, gated": case(
        kernels.AttentionSpec(
            mask=CAUSAL & kernels.Segments(),
            score=(LOG, kernels.RelativeBias(5)),
            weight_map=kernels.Softmax("logit"),
            return_lse=True,
            epilogue=(kernels.HeadRMSNorm(0.1), kernels.OutputGate()),
        ),
        dtype=jnp.float16,
        b=2,
        d=40,
        e=40,
    ),
    "block mask, biases, soft cap, sigmoid": case(
        kernels.AttentionSpec(
            mask=kernels.BlockMask(64, 64) | kernels.SlidingWindow(7),
            score=(kernels.SoftCap(3.0), kernels.Bias(), kernels.RelativeBias(37)),
            weight_map=kernels.Sigmoid(-2.0),
            epilogue=(kernels.OutputGate("head", "none"), kernels.HeadScale()),
        ),
        t=200,
    ),
    "window after an offset, columns, distances, softplus, sharpened": case(
        kernels.AttentionSpec(
            mask=kernels.SlidingWindow(45),
            score=(COLUMN, kernels.RelativeBias(11)),
            weight_map=kernels.SoftplusL1(),
            reweight=kernels.Sharpen(3),
        ),
        t=50,
        s=150,
        e=128,
    ),
    "dk and dv apart, alibi, key mask, clipped": case(
        kernels.AttentionSpec(
            mask=CAUSAL,
            score=kernels.ALiBi(),
            weight_map=kernels.Softmax("logit"),
            reweight=kernels.Clip(-0.05, 1.1),
        ),
        d=192,
        e=128,
    ),
}


def inputs(spec, dtype, sizes):
    b, t, s, h, kv, d, e = sizes
    rng = np.random.default_rng(5)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    ids = jnp.asarray(np.repeat([1, 2, 0, 3], [41, 29, 10, 20]), jnp.int32)
    pool = {
        "q_segment_ids": jnp.stack([ids, ids[::-1]]),
        "k_segment_ids": jnp.stack([ids, ids[::-1]]),
        "strength": 0.3 * normal(h),
        "tilt": 0.3 * normal(b, 1, t),
        "sink": normal(h),
        "bias": normal(1, h, t, s),
        "weight": normal(b, h, s),
        "block_mask": jnp.asarray(
            [
                [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1]],
                [[0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]],
            ],
            bool,
        )[None],
        "alibi_slopes": 0.1 * normal(h),
        "visible_keys": 5 + jnp.abs(normal(b, h, t)),
        "sharpen_offset": jnp.abs(normal(1, 1, t)),
        "head_scale": normal(h),
        "head_norm": normal(h, e),
        "output_gate": normal(b, t, h),
    }
    if kernels.OutputGate() in spec.epilogue:
        pool["output_gate"] = normal(b, t, h, e, dtype=dtype)
    for step in spec.score:
        if isinstance(step, kernels.RelativeBias):
            pool[step.name] = normal(h if t == s else 1, 2 * step.reach + 1)
    operands = {x.name: pool[x.name] for x in spec.operands}
    if t != s:
        operands["q_offset"] = jnp.int32(s - t - 3)
    if d == 192:
        operands["kv_mask"] = jnp.arange(s)[None] % 5 != 1
    qkv = normal(b, t, h, d), normal(b, s, kv, d), normal(b, s, kv, e)
    cotangents = normal(b, t, h, e, dtype=dtype), normal(b, t, h)
    return [x.astype(dtype) for x in qkv], operands, cotangents


def value_and_grads(run, spec, target, qkv, operands, cotangents):
    """Output, log-sum, and gradients of a random projection of both."""
    trained = {x.name: operands[x.name] for x in spec.operands if x.trains}

    @jax.jit
    def everything(qkv, trained):
        given = operands | trained
        request = kernels.make_request(*qkv, spec, given, target)

        def project(qkv, trained):
            out, lse = run(request, *qkv, operands | trained)
            total = (out.astype(cotangents[0].dtype) * cotangents[0]).sum()
            if spec.return_lse:
                total += jnp.where(lse > -1e9, lse * cotangents[1], 0).sum()
            return total, (out, lse)

        return jax.grad(project, argnums=(0, 1), has_aux=True)(qkv, trained)

    return everything(qkv, trained)


def widened(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        tree,
    )


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_dense_float64_without_races(name, capsys, monkeypatch):
    # Diagonals go through rows of the batch, as where there are many.
    monkeypatch.setattr(distances, "ENOUGH_BLOCKS", 1)
    spec, dtype, sizes = CASES[name]
    given = inputs(spec, dtype, sizes)
    params = interpret_params.InterpretGPUParams(detect_races=True)

    def run(*args):
        return mosaic_gpu.run(*args, interpret=params, tiles=SMALL)

    got = jax.block_until_ready(value_and_grads(run, spec, H200, *given))
    # Each kernel starts with a clean record of races: the report is what stays.
    assert "RACE DETECTED" not in capsys.readouterr().out
    with jax.enable_x64(True):
        cpu = kernels.Target("cpu")
        wanted = value_and_grads(reference.run, spec, cpu, *widened(given))
        paths = jax.tree_util.tree_leaves_with_path(wanted)
        for (path, right), left in zip(paths, jax.tree.leaves(got), strict=True):
            assert jnp.all(jnp.isfinite(left) | (left == right)), path
            finite = jnp.isfinite(right)
            error = jnp.where(finite, left.astype(jnp.float64) - right, 0)
            size = jnp.linalg.norm(jnp.where(finite, right, 0))
            allowed = TOLERANCE[dtype] * (CANCELLED if "DictKey" in repr(path) else 1)
            assert jnp.linalg.norm(error) <= allowed * size, path
