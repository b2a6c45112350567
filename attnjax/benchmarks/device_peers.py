"""Implementations of PyTorch that the fused kernels are timed beside.

Each is optional and one entry of `PEERS`; where it cannot run, a row says why. Before
it is timed it must agree with the reference: what computes something else is named and
not timed. (Peers in JAX are modules of the families in `device_families`.)
"""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping

from attnjax.benchmarks import device_fla, device_flex

# Relative distance to float64 within which a peer in bfloat16 computes the same: of
# outputs and dq, dk, dv; and of the gradients of operands, which are sums of many terms
# of both signs. A scale, a sign or the base of a logarithm taken wrong is far beyond.
AGREES, AGREES_OPERANDS = 0.02, 0.1
INSTALL = """Peers are optional; beside jax[cuda12] on the machine with the GPU:
  flex     pip install torch                           (2.9 or later, with CUDA)
  fla      pip install 'flash-linear-attention[cuda]'  (Triton comes with it)
  tokamax  pip install tokamax                         (Mosaic GPU kernels)"""


@dataclasses.dataclass(frozen=True)
class Peer:
    """One implementation of PyTorch.

    Attributes:
        what: it is, for people.
        programs: (variant, given, place) -> (`Programs`, None), or (None, why not).
        decode: the same for steps of decoding; None where it has none.
    """

    what: str
    programs: Callable
    decode: Callable | None = None


PEERS = {
    "flex": Peer(
        "FlexAttention of PyTorch, compiled", device_flex.programs, device_flex.decode
    ),
    "fla": Peer("flash-linear-attention, Triton", device_fla.programs),
}


def disagreement(errors: Mapping[str, float]) -> str | None:
    """Why something with these errors is not what it is compared with, or None."""
    for name, error in errors.items():
        limit = AGREES_OPERANDS if name.startswith("d ") else AGREES
        if not error <= limit:
            return (
                f"computes something else: {name} is {error:.3g} away from float64, "
                f"beyond {limit}"
            )
    return None


def failed(error: Exception) -> str:
    """The reason of a peer that raised."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"[:300]


def share_memory(environment: MutableMapping[str, str]) -> None:
    """Leave device memory to PyTorch: JAX, before it starts, is told to take what it
    needs and three fifths at most. What the user set stays."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if not any(name in environment for name in names):
        environment[names[0]] = "0.6"
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
