"""Steps of decoding on a GPU: one query a row against a long cache.

A step takes some tens of microseconds, so chains of steps are timed, in which each
output is the next query, within one program or one CUDA graph: no time of the host
between them. What bounds a step is reading the cache.
"""

import functools
from typing import Any

import jax
import numpy as np

from attnjax import kernels
from attnjax.benchmarks import device_peers, timing
from attnjax.benchmarks.device_cases import (
    DecodeVariant,
    Size,
    cache_bytes,
)
from attnjax.benchmarks.device_programs import bind, repeater, widen

STEPS = 32


class JaxSteps:
    """Steps of decoding with a JAX module.

    Args:
        run_it: (q, k, v, operands) -> (output, ...).
        given: ((q, k, v), operands).
    """

    def __init__(self, run_it, given):
        self._run, self._given = run_it, given

    def values(self) -> dict[str, jax.Array]:
        """The output of one step."""
        (q, k, v), operands = self._given
        return {"out": jax.jit(self._run)(q, k, v, operands)[0]}

    def chain(self, length: int):
        """Chains of steps, each output the next query."""

        def program(qkv, operands):
            first, k, v = qkv

            def step(_, q):
                return self._run(q, k, v, operands)[0].astype(q.dtype)

            return jax.lax.fori_loop(0, length, step, first)

        compiled = jax.jit(program).lower(*self._given).compile()
        return repeater(compiled, self._given)


def find(settings, variant: DecodeVariant, name: str, given):
    """(steps, None), or (None, why the implementation cannot)."""
    peer = device_peers.PEERS.get(name)
    if peer is not None:
        if peer.decode is None:
            return None, "has no step of decoding"
        return peer.decode(variant, given, settings.place)
    qkv, operands = given
    bound, reason = bind(settings, variant, name, (qkv, operands, ()))
    if bound is None:
        return None, reason
    run_it, _, (qkv, operands, _) = bound
    return JaxSteps(run_it, (qkv, operands)), None


def exact(variant: DecodeVariant, given) -> dict[str, np.ndarray]:
    """The output of a step, dense, in float64."""
    with jax.enable_x64(True):
        qkv, operands = widen(given)
        reference = functools.partial(
            kernels.attention, spec=variant.spec, implementation="reference"
        )
        out = jax.jit(lambda q, k, v, x: reference(q, k, v, operands=x))(*qkv, operands)
        return {"out": np.asarray(out)}


def time_chains(settings, chains: dict[str, Any], variant: DecodeVariant, size: Size):
    """{"bytes", "times": {name: {"us", "bytes_per_s"}}}: microseconds a step, and
    bytes of the cache that it has to read, over its time."""
    turns = {"rounds": settings.rounds, "calls": settings.calls}
    samples = timing.interleave(chains, **turns)
    count, times = cache_bytes(variant, size), {}
    for name, sample in samples.items():
        seconds = sample.median / settings.steps
        times[name] = {"us": 1e6 * seconds, "bytes_per_s": count / seconds}
    return {"bytes": count, "times": times}
