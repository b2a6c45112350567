"""The Hopper kernels of the recurrence, interpreted on the CPU, against float64."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnjax import kernels
from attnjax.kernels.linear import mosaic_gpu, reference
from attnjax.kernels.linear.inputs import finish, prepare
from attnjax.kernels.linear.mosaic_gpu import inverse, pairs, wide
from attnjax.kernels.linear.request import make_request

H200 = kernels.Target("gpu", "NVIDIA H200")
# Relative to the norm of the whole array: factors of products are rounded to 8 bits.
TOLERANCE = 6e-3
# Decays of one number a head, whose gradient is a sum over all tokens of terms that
# cancel; and dq with a normaliser, in which what comes through sums of weights cancels
# what comes through values.
CANCELLED = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A spec with sizes B, T, H, K, D, E."""

    decay: str = "none"
    delta: bool = False
    normalise: bool = False
    packed: bool = False
    sizes: tuple[int, ...] = (1, 70, 1, 1, 64, 64)

    def __str__(self):
        flags = "delta", "normalise", "packed"
        return "-".join([self.decay, *(x for x in flags if getattr(self, x))])

    @property
    def spec(self):
        flags = self.decay, self.delta, self.normalise
        return kernels.LinearSpec(*flags, scale=0.125, return_state=True)


INTERPRETED = {
    "none, two heads, wide": Case(sizes=(1, 20, 2, 2, 128, 64)),
    "head, two rows": Case("head", sizes=(2, 20, 1, 1, 64, 64)),
    "token, packed, grouped heads": Case(
        "token", packed=True, sizes=(1, 70, 2, 1, 40, 64)
    ),
    "token, delta": Case("token", True),
    "channel, normalised, grouped heads": Case(
        "channel", normalise=True, sizes=(1, 40, 2, 1, 64, 100)
    ),
    "channel, delta, packed": Case("channel", True, packed=True),
}
LOWERED = [
    Case(*flags)
    for flags in (
        ("none", False, False, False, (2, 256, 4, 2, 128, 128)),
        ("none", True, False, True, (2, 100, 4, 2, 64, 64)),
        ("head", False, False, False, (2, 256, 4, 4, 128, 64)),
        ("head", False, True, True, (2, 77, 4, 1, 80, 128)),
        ("token", False, True, False, (1, 64, 2, 2, 128, 128)),
        ("token", True, False, True, (2, 256, 2, 2, 128, 128)),
        ("channel", False, True, True, (2, 100, 4, 2, 64, 128)),
        ("channel", True, False, False, (1, 256, 4, 2, 128, 128)),
        ("head", False, True, False, (1, 64, 2, 2, 192, 80)),
        ("token", True, False, False, (1, 64, 2, 2, 64, 256)),
    )
]


def inputs(case):
    """(q, k, v), float operands, integer operands, cotangents of output and state."""
    b, t, h, kv, d, e = case.sizes
    rng = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = normal(b, t, h, d), normal(b, t, kv, d), normal(b, t, kv, e)
    state = normal(b, kv, d, e + case.normalise)
    if case.normalise:
        q, k, state = jnp.abs(q) + 0.1, jnp.abs(k) + 0.1, jnp.abs(state) + 0.1
    if case.delta:
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    floats, ids = {"initial_state": state}, {}
    shapes = {"head": (kv,), "token": (b, t, kv), "channel": (b, t, kv, d)}
    if case.decay != "none":
        floats["log_decay"] = -jnp.abs(normal(*shapes[case.decay])) * 0.3
    if case.delta:
        floats["beta"] = jax.nn.sigmoid(normal(b, t, kv)) * 1.5
    if case.packed:
        row = np.repeat([1, 2, 0, 3, 4], [t // 3, 4, 2, t // 4, t])[:t]
        rows = np.stack([row, np.where(row == 2, 1, row)][:b])
        ids["segment_ids"] = jnp.asarray(rows, jnp.int32)
        ids["initial_segment"] = jnp.asarray([1, 9][:b], jnp.int32)
    cotangents = normal(b, t, h, e).astype(jnp.bfloat16), normal(*state.shape)
    return [x.astype(jnp.bfloat16) for x in (q, k, v)], floats, ids, cotangents


def gradients(case, run, target):
    """(qkv, floats, ids, cotangents) -> gradients of a random projection, values."""

    def of(qkv, floats, ids, cotangents):
        def project(qkv, floats):
            operands = floats | ids
            request = make_request(*qkv, case.spec, operands, target)
            out, state = run(request, prepare(request, *qkv, operands))
            out = finish(request, out, operands)
            total = sum(
                jnp.sum(x.astype(state.dtype) * ct.astype(state.dtype))
                for x, ct in zip((out, state), cotangents, strict=True)
            )
            return total, (out, state)

        return jax.grad(project, argnums=(0, 1), has_aux=True)(qkv, floats)

    return jax.jit(of)


def widened(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        tree,
    )


@pytest.fixture
def interpreter(capsys):
    """Parameters of the interpreter, which must find no race."""
    module = pytest.importorskip(
        "jax._src.pallas.mosaic_gpu.interpret.params",
        reason="this jax has no interpreter of Mosaic GPU kernels",
    )
    yield module.InterpretGPUParams(detect_races=True)
    # Each kernel starts with a clean record of races: the report is what stays.
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.pallas
@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_equal_the_float64_recurrence_without_races(name, interpreter):
    case = INTERPRETED[name]
    given = inputs(case)

    def run(*args):
        return mosaic_gpu.run(*args, interpret=interpreter)

    got = jax.block_until_ready(gradients(case, run, H200)(*given))
    with jax.enable_x64(True):
        oracle = gradients(case, reference.run, kernels.Target("cpu"))
        wanted = oracle(*widened(given))
        paths = jax.tree_util.tree_leaves_with_path(wanted)
        for (path, right), left in zip(paths, jax.tree.leaves(got), strict=True):
            error = jnp.linalg.norm(left.astype(jnp.float64) - right)
            allowed = TOLERANCE * jnp.linalg.norm(right)
            name = jax.tree_util.keystr(path)
            of_head = case.decay == "head" and name.endswith("['log_decay']")
            if of_head or (case.normalise and name == "[0][0][0]"):
                allowed *= CANCELLED
            assert error <= allowed, (path, float(error))


@pytest.mark.pallas
def test_pairs_of_extreme_decays_by_channel_are_right(interpreter):
    rng = np.random.default_rng(7)
    shape = (1, 64, 1, 64)
    q, k = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in "qk")
    log_decay = jnp.asarray(
        rng.choice([-50.0, -1e-3, 0.0], shape, p=[0.02, 0.49, 0.49])
    )
    cotangent = jnp.asarray(rng.normal(size=(1, 1, 64, 64)))

    def run(make):
        def total(*args):
            weights = make(*args)
            return jnp.sum(weights * cotangent.astype(weights.dtype)), weights

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))

    def exact(q, k, log_decay):
        g = jnp.cumsum(log_decay, axis=1)[0, :, 0]
        lower = jnp.tri(64, dtype=bool)[..., None]
        faded = jnp.exp(jnp.where(lower, g[:, None] - g[None], -jnp.inf))
        return jnp.einsum("td,sd,tsd->ts", q[0, :, 0], k[0, :, 0], faded)[None, None]

    how = pairs.How("float32", interpreter)
    got = run(functools.partial(pairs.pair_weights, how))(q, k, log_decay)
    with jax.enable_x64(True):
        wanted = run(exact)(*widened((q, k, log_decay)))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        left, right = (np.asarray(x, np.float64) for x in (left, right))
        error = np.linalg.norm(left - right)
        assert error <= TOLERANCE * np.linalg.norm(right)


@pytest.mark.pallas
def test_triangles_are_inverted_to_sixteen_bits(interpreter):
    a = np.tril(np.random.default_rng(8).normal(size=(1, 1, 64, 64)) * 0.3, -1)
    run = jax.jit(functools.partial(inverse.triangle_inverse, interpreter))
    got = np.asarray(run(jnp.asarray(a, jnp.float32)), np.float64)
    wanted = np.linalg.inv(np.eye(64) + a)
    assert np.abs(wanted).max() > 8
    assert np.linalg.norm(got - wanted) <= 2**-14 * np.linalg.norm(wanted)


def shapes_of(case):
    return jax.eval_shape(lambda: inputs(case))


@pytest.mark.pallas
@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_forward_and_backward_lower_for_cuda(case):
    traced = gradients(case, mosaic_gpu.run, H200).trace(*shapes_of(case))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels_of = re.findall(r"@mosaic_gpu_v2\b", text)
    # Forward: states, outputs; backward: states, states back, rows, columns. The delta
    # rule adds two products with states and its inverse twice, decays by channel their
    # pairs twice and back, of keys with keys too.
    wanted = 6 + 4 * case.delta
    wanted += 3 * (1 + case.delta) if case.decay == "channel" else 0
    wanted *= math.prod(-(-size // 128) for size in case.sizes[4:])
    assert len(kernels_of) == wanted


@pytest.mark.pallas
def test_kernels_lower_under_vmap_and_inside_shard_map():
    case = Case("token", True, packed=True, sizes=(2, 100, 4, 2, 64, 64))
    run = gradients(case, mosaic_gpu.run, H200)
    given = shapes_of(case)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("seed",), axis_types=auto)
    spread = P("seed")

    def one(*args):
        found = run(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], found)

    inside = jax.shard_map(one, mesh=mesh, in_specs=spread, out_specs=spread)
    twice = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), given)
    for program in (jax.vmap(run), inside):
        traced = jax.jit(program).trace(*twice)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert len(re.findall(r"@mosaic_gpu_v2\b", text)) == 10


REFUSED = {
    "a CPU": ("needs platform gpu, not cpu", {"target": kernels.Target("cpu")}),
    "Blackwell": (
        "is written for Hopper (sm_90a: H100, H200, H20, H800, GH200), not "
        "'NVIDIA B200'",
        {"target": kernels.Target("gpu", "NVIDIA B200")},
    ),
    "float32 values": (
        "needs q, k and v all bfloat16, not ('bfloat16', 'bfloat16', 'float32')",
        {"dtypes": ("bfloat16", "bfloat16", "float32")},
    ),
    "float32": ("would be rounded to 10 bits (tf32)", {"dtypes": ("float32",) * 3}),
    "float16": ("and float16 would overflow", {"dtypes": ("float16",) * 3}),
    "wide heads": ("needs D and E of at most 512, not D=64, E=520", {"e": 520}),
    "wide keys": (
        "needs D of at most 128 with the delta rule, in which all rows of a state "
        "meet, not D=192, E=64",
        {"spec": kernels.LinearSpec(delta=True), "d": 192},
    ),
    "short chunks": (
        "works on chunks of 64 tokens, not chunk_size=16",
        {"spec": kernels.LinearSpec(chunk_size=16)},
    ),
}


def request_of(*, spec=None, target=H200, dtypes=("bfloat16",) * 3, d=64, e=64):
    shapes = (1, 8, 4, d), (1, 8, 2, d), (1, 8, 2, e)
    qkv = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
    spec = spec or kernels.LinearSpec()
    given = {"beta": jax.ShapeDtypeStruct((1, 8, 2), jnp.float32)} if spec.delta else {}
    return make_request(*qkv, spec, given, target), qkv


PARTS = {
    "normalised": Case(
        "channel", normalise=True, packed=True, sizes=(2, 9, 4, 2, 5, 5)
    ),
    "delta": Case("token", True, sizes=(1, 7, 2, 2, 2, 7)),
}


@pytest.mark.pallas
@pytest.mark.parametrize("name", PARTS)
def test_wide_heads_in_parts_are_what_they_are_together(name):
    case = PARTS[name]
    qkv, floats, ids, cotangents = inputs(case)

    def run(request, parts):
        def one(part):
            assert max(part.k.shape[3], part.v.shape[3] - case.normalise) <= 2
            return reference.run(request, part)

        return wide.in_parts(one, parts, most=2, normalise=case.normalise)

    with jax.enable_x64(True):
        given = widened((qkv, floats, ids, cotangents))
        cpu = kernels.Target("cpu")
        got, wanted = (gradients(case, f, cpu)(*given) for f in (run, reference.run))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), got, wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    text, options = REFUSED[name]
    assert text in mosaic_gpu.supports(request_of(**options)[0])


def test_the_named_implementation_raises_its_reason():
    arrays = [jnp.zeros(x.shape, x.dtype) for x in request_of()[1]]
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' needs platform gpu"):
        kernels.linear_attention(*arrays, implementation="mosaic_gpu")


def test_auto_goes_on_and_explain_says_that_it_is_not_measured():
    assert mosaic_gpu.RANK == {}
    lines = kernels.explain_linear(*request_of()[1], target=H200)
    assert lines[0] == "uses blocked on gpu"
    line = "mosaic_gpu: supports it, but only when asked for by name: its speed is not"
    assert f"{line} measured" in lines
