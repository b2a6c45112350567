"""What an implementation makes of a variant's arrays, as programs to check and time.

Ours and those of other JAX libraries are modules with `supports` and `run`; those of
PyTorch are entries of `device_peers.PEERS`. Both end as `Programs`.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import kernels
from attnjax.benchmarks import device_peers
from attnjax.benchmarks.device_families import Family, family_of

# Makes n calls and waits for their results.
Repeat = Callable[[int], None]
# (what it is, None), or (None, why the implementation cannot).
Found = tuple["Programs | None", str | None]


class Programs(Protocol):
    """One implementation on one variant's arrays."""

    def values(self) -> Mapping[str, np.ndarray]:
        """{"out", "lse" or "state", "dq", "dk", "dv", "d OPERAND"}: what it gives."""

    def forward(self) -> Repeat:
        """The output alone, ready to be timed."""

    def train(self) -> Repeat | None:
        """The output and gradients, ready to be timed; None where there are none."""


class JaxPrograms:
    """Programs of a JAX module.

    Args:
        run_it: (q, k, v, operands) -> (output, log-sum, state or None).
        family: what it computes.
        given: arrays, as from `draw`.
        fixed: operands without a gradient when timed.
        tuned: (program, arguments) -> a context to compile in, or None.
    """

    def __init__(self, run_it, family: Family, given, *, fixed=(), tuned=None):
        self._run, self._family, self._given = run_it, family, given
        self._fixed, self._tuned = fixed, tuned

    @functools.cached_property
    def _values(self):
        return jax.jit(self._gradients(()))

    def _gradients(self, fixed):
        return functools.partial(
            values_and_gradients, self._run, self._family, frozenset(fixed)
        )

    def values(self) -> Mapping[str, jax.Array]:
        """Outputs and gradients of every operand."""
        return self._values(*self._given)

    def forward(self) -> Repeat:
        """The output alone."""
        return self._repeater(functools.partial(_output, self._run))

    def train(self) -> Repeat:
        """The output and the gradients of q, k, v and operands that are trained."""
        return self._repeater(self._gradients(self._fixed))

    def _repeater(self, program) -> Repeat:
        program = jax.jit(program)
        tuned = self._tuned or (lambda *_: contextlib.nullcontext())
        with tuned(program, self._given):
            compiled = program.lower(*self._given).compile()
        return repeater(compiled, self._given)


def repeater(compiled, given) -> Repeat:
    """Calls a compiled program."""

    def repeat(count: int) -> None:
        for _ in range(count):
            out = compiled(*given)
        jax.block_until_ready(out)

    return repeat


def find(settings, variant, name: str, given) -> Found:
    """An implementation's programs by name.

    Args:
        settings: target, interpret and place of `device_kernels.Settings`.
        variant: of `device_cases`.
        name: of the family's modules, or of `device_peers.PEERS`.
        given: arrays, as from `draw`.
    """
    if name in device_peers.PEERS:
        return device_peers.PEERS[name].programs(variant, given, settings.place)
    bound, reason = bind(settings, variant, name, given)
    if bound is None:
        return None, reason
    run_it, module, given = bound
    tuned = getattr(module, "tuned", None)
    family = family_of(variant)
    return JaxPrograms(run_it, family, given, fixed=variant.fixed, tuned=tuned), None


def bind(settings, variant, name: str, given):
    """((run_it, module, given), None) of a JAX module, or (None, why it cannot): the
    arrays may have more operands than before."""
    qkv, operands, cotangents = given
    target, family = settings.target or kernels.default_target(), family_of(variant)
    request = family.make_request(*qkv, variant.spec, operands, target)
    module = family.modules.get(name)
    if module is None:
        return None, f"does not exist for {family.name}"
    reason = module.supports(request)
    if reason is not None:
        return None, reason
    more = {}
    if name == "mosaic_gpu" and settings.interpret is not None:
        more["interpret"] = settings.interpret
    if hasattr(module, "prepare"):
        operands = operands | module.prepare(request, operands)
    run_it = functools.partial(family.run, module, request, more)
    return (run_it, module, (qkv, operands, cotangents)), None


def values_and_gradients(run_it, family: Family, fixed, qkv, operands, cotangents):
    """{"out", "lse" or "state", "dq", "dk", "dv", "d OPERAND"} but of `fixed`."""
    trained = {
        n: x
        for n, x in operands.items()
        if jnp.issubdtype(x.dtype, jnp.inexact) and n not in fixed
    }

    def total(qkv, trained):
        out, beside = run_it(*qkv, operands | trained)
        out = out.astype(qkv[0].dtype)
        wide = jnp.promote_types(jnp.float32, out.dtype)
        value = jnp.sum(out.astype(wide) * cotangents[0].astype(wide))
        if beside is None:
            return value, {"out": out}
        value += jnp.sum(beside * cotangents[1].astype(beside.dtype))
        return value, {"out": out, family.beside: beside}

    gradients = jax.grad(total, argnums=(0, 1), has_aux=True)
    (d_qkv, d_trained), found = gradients(qkv, trained)
    found |= dict(zip(("dq", "dk", "dv"), d_qkv, strict=True))
    return found | {f"d {name}": x for name, x in d_trained.items()}


def _output(run_it, qkv, operands, _):
    return run_it(*qkv, operands)[0]


def exact(variant, given) -> dict[str, np.ndarray]:
    """Values and gradients of the formula, dense, in float64."""
    with jax.enable_x64(True):
        qkv, operands, cotangents = widen(given)
        target, family = kernels.default_target(), family_of(variant)
        request = family.make_request(*qkv, variant.spec, operands, target)
        run_it = functools.partial(family.run, family.modules["reference"], request, {})
        program = functools.partial(values_and_gradients, run_it, family, frozenset())
        found = jax.jit(program)(qkv, operands, cotangents)
        return {name: np.asarray(x) for name, x in found.items()}


def widen(given):
    """Float arrays as float64 (with x64 enabled)."""

    def widened(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(widened, given)


def distances(got: Mapping, wanted: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of each quantity in `got`, the distance to that wanted relative to its norm;
    infinite where something is not finite."""
    found = {}
    for name in wanted:
        if name not in got:
            continue
        left, right = np.asarray(got[name]).astype(np.float64), wanted[name]
        error = np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-300)
        found[name] = float(error) if np.isfinite(error) else float("inf")
    return found
