"""Linear attention on eight devices equals linear attention on one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import LinearSpec, sharded_linear_attention

B, T, H, K, D, E = 4, 8, 4, 2, 5, 3
IDS = np.repeat([[1, 2, 0, 3]], [2, 2, 3, 1], axis=1)
IDS = np.concatenate([IDS, IDS[:, ::-1], np.ones((2, T), int)]).astype(np.int32)


def mesh(**sizes):
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices
    )


def arrays(spec):
    rng = np.random.default_rng(4)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    shapes = {"head": (K,), "token": (B, T, K), "channel": (B, T, K, D)}
    trained = {"initial_state": normal(B, K, D, E + spec.normalise)}
    if spec.decay in shapes:
        trained["log_decay"] = -jnp.abs(normal(*shapes[spec.decay]))
    if spec.delta:
        trained["beta"] = jax.nn.sigmoid(normal(B, T, K))
    qkv = normal(B, T, H, D), normal(B, T, K, D) / 3, normal(B, T, K, E)
    return *qkv, trained


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (LinearSpec("head", chunk_size=4), {"data": 2, "fsdp": 2, "tensor": 2}),
        (LinearSpec("channel", True, chunk_size=4), {"data": 4, "tensor": 2}),
        (LinearSpec(normalise=True, chunk_size=4), {"data": 2, "tensor": 2}),
        (LinearSpec("channel", chunk_size=4), {"data": 2, "sequence": 4}),
        (LinearSpec("token", True, chunk_size=4), {"tensor": 2, "sequence": 4}),
        (LinearSpec("head", normalise=True, scale=0.3), {"data": 4, "sequence": 2}),
    ],
    ids=[
        "decay by head",
        "delta rule",
        "normalised",
        "tokens, decay by channel",
        "tokens, delta rule",
        "tokens, normalised",
    ],
)
def test_devices_together_compute_what_one_does(spec, sizes):
    spec = LinearSpec(**vars(spec) | {"return_state": True})
    fixed = {"segment_ids": IDS, "initial_segment": np.array([1, 5, 1, 1], np.int32)}

    def gradients(attend):
        def total(q, k, v, trained):
            if spec.normalise:
                q, k = jnp.abs(q), jnp.abs(k)
                trained |= {"initial_state": jnp.abs(trained["initial_state"])}
            out, state = attend(q, k, v, spec, fixed | trained)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state)), (out, state)

        run = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))
        return run(*arrays(spec))

    reference = functools.partial(kernels.linear_attention, implementation="reference")
    shared = functools.partial(sharded_linear_attention, mesh=mesh(**sizes))
    with jax.enable_x64(True):
        wanted, got = gradients(reference), gradients(shared)
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, right), left in zip(paths, jax.tree.leaves(got), strict=True):
        assert left.dtype == np.float64
        np.testing.assert_allclose(left, right, atol=1e-11, err_msg=str(path))


def test_a_device_needs_no_other():
    devices, spec = mesh(data=4, tensor=2), LinearSpec("token", chunk_size=4)
    q, k, v, operands = arrays(spec)
    place = jax.sharding.NamedSharding(devices, jax.P("data", None, "tensor"))

    def run(q, k, v):
        given = {"log_decay": operands["log_decay"]}
        return sharded_linear_attention(q, k, v, spec, given, mesh=devices)

    lowered = jax.jit(run, in_shardings=(place,) * 3).lower(q, k, v)
    text = lowered.compile().as_text()
    assert not any(word in text for word in ("all-", "collective", "reduce-scatter"))


def test_what_cannot_be_shared_out_is_refused():
    q, k, v, _ = arrays(LinearSpec())
    run = functools.partial(sharded_linear_attention, q, k, v)
    with pytest.raises(ValueError, match="T must be a multiple of the 8 devices"):
        sharded_linear_attention(q[:, :7], k[:, :7], v[:, :7], mesh=mesh(sequence=8))
    with pytest.raises(ValueError, match="B must be a multiple of the 8 devices"):
        run(mesh=mesh(data=8))
    with pytest.raises(ValueError, match="K must be a multiple of the 4 devices"):
        run(mesh=mesh(tensor=4))
