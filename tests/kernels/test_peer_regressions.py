"""Ways in which other libraries' attention has been wrong, tried on every form here.

The numbers are those of the project's list of peer complaints.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import AttentionSpec, blocked, reference

T, H, D = 23, 2, 4
CAUSAL = AttentionSpec(mask=kernels.Causal())
PACKED = AttentionSpec(mask=kernels.Causal() & kernels.Segments(), return_lse=True)
FORMS = {
    "reference": reference.run,
    "one tile": blocked.run,
    "blocks": functools.partial(blocked.run, block_sizes=(8, 8)),
}
every_form = pytest.mark.parametrize("form", FORMS)


@functools.partial(jax.jit, static_argnames=("form", "spec"))
def run(form, q, k, v, spec, operands=None):
    operands = operands or {}
    request = kernels.make_request(q, k, v, spec, operands, kernels.default_target())
    return FORMS[form](request, q, k, v, operands)


def qkv(batch=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (batch, T, H, D)) for key in keys]


def padded_ids(valid):
    ids = jnp.broadcast_to((jnp.arange(T) < valid).astype(jnp.int32), (2, T))
    return {"q_segment_ids": ids, "k_segment_ids": ids}


@every_form
def test_padding_does_not_leak_2_4(form):
    """Pad tokens change neither valid outputs nor gradients, and get none."""
    ids, valid = padded_ids(17), np.arange(T) < 17

    def total(q, k, v):
        out, lse = run(form, q, k, v, PACKED, ids)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(valid[:, None], lse, 0))

    clean = qkv()
    dirty = [x.at[:, 17:].mul(1e4) for x in clean]
    for left, right in zip(
        jax.grad(total, (0, 1, 2))(*clean),
        jax.grad(total, (0, 1, 2))(*dirty),
        strict=True,
    ):
        np.testing.assert_array_equal(left[:, :17], right[:, :17])
        assert not left[:, 17:].any()
        assert not right[:, 17:].any()
    for left, right in zip(
        run(form, *clean, PACKED, ids), run(form, *dirty, PACKED, ids), strict=True
    ):
        np.testing.assert_array_equal(left, right)


@every_form
def test_packing_equals_separate_documents_2_4(form):
    q, k, v = qkv(batch=1)
    ids = jnp.asarray(np.repeat([[1, 2]], [9, 14], axis=1))
    got, _ = run(form, q, k, v, PACKED, {"q_segment_ids": ids, "k_segment_ids": ids})
    for part in (slice(0, 9), slice(9, T)):
        alone, _ = run(form, q[:, part], k[:, part], v[:, part], CAUSAL)
        np.testing.assert_allclose(got[:, part], alone, atol=1e-6)


EMPTY = {
    "padding": (PACKED, padded_ids(0)),
    "no such key": (CAUSAL, {"kv_mask": jnp.zeros((2, T), bool)}),
    "before every key": (CAUSAL, {"q_offset": jnp.int32(-T)}),
    "bias of -inf": (
        AttentionSpec(score=kernels.Bias(), return_lse=True),
        {"bias": jnp.full((1, 1, T, T), -jnp.inf)},
    ),
}


@every_form
@pytest.mark.parametrize("how", EMPTY)
def test_rows_that_see_nothing_are_zero_and_not_nan_2_5(form, how):
    spec, operands = EMPTY[how]

    def total(*x):
        out, lse = run(form, *x, spec, operands)
        return jnp.sum(jnp.cos(out)), (out, lse)

    d_qkv, (out, lse) = jax.grad(total, (0, 1, 2), has_aux=True)(*qkv())
    assert not out.any()
    np.testing.assert_array_equal(lse, -np.inf)
    for gradient in d_qkv:
        assert not gradient.any()


MAPS = {
    "softpick": kernels.Softpick(),
    "polynomial": kernels.Polynomial(eps=0.0),
    "bounded softmax": kernels.Softmax(bound=30.0),
}


@every_form
@pytest.mark.parametrize("name", MAPS)
def test_pad_keys_stay_out_of_every_normaliser_2_4(form, name):
    """Also of maps that are not 0 where softmax is, with every gradient."""
    spec = dataclasses.replace(PACKED, weight_map=MAPS[name])
    ids, valid = padded_ids(17), slice(0, 17)

    def total(q, k, v):
        out, lse = run(form, q, k, v, spec, ids)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse[:, valid])

    def grads(k_scale, v_scale):
        q, k, v = qkv()
        k, v = k.at[:, 17:].mul(k_scale), v.at[:, 17:].mul(v_scale)
        return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

    for left, right in zip(grads(1.0, 1.0), grads(1e4, 1e4), strict=True):
        np.testing.assert_array_equal(left, right)
        assert not left[:, 17:].any()
        assert jnp.isfinite(left).all()


@every_form
@pytest.mark.parametrize("name", [*MAPS, "sharpened", "gated and normed"])
def test_rows_that_see_nothing_stay_zero_in_every_variant_2_5(form, name):
    steps = {"sharpened": {"reweight": kernels.Sharpen(15)}}
    late = (kernels.OutputGate("head"), kernels.HeadRMSNorm(), kernels.HeadScale())
    steps["gated and normed"] = {"epilogue": late}
    extra = steps.get(name, {"weight_map": MAPS.get(name)})
    spec = dataclasses.replace(PACKED, return_lse=False, **extra)
    pool = {
        "visible_keys": jnp.zeros((1, 1, 1)),
        "sharpen_offset": jnp.ones((1, 1, 1)),
        "output_gate": jnp.ones((2, T, H)),
        "head_norm": jnp.ones((1, 1)),
        "head_scale": jnp.ones(H),
    }
    operands = {op.name: pool[op.name] for op in spec.operands if op.name in pool}

    def total(*x):
        out, _ = run(form, *x, spec, operands | padded_ids(0))
        return jnp.sum(jnp.cos(out)), out

    d_qkv, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*qkv())
    assert not out.any()
    for gradient in d_qkv:
        assert not gradient.any()


@every_form
@pytest.mark.parametrize("sink", ["logit", "off_by_one"])
def test_rows_that_see_only_the_sink_are_zero_2_5(form, sink):
    spec = AttentionSpec(
        mask=kernels.Segments(), weight_map=kernels.Softmax(sink=sink), return_lse=True
    )
    operands = padded_ids(0)
    if sink == "logit":
        operands["sink"] = jnp.array([0.5, -2.0])
    out, lse = run(form, *qkv(), spec, operands)
    assert not out.any()
    wanted = operands.get("sink", jnp.zeros(H))
    np.testing.assert_allclose(lse, jnp.broadcast_to(wanted, lse.shape), atol=1e-7)


@every_form
@pytest.mark.parametrize("left", [0, 3, T])
def test_left_window_never_sees_the_future_2_6(form, left):
    spec = AttentionSpec(mask=kernels.SlidingWindow(left))
    q, k, v = qkv()
    before, _ = run(form, q, k, v, spec)
    at = 11
    after, _ = run(form, q, k.at[:, at:].add(3.0), v.at[:, at:].add(3.0), spec)
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert (before[:, at] != after[:, at]).any()


def every_third(b, h, q, k):
    return ((q - k) % 3 == 0) & (k <= q)


@every_form
def test_custom_mask_gradients_are_those_of_the_dense_form_2_6(form):
    spec = AttentionSpec(mask=kernels.MaskFn(every_third))
    reachable = np.array(
        [[(i - j) % 3 == 0 and j <= i for j in range(T)] for i in range(T)]
    )

    def dense(q, k, v):
        s = jnp.einsum("bthd,bshd->bhts", q, k) / 2
        w = jax.nn.softmax(jnp.where(reachable, s, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", w, v)

    def total(attend):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2))

    got = total(lambda *x: run(form, *x, spec)[0])(*qkv())
    for left, right in zip(got, total(dense)(*qkv()), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.parametrize("form", ["one tile", "blocks"])
@pytest.mark.parametrize("shape", [(3, H, T, T), (1, H, T, T), (3, 1, 1, T)])
def test_bias_has_its_gradient_at_any_batch_2_7(form, shape):
    """Batches above 1 and biases shared over any axis."""
    bias = jax.random.normal(jax.random.key(5), shape)
    q, k, v = qkv(batch=3)
    spec = AttentionSpec(mask=kernels.Causal(), score=kernels.Bias())

    def dense(bias):
        s = jnp.einsum("bthd,bshd->bhts", q, k) / 2 + bias
        w = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), s, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", w, v)

    def fused(bias):
        return run(form, q, k, v, spec, {"bias": bias})[0]

    got, wanted = (
        jax.grad(lambda b, f=f: jnp.sum(jnp.sin(f(b))))(bias) for f in (fused, dense)
    )
    assert got.shape == shape
    np.testing.assert_allclose(got, wanted, atol=2e-6)


def warmed(s, b, h, q, k, temperature):
    return s * temperature


@every_form
def test_learned_scalars_have_gradients_2_7(form):
    spec = AttentionSpec(
        mask=kernels.Causal(),
        score=kernels.ScoreFn(warmed, ("temperature",), ("table",)),
    )
    q, k, v = qkv()

    def total(temperature):
        operands = {"temperature": jnp.asarray(temperature, jnp.float32)}
        out, _ = run(form, q, k, v, spec, operands)
        return jnp.sum(jnp.sin(out))

    got = jax.grad(total)(jnp.float32(1.3))
    step = 1e-2
    slope = (total(1.3 + step) - total(1.3 - step)) / (2 * step)
    np.testing.assert_allclose(got, slope, rtol=1e-3)


@every_form
def test_sinks_gates_and_scales_have_gradients_2_7(form):
    """Numbers that a fused kernel captures are trained, not held."""
    late = (kernels.OutputGate("head"), kernels.HeadScale())
    sinks = kernels.Softmax(sink="logit")
    spec = AttentionSpec(mask=kernels.Causal(), weight_map=sinks, epilogue=late)
    operands = {
        "sink": jnp.array([0.5, -1.0]),
        "output_gate": jax.random.normal(jax.random.key(8), (2, T, H)),
        "head_scale": jnp.array([1.5, 0.7]),
    }

    @jax.jit
    def total(operands):
        return jnp.sum(jnp.sin(run(form, *qkv(), spec, operands)[0]))

    got, step = jax.jit(jax.grad(total))(operands), 1e-2
    for name, x in operands.items():
        up, down = (total(operands | {name: x + sign * step}) for sign in (1, -1))
        slope = (up - down) / (2 * step)
        np.testing.assert_allclose(got[name].sum(), slope, rtol=2e-3, atol=2e-3)


@every_form
def test_traced_mask_arrays_keep_one_compilation_2_8(form):
    """Mask arrays are operands: new values neither retrace nor fall back."""
    traces = []

    @jax.jit
    def step(ids):
        traces.append(form)
        operands = {"q_segment_ids": ids, "k_segment_ids": ids}
        return run(form, *qkv(), PACKED, operands)[0]

    first = step(jnp.ones((2, T), jnp.int32))
    second = step(padded_ids(5)["q_segment_ids"])
    assert len(traces) == 1
    assert (first[:, 5:] != 0).any()
    assert not second[:, 5:].any()


LINEAR = kernels.LinearSpec("token", normalise=True)


@pytest.mark.parametrize("form", ["reference", "blocked"])
def test_pad_keys_stay_out_of_the_recurrences_normaliser_2_4(form):
    """Nor does a row that is padding alone divide by an empty sum."""
    ids = jnp.where(jnp.arange(T) < jnp.asarray([[17], [0]]), 1, 0)
    decay = -jnp.ones((2, T, H)) / 8

    def total(q, k, v):
        operands = {"log_decay": decay, "segment_ids": ids}
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        out = kernels.linear_attention(q, k, v, LINEAR, operands, implementation=form)
        return jnp.sum(jnp.sin(out) * (ids != 0)[..., None, None]), out

    both = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    clean = qkv()
    dirty = [jnp.where((ids != 0)[..., None, None], x, 1e4) for x in clean]
    (_, left), d_left = both(*clean)
    (_, right), d_right = both(*dirty)
    np.testing.assert_array_equal(left[0, :17], right[0, :17])
    assert np.isfinite(left).all()
    for one, other in zip(d_left, d_right, strict=True):
        np.testing.assert_array_equal(one[0, :17], other[0, :17])
        assert not one[0, 17:].any()
        assert not one[1].any()


FEW = {
    "reference": reference.run,
    "reading the cache where it lies": functools.partial(
        blocked.run, block_sizes=(3, 8)
    ),
}


@pytest.mark.parametrize("form", FEW)
def test_a_step_that_sees_nothing_or_the_past_alone_2_5_and_2_6(form):
    """Decoding is a path of its own: one row before every key, one in the middle."""
    spec = AttentionSpec(mask=kernels.SlidingWindow(5), return_lse=True)
    q, k, v = qkv()
    place = {"q_offset": jnp.asarray([-9, 11], jnp.int32)}
    request = kernels.make_request(
        q[:, :3], k, v, spec, place, kernels.default_target()
    )

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def step(q, k, v):
        out, lse = FEW[form](request, q, k, v, place)
        return jnp.sum(jnp.cos(out)), (out, lse)

    d_before, (before, lse) = step(q[:, :3], k, v)
    later = (x.at[:, 14:].add(3.0) for x in (k, v))
    d_after, (after, _) = step(q[:, :3], *later)
    assert not before[0].any()
    np.testing.assert_array_equal(lse[0], -np.inf)
    np.testing.assert_array_equal(before, after)
    for left, right in zip(d_before, d_after, strict=True):
        assert not left[0].any()
        np.testing.assert_array_equal(left, right)


def test_cudnn_is_told_that_a_left_window_is_causal_2_6(monkeypatch):
    """Without the flag its window of (left, 0) sees all of the future."""
    told = {}

    def note(q, k, v, bias, **settings):
        del k, v, bias
        told.update(settings)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", note)
    h200 = kernels.Target("gpu", "NVIDIA H200")
    spec = AttentionSpec(mask=kernels.SlidingWindow(3))
    arrays = [x.astype(jnp.bfloat16) for x in qkv()]
    arrays = [jnp.pad(x, ((0, 0),) * 3 + ((0, 4),)) for x in arrays]
    kernels.attention(*arrays, spec, implementation="cudnn", target=h200)
    assert told["is_causal"] is True
    assert told["local_window_size"] == (3, 0)


@every_form
def test_a_mask_of_keys_alone_needs_neither_queries_nor_bias_2_7(form):
    keep = np.arange(T) % 3 != 1
    q, k, v = qkv()
    spec = AttentionSpec()
    got, _ = run(form, q, k, v, spec, {"kv_mask": jnp.asarray(keep)[None]})
    wanted, _ = run("reference", q, k[:, keep], v[:, keep], spec)
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("name", ["TPU v5 lite", "NVIDIA H200"])
def test_kernels_outside_shard_map_are_not_taken_for_a_mesh_2_8(name):
    """The compiler would gather every shard for a call that it cannot split."""
    own = "tpu" if "TPU" in name else "gpu"
    target = kernels.Target(own, name, num_devices=4)
    shape = jax.ShapeDtypeStruct((4, 256, 2, 128), jnp.bfloat16)
    lines = kernels.explain(shape, shape, shape, CAUSAL, target=target)
    assert f"mosaic_{own}" not in lines[0]
    reason = "has to sit inside shard_map in a program for 4 devices"
    assert f"mosaic_{own}: {reason}" in lines
