"""The chunked form against the float64 recurrence, forward and backward."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels

BATCH, LENGTH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 21, 4, 2, 5, 3
FLAGS = [
    (decay, delta, normalise, packed)
    for decay, delta, normalise, packed in itertools.product(
        ("none", "head", "token", "channel"), (False, True), (False, True), (0, 1)
    )
    if not (delta and normalise)
]


def flag_id(flags):
    decay, delta, normalise, packed = flags
    words = [decay, "delta" * delta, "normalised" * normalise, "packed" * packed]
    return "-".join(word for word in words if word)


def jitted(function):
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)


@functools.cache
def program(spec, implementation="auto"):
    """The compiled function of (arrays, operands)."""
    return jitted(
        lambda arrays, operands: kernels.linear_attention(
            *arrays, spec, operands, implementation=implementation
        )
    )


def make_arrays(spec, *, packed=False, length=LENGTH, dtype="float64", seed=0):
    """q, k, v and the operands of `spec`, in ranges in which every flag matters."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    q = draw(BATCH, length, HEADS, DIM)
    k = draw(BATCH, length, KV_HEADS, DIM)
    v = draw(BATCH, length, KV_HEADS, VALUE_DIM)
    if spec.normalise:
        q, k = jnp.abs(q) + 0.1, jnp.abs(k) + 0.1
    if spec.delta:
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    shape = {
        "head": (KV_HEADS,),
        "token": k.shape[:3],
        "channel": k.shape,
    }.get(spec.decay)
    operands = {"initial_state": draw(BATCH, KV_HEADS, DIM, VALUE_DIM + spec.normalise)}
    if spec.normalise:
        operands["initial_state"] = jnp.abs(operands["initial_state"]) + 0.1
    if shape:
        operands["log_decay"] = -jnp.abs(draw(*shape)) * 0.4
    if spec.delta:
        operands["beta"] = jax.nn.sigmoid(draw(BATCH, length, KV_HEADS)) * 1.5
    if packed:
        ids = np.sort(rng.integers(1, 5, (BATCH, length)), axis=1)
        ids[0, 3] = ids[1, -1] = ids[1, 0] = 0
        operands["segment_ids"] = jnp.asarray(ids, jnp.int32)
        operands["initial_segment"] = jnp.asarray([ids[0, 0], 9], jnp.int32)
    return (q, k, v), operands


def by_hand(spec, arrays, operands):
    """The equations of LinearSpec in numpy, one head and token at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    batch, length, heads, dim = q.shape
    shared = k.shape[2]
    if spec.normalise:
        v = np.concatenate([v, np.ones_like(v[..., :1])], -1)
    states = np.array(operands["initial_state"], np.float64)
    out = np.zeros((batch, length, heads, v.shape[-1]))
    ids = operands.get("segment_ids", np.ones((batch, length), np.int32))
    for b, head in itertools.product(range(batch), range(shared)):
        state, current = (
            states[b, head],
            int(operands.get("initial_segment", [0] * 9)[b]),
        )
        for t in range(length):
            if ids[b, t] == 0:
                continue
            if current not in (0, int(ids[b, t])):
                state = np.zeros_like(state)
            current = int(ids[b, t])
            decay = np.ones(dim)
            if spec.decay != "none":
                log = np.asarray(operands["log_decay"], np.float64)
                log = log[head] if spec.decay == "head" else log[b, t, head]
                decay = np.exp(log) * decay
            key, state = k[b, t, head], decay[:, None] * state
            write = np.outer(key, v[b, t, head])
            if spec.delta:
                beta = float(operands["beta"][b, t, head])
                state = (np.eye(dim) - beta * np.outer(key, key)) @ state
                write = beta * write
            state = state + write
            for row in range(head * heads // shared, (head + 1) * heads // shared):
                out[b, t, row] = (spec.scale or 1) * q[b, t, row] @ state
        states[b, head] = state
    if spec.normalise:
        mass = out[..., -1:]
        out = np.where(mass != 0, out[..., :-1] / np.where(mass != 0, mass, 1), 0)
    return out, states


def loss_of(spec, implementation):
    """A scalar of output and state in which every entry has its own weight."""

    def loss(arrays, floats, ids):
        out, state = kernels.linear_attention(
            *arrays, spec, {**floats, **ids}, implementation=implementation
        )
        weigh = lambda x: jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape)))  # noqa: E731
        return weigh(out) + weigh(state), (out, state)

    return jitted(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def split_ids(operands):
    floats = {n: x for n, x in operands.items() if "segment" not in n}
    return floats, {n: x for n, x in operands.items() if "segment" in n}


def close(found, wanted, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        wanted,
    )


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("flags", FLAGS, ids=flag_id)
def test_blocked_equals_the_recurrence_with_every_gradient(flags):
    decay, delta, normalise, packed = flags
    spec = kernels.LinearSpec(
        decay, delta, normalise, scale=0.7, chunk_size=16, return_state=True
    )
    arrays, operands = make_arrays(spec, packed=packed)
    floats, ids = split_ids(operands)
    wanted = loss_of(spec, "reference")(arrays, floats, ids)
    found = loss_of(spec, "blocked")(arrays, floats, ids)
    close(wanted[0][1], by_hand(spec, arrays, operands), 1e-9)
    close(found, wanted, 1e-9)
    for gradient in jax.tree.leaves(wanted[1]):
        assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 32])
@pytest.mark.parametrize("delta", [False, True])
def test_output_does_not_depend_on_the_chunk_size(chunk_size, delta):
    spec = kernels.LinearSpec(
        "channel", delta, chunk_size=chunk_size, return_state=True
    )
    arrays, operands = make_arrays(spec, packed=True)
    wanted = program(spec, "reference")(arrays, operands)
    close(program(spec)(arrays, operands), wanted, 1e-10)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("delta", [False, True])
def test_extreme_decays_stay_finite_with_the_right_gradients(decay, delta):
    spec = kernels.LinearSpec(decay, delta, chunk_size=16, return_state=True)
    arrays, operands = make_arrays(spec)
    shape = operands["log_decay"].shape
    extreme = np.random.default_rng(1).choice([-50.0, 0.0, -1e-3], shape)
    operands["log_decay"] = jnp.asarray(extreme)
    wanted = loss_of(spec, "reference")(arrays, operands, {})
    close(loss_of(spec, "blocked")(arrays, operands, {}), wanted, 1e-9)
    narrow = jax.tree.map(lambda x: x.astype("float32"), (arrays, operands))
    # Sums of log-decays near -500 carry an error of 500 * 2**-24 in float32.
    close(loss_of(spec, "blocked")(*narrow, {}), wanted, 2e-3)


def test_constant_decay_of_minus_fifty_forgets_everything():
    spec = kernels.LinearSpec("channel", chunk_size=16)
    (q, k, v), operands = make_arrays(spec, dtype="float32", length=37)
    operands["log_decay"] = jnp.full_like(operands["log_decay"], -50)
    found = program(spec)((q, k, v), operands)
    alone = jnp.einsum("bthd,bthd->bth", q, jnp.repeat(k, 2, 2))[..., None]
    close(found, alone * jnp.repeat(v, 2, 2), 1e-5)


@pytest.mark.parametrize("decay", ["none", "channel"])
def test_packed_documents_equal_documents_alone(decay):
    spec = kernels.LinearSpec(decay, delta=decay != "none", chunk_size=8)
    arrays, operands = make_arrays(spec)
    del operands["initial_state"]
    cuts = [0, 5, 6, 16, LENGTH]
    lengths = np.diff(cuts)
    ids = np.repeat(np.arange(1, 5), lengths)[None].repeat(BATCH, 0)
    run = program(spec)
    packed = run(arrays, {**operands, "segment_ids": jnp.asarray(ids)})
    for start, end in itertools.pairwise(cuts):
        some, part = jax.tree.map(lambda x: x[:, start:end], (arrays, operands))  # noqa: B023
        close(packed[:, start:end], run(some, part), 1e-10)


@pytest.mark.parametrize("flags", FLAGS[::2], ids=flag_id)
def test_cuts_into_steps_equal_the_whole(flags):
    decay, delta, normalise, _ = flags
    spec = kernels.LinearSpec(decay, delta, normalise, chunk_size=4, return_state=True)
    arrays, operands = make_arrays(spec, length=7)
    run = program(spec)
    step = jitted(
        lambda arrays, state, operands: kernels.linear_attention_step(
            *arrays, state, spec, operands
        )
    )
    whole = run(arrays, operands)
    state, found = operands.pop("initial_state"), []

    def take(start, end):
        return jax.tree.map(
            lambda x: x[:, start:end] if x.ndim > 2 else x, (arrays, operands)
        )

    some, part = take(0, 4)
    part["initial_state"] = state
    out, state = run(some, part)
    found.append(out)
    for t in range(4, 7):
        some, part = take(t, t + 1)
        out, state = step(some, state, part)
        found.append(out)
    close((jnp.concatenate(found, 1), state), whole, 1e-10)


def test_a_step_into_another_document_starts_from_nothing():
    spec = kernels.LinearSpec()
    (q, k, v), operands = make_arrays(spec, length=1)
    ids = {
        "segment_ids": jnp.asarray([[4], [2]], jnp.int32),
        "initial_segment": jnp.asarray([4, 1], jnp.int32),
    }
    _, state = kernels.linear_attention_step(
        q, k, v, operands["initial_state"], spec, ids
    )
    write = k[:, 0, :, :, None] * v[:, 0, :, None, :]
    close(state[0], operands["initial_state"][0] + write[0], 1e-12)
    close(state[1], write[1], 1e-12)


def test_bfloat16_keeps_its_dtype_and_a_float32_state():
    spec = kernels.LinearSpec("token", True, return_state=True)
    arrays, operands = make_arrays(spec)
    wanted, _ = program(spec)(arrays, operands)
    narrow = tuple(x.astype("bfloat16") for x in arrays)
    out, state = program(spec)(narrow, operands)
    assert out.dtype == "bfloat16" and state.dtype == "float32"
    assert np.quantile(np.abs(out.astype("float64") - wanted), 0.9) < 0.05


def test_backward_pass_keeps_less_than_the_states_of_all_tokens():
    spec = kernels.LinearSpec("token", True, chunk_size=16, return_state=True)
    (q, k, v), operands = make_arrays(spec, length=256, dtype="float32")
    loss = lambda q: jnp.sum(kernels.linear_attention(q, k, v, spec, operands)[0])  # noqa: E731
    kept = jax.eval_shape(lambda q: jax.vjp(loss, q)[1], q)
    sizes = [x.size for x in jax.tree.leaves(kept)]
    assert max(sizes) <= max(q.size, k.size, v.size)


def test_output_ignores_future_tokens():
    spec = dataclasses.replace(kernels.LinearSpec("channel", True), chunk_size=8)
    arrays, operands = make_arrays(spec)
    later = jnp.arange(LENGTH)[:, None, None] > 9
    changed = [jnp.where(later, x + 1, x) for x in arrays]
    run = program(spec)
    close(run(tuple(changed), operands)[:, :10], run(arrays, operands)[:, :10], 1e-12)
