"""Attention on eight devices equals attention on one: tokens, heads and batch cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import AttentionSpec, sharded_attention, zigzag

B, T, H, K, D, E = 2, 16, 4, 2, 5, 3
PACKED = kernels.Causal() & kernels.Segments()


def mesh(**sizes):
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices
    )


def bent(s, b, h, q, k, strength):
    return s - strength * jnp.abs(q - k)


def lopsided(s, b, h, q, k):
    return s * (1 + h)


def late_rows(b, h, q, k):
    return k <= q + b


# name -> (spec, whether tokens lie in zigzag order).
SPECS = {
    "packed, sink, biases, gate": (
        AttentionSpec(
            mask=PACKED,
            score=(kernels.Bias(), kernels.RelativeBias(3)),
            weight_map=kernels.Softmax("logit"),
            epilogue=kernels.OutputGate("head"),
            return_lse=True,
        ),
        True,
    ),
    "sigmoid, window": (
        AttentionSpec(
            mask=kernels.SlidingWindow(5),
            score=kernels.ScoreFn(bent, ("strength",), ("head",)),
            weight_map=kernels.Sigmoid(-1.0),
        ),
        False,
    ),
    "softplus, low rank, norm": (
        AttentionSpec(
            mask=kernels.Causal(),
            score=(kernels.LowRankBias(), kernels.SoftCap(3.0)),
            weight_map=kernels.SoftplusL1(eps=0.1),
            epilogue=kernels.HeadRMSNorm(eps=0.1),
        ),
        True,
    ),
    "clipped, marks": (
        AttentionSpec(mask=kernels.BlockMask(4, 4), reweight=kernels.Clip(-0.1, 1.05)),
        False,
    ),
}
CASES = [
    ("packed, sink, biases, gate", "ring", {"data": 2, "sequence": 4}),
    ("packed, sink, biases, gate", "all_to_all", {"tensor": 2, "sequence": 2}),
    ("sigmoid, window", "ring", {"tensor": 2, "sequence": 4}),
    ("softplus, low rank, norm", "ring", {"sequence": 8}),
    ("clipped, marks", "all_to_all", {"sequence": 2}),
    ("sigmoid, window", "ring", {"data": 2, "tensor": 2}),
]


def arrays(spec):
    rng = np.random.default_rng(4)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ids = np.repeat([[1, 2, 0, 3]], [7, 4, 2, 3], axis=1)
    ids = jnp.asarray(np.concatenate([ids, ids[:, ::-1]]), jnp.int32)
    pool = {
        "bias": normal(1, H, T, T),
        "relative_bias": normal(H, 7),
        "sink": normal(H),
        "strength": normal(H),
        "bias_q": normal(B, T, H, 2),
        "bias_k": normal(B, T, K, 2),
        "output_gate": normal(B, T, H),
        "head_norm": normal(H, E),
        "block_mask": jnp.asarray(rng.random((1, H, 4, 4)) < 0.5),
        "q_segment_ids": ids,
        "k_segment_ids": ids,
    }
    operands = {operand.name: pool[operand.name] for operand in spec.operands}
    return normal(B, T, H, D), normal(B, T, K, D), normal(B, T, K, E), operands


def in_order(order, spec, operands):
    """Operands of tokens that lie in `order`."""
    axes = {operand.name: operand.axes for operand in spec.operands}
    moved = {}
    for name, x in operands.items():
        for axis, letter in enumerate(axes[name]):
            if letter in "ts" and x.shape[axis] > 1:
                x = jnp.take(x, order, axis)
        moved[name] = x
    places = jnp.asarray(order, jnp.int32)[None]
    return moved | {"q_positions": places, "k_positions": places}


def gradients(attend, spec, q, k, v, operands):
    trained = {n: x for n, x in operands.items() if x.dtype == jnp.float32}

    def total(q, k, v, trained):
        got = attend(q, k, v, spec, operands | trained)
        out, lse = got if spec.return_lse else (got, jnp.zeros(()))
        seen = jnp.where(lse > -1e9, lse, 0)
        return jnp.sum(jnp.sin(2 * out)) + jnp.sum(jnp.cos(seen)), (out, seen)

    run = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))
    return run(q, k, v, trained)


@pytest.mark.parametrize(
    ("name", "form", "sizes"), CASES, ids=lambda x: x if isinstance(x, str) else None
)
def test_devices_together_compute_what_one_does(name, form, sizes):
    spec, moved = SPECS[name]
    devices = mesh(**sizes)
    order = np.arange(T)
    if moved:
        order = zigzag(T, sizes["sequence"])

    def shared_out(q, k, v, spec, operands):
        q, k, v = (jnp.take(x, order, 1) for x in (q, k, v))
        operands = in_order(order, spec, operands) if moved else operands
        got = sharded_attention(q, k, v, spec, operands, mesh=devices, form=form)
        return jax.tree.map(lambda x: jnp.take(x, np.argsort(order), 1), got)

    reference = functools.partial(kernels.attention, implementation="reference")
    wanted = gradients(reference, spec, *arrays(spec))
    got = gradients(shared_out, spec, *arrays(spec))
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, right), left in zip(paths, jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(left, right, atol=5e-6, err_msg=str(path))


def test_a_ring_gathers_nothing_and_lives_in_a_shard_map():
    devices, spec = mesh(sequence=4), AttentionSpec(mask=kernels.Causal())
    q, k, v, _ = arrays(spec)

    def run(q, k, v):
        return sharded_attention(q, k, v, spec, mesh=devices)

    assert "shard_map" in str(jax.make_jaxpr(run)(q, k, v))
    cut = jax.sharding.NamedSharding(devices, jax.P(None, "sequence"))
    text = jax.jit(run, in_shardings=(cut,) * 3).lower(q, k, v).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text


def test_an_offset_moves_every_query():
    devices = mesh(sequence=2)
    spec = AttentionSpec(mask=kernels.Causal())
    q, k, v, _ = arrays(spec)
    q, offset = q[:, 6:14], {"q_offset": jnp.int32(6)}
    got = sharded_attention(q, k, v, spec, offset, mesh=devices)
    wanted = kernels.attention(q, k, v, spec, offset)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_zigzag_balances_causal_work():
    order = zigzag(24, 3)
    assert sorted(order) == list(range(24))
    assert list(order[:8]) == [0, 1, 2, 3, 20, 21, 22, 23]
    work = (order.reshape(3, 8) + 1).sum(1)
    assert len(set(work)) == 1
    with pytest.raises(ValueError, match="multiple of 2 . devices; got length=20"):
        zigzag(20, 3)


def test_what_cannot_be_shared_out_is_refused():
    spec = AttentionSpec()
    q, k, v, _ = arrays(spec)
    run = functools.partial(sharded_attention, q, k, v)
    with pytest.raises(ValueError, match="unknown form 'rings'.*Did you mean ring"):
        run(spec, mesh=mesh(sequence=2), form="rings")
    with pytest.raises(ValueError, match="K must be a multiple of the 4 devices"):
        run(spec, mesh=mesh(tensor=4))
    with pytest.raises(ValueError, match="H=4, K=2, sequence=8. Use ring"):
        run(spec, mesh=mesh(sequence=8), form="all_to_all")
    with pytest.raises(NotImplementedError, match="Use all_to_all"):
        run(AttentionSpec(reweight=kernels.Clip()), mesh=mesh(sequence=2))
    with pytest.raises(ValueError, match="ScoreFn fn=.*lopsided.* reads h"):
        run(AttentionSpec(score=kernels.ScoreFn(lopsided)), mesh=mesh(tensor=2))
    with pytest.raises(ValueError, match="MaskFn fn=.*late_rows.* reads b"):
        mask = kernels.Causal() & kernels.MaskFn(late_rows)
        run(AttentionSpec(mask=mask), mesh=mesh(data=2))
    run(AttentionSpec(score=kernels.ScoreFn(lopsided)), mesh=mesh(data=2))
