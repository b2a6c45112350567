"""Weight maps, second passes and epilogues against formulas written out here in
float64: values and every gradient, in each form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import blocked, reference

B, T, H, K, D, E = 2, 11, 4, 2, 5, 3
CAUSAL = np.tri(T, dtype=bool)
FORMS = {
    "reference": reference.run,
    "one tile": blocked.run,
    "blocks": functools.partial(blocked.run, block_sizes=(4, 4)),
}


def over_sum(x, extra):
    return x / (x.sum(-1, keepdims=True) + extra)


def softmax(s, seen, extra=0.0):
    top = jax.lax.stop_gradient(jnp.where(seen, s, -jnp.inf).max(-1, keepdims=True))
    e = jnp.where(seen, jnp.exp(s - top), 0)
    return e / (e.sum(-1, keepdims=True) + extra * jnp.exp(-top))


def softpick(s, seen):
    top = jax.lax.stop_gradient(jnp.where(seen, s, -jnp.inf).max(-1, keepdims=True))
    e = jnp.where(seen, jnp.exp(s - top) - jnp.exp(-top), 0)
    total = jnp.abs(e).sum(-1, keepdims=True) + 1e-8 * jnp.exp(-top)
    return jnp.maximum(e, 0) / total


def elementwise(fn, *, normalise):
    def weights(s, seen):
        x = jnp.where(seen, fn(s), 0)
        return over_sum(x, 1e-8) if normalise else x

    return weights


def elu_plus_one(s):
    return jax.nn.elu(s) + 1


# name -> (map, its formula of scores and what is seen).
MAPS = {
    "softmax": (kernels.Softmax(), softmax),
    "bounded": (kernels.Softmax(bound=30.0), softmax),
    "bounded, off by one": (
        kernels.Softmax("off_by_one", bound=30.0),
        functools.partial(softmax, extra=1.0),
    ),
    "softpick": (kernels.Softpick(), softpick),
    "softplus": (
        kernels.SoftplusL1(),
        elementwise(lambda s: jnp.log(1 + jnp.exp(s)), normalise=True),
    ),
    "polynomial": (
        kernels.Polynomial(),
        elementwise(lambda s: 1 + s + s**2 / 2, normalise=True),
    ),
    "sigmoid": (
        kernels.Sigmoid(-1.5),
        elementwise(lambda s: 1 / (1 + jnp.exp(1.5 - s)), normalise=False),
    ),
    "sigmoid, summed": (
        kernels.Sigmoid(0.5, normalise=True),
        elementwise(lambda s: 1 / (1 + jnp.exp(-0.5 - s)), normalise=True),
    ),
    "relu": (
        kernels.ReluPower(factor=1 / T),
        elementwise(lambda s: jnp.maximum(s, 0) / T, normalise=False),
    ),
    "relu squared": (
        kernels.ReluPower(2, normalise=True),
        elementwise(lambda s: jnp.maximum(s, 0) ** 2, normalise=True),
    ),
    "elu": (kernels.EluPlusOne(), elementwise(elu_plus_one, normalise=False)),
    "elu, summed": (
        kernels.EluPlusOne(normalise=True),
        elementwise(elu_plus_one, normalise=True),
    ),
}


def clipped(p, count):
    return jnp.clip(1.15 * p - 0.1, 0, 1)


def sharpened(p, count):
    offset = jnp.where(jnp.arange(T) < 3, 0, 1.0)[:, None]
    b = jnp.maximum(p * count - offset, 0) ** 3
    return over_sum(b, 1e-8)


AGAIN = {
    "once": (None, lambda p, count: p),
    "clipped": (kernels.Clip(-0.1, 1.05), clipped),
    "sharpened": (kernels.Sharpen(3), sharpened),
}


def gated(o, pool):
    return o / (1 + jnp.exp(-pool["output_gate"]))


def normed(o, pool):
    square = (o**2).mean(-1, keepdims=True)
    o = o / jnp.sqrt(square + 1e-2) * pool["head_norm"]
    return o * pool["head_scale"][:, None] * pool["output_gate"]


EPILOGUES = {
    "none": ((), lambda o, pool: o),
    "gate": (kernels.OutputGate(), gated),
    "norm, scale, head gate": (
        (
            kernels.HeadRMSNorm(eps=1e-2),
            kernels.HeadScale(),
            kernels.OutputGate("head", "none"),
        ),
        normed,
    ),
}


def arrays(epilogue):
    rng = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    q, k, v = normal(B, T, H, D), normal(B, T, K, D), normal(B, T, K, E)
    gate = (B, T, H, E if epilogue == "gate" else 1)
    trained = {
        "output_gate": normal(*gate),
        "head_scale": normal(H),
        "head_norm": normal(H, E),
        "bias": normal(1, H, T, T),
    }
    return q, k, v, trained, normal(B, T, H, E)


def formula(name, again, epilogue, q, k, v, pool):
    """The whole computation, dense."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D) + pool["bias"]
    p = MAPS[name][1](s, CAUSAL)
    p = AGAIN[again][1](p, jnp.arange(1.0, T + 1)[:, None])
    return EPILOGUES[epilogue][1](jnp.einsum("bhts,bshe->bthe", p, v), pool)


def ours(form, name, again, epilogue, q, k, v, pool):
    spec = kernels.AttentionSpec(
        mask=kernels.Causal(),
        score=kernels.Bias(),
        weight_map=MAPS[name][0],
        reweight=AGAIN[again][0],
        epilogue=EPILOGUES[epilogue][0],
    )
    steps = jnp.arange(T, dtype=jnp.float64)
    pool = pool | {
        "visible_keys": (steps + 1)[None, None],
        "sharpen_offset": jnp.where(steps < 3, 0.0, 1.0)[None, None],
    }
    if epilogue.startswith("norm"):
        pool["output_gate"] = pool["output_gate"][..., 0]
    operands = {operand.name: pool[operand.name] for operand in spec.operands}
    request = kernels.make_request(q, k, v, spec, operands, kernels.default_target())
    return FORMS[form](request, q, k, v, operands)[0]


CASES = [
    *((name, "once", "none") for name in MAPS),
    ("softmax", "clipped", "gate"),
    ("softmax", "sharpened", "none"),
    ("softplus", "sharpened", "norm, scale, head gate"),
    ("softpick", "clipped", "none"),
    ("sigmoid", "clipped", "gate"),
    ("sigmoid", "once", "norm, scale, head gate"),
]


@pytest.mark.parametrize(("name", "again", "epilogue"), CASES)
def test_each_form_is_the_formula(name, again, epilogue):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        q, k, v, pool, cotangent = arrays(epilogue)

        def everything(attend, compiled=False):
            def project(*given):
                out = attend(*given)
                return (out * cotangent).sum(), out

            grads = jax.grad(project, argnums=(0, 1, 2, 3), has_aux=True)
            return (jax.jit(grads) if compiled else grads)(q, k, v, pool)

        wanted = everything(functools.partial(formula, name, again, epilogue))
        paths = jax.tree_util.tree_leaves_with_path(wanted)
        for form in FORMS:
            attend = functools.partial(ours, form, name, again, epilogue)
            got = everything(attend, form == "blocks")
            for (path, right), left in zip(paths, jax.tree.leaves(got), strict=True):
                note = f"{form} {path}"
                np.testing.assert_allclose(left, right, atol=1e-12, err_msg=note)
