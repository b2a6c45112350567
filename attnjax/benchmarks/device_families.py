"""How the kernels of each family are called, so that one script measures them all."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import kernels
from attnjax.benchmarks.device_cases import DecodeVariant, LinearVariant, Variant
from attnjax.benchmarks.device_jax_peers import CUDNN_MASK, TOKAMAX
from attnjax.kernels.linear.dispatch import LINEAR_IMPLEMENTATIONS
from attnjax.kernels.linear.inputs import finish, prepare
from attnjax.kernels.linear.request import make_request as make_linear_request


@dataclasses.dataclass(frozen=True)
class Family:
    """One function of `kernels` with its implementations.

    Attributes:
        name: the function.
        beside: what its output may come with.
        modules: implementations by name, ours and those of other JAX libraries: with
            `supports` and `run`; some with `prepare`, which makes more operands
            beforehand, and with `tuned`, in which to compile what is timed.
        make_request: (q, k, v, spec, operands, target) -> request.
        run: (module, request, options, q, k, v, operands) -> (output, what comes
            beside it, or None).
    """

    name: str
    beside: str
    modules: Mapping[str, Any]
    make_request: Callable
    run: Callable


def _attend(module, request, options, q, k, v, operands):
    out, lse = module.run(request, q, k, v, operands, **options)
    return out, lse if request.spec.return_lse else None


def _make_linear(q, k, v, *rest):
    return make_linear_request(*jax.eval_shape(_spread, q, k, v), *rest)


def _spread(q, k, v):
    """Queries and keys repeated where value heads share them."""
    count = v.shape[2] // k.shape[2]
    if count > 1:
        q, k = (jnp.repeat(x, count, axis=2) for x in (q, k))
    return q, k, v


def _recur(module, request, options, q, k, v, operands):
    q, k, v = _spread(q, k, v)
    inputs = prepare(request, q, k, v, operands)
    out, state = module.run(request, inputs, **options)
    return finish(request, out, operands), state


ATTENTION = Family(
    name="attention",
    beside="lse",
    modules={
        module.NAME: module
        for module in (*kernels.IMPLEMENTATIONS, CUDNN_MASK, TOKAMAX)
    },
    make_request=kernels.make_request,
    run=_attend,
)
LINEAR = Family(
    name="linear_attention",
    beside="state",
    modules={module.NAME: module for module in LINEAR_IMPLEMENTATIONS},
    make_request=_make_linear,
    run=_recur,
)


def family_of(variant: Variant | LinearVariant | DecodeVariant) -> Family:
    """The family that computes a variant."""
    return LINEAR if isinstance(variant, LinearVariant) else ATTENTION
