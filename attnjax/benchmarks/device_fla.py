"""The Triton kernels of flash-linear-attention beside our recurrences.

Its arguments, read in the docstrings of fla.ops (0.5): q, k [B, T, H, K] and v
[B, T, HV, V]; `g` is the log of the decay, [B, T, HV] or by channel [B, T, H, K];
`g_gamma` [H] the same of a constant decay; `beta` [B, T, HV] after its sigmoid; `scale`
a factor of the queries, 1 / sqrt(K) if left out; keys are not normalised by default;
the state is [N, HV, K, V]; documents lie in one row with their borders `cu_seqlens`.
Retention and lightning attention are there `chunk_simple_gla` with `g_gamma`.
"""

import dataclasses
import importlib

import numpy as np

from attnjax.benchmarks import device_torch
from attnjax.benchmarks.device_cases import LinearVariant
from attnjax.benchmarks.device_torch import Place, TorchPrograms

try:
    import torch
except ImportError:
    torch = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One function of fla.

    Attributes:
        module: of `fla.ops`.
        function: in it.
        arguments: our operand by the name of its argument.
        constant: our operands that have no gradient there.
    """

    module: str
    function: str
    arguments: dict[str, str] = dataclasses.field(default_factory=dict)
    constant: tuple[str, ...] = ()


DECAY, RATE = {"g": "log_decay"}, {"beta": "beta"}
# By decay and delta rule of a LinearSpec.
CALLS = {
    ("none", False): Call("simple_gla", "chunk_simple_gla"),
    ("head", False): Call(
        "simple_gla", "chunk_simple_gla", {"g_gamma": "log_decay"}, ("log_decay",)
    ),
    ("token", False): Call("simple_gla", "chunk_simple_gla", DECAY),
    ("channel", False): Call("gla", "chunk_gla", DECAY),
    ("none", True): Call("delta_rule", "chunk_delta_rule", RATE),
    ("token", True): Call("gated_delta_rule", "chunk_gated_delta_rule", DECAY | RATE),
    ("channel", True): Call("kda", "chunk_kda", DECAY | RATE),
}


def programs(variant, given, place: Place):
    """(programs, None), or (None, why it cannot)."""
    reason = _missing(variant, place)
    if reason is not None:
        return None, reason
    call = CALLS[variant.spec.decay, variant.spec.delta]
    try:
        module = importlib.import_module(f"fla.ops.{call.module}")
        function = getattr(module, call.function)
    except (ImportError, AttributeError) as error:
        return None, (
            f"flash-linear-attention has no fla.ops.{call.module}.{call.function} "
            f"here ({error}); pip install 'flash-linear-attention[cuda]'"
        )
    (q, k, v), operands, cotangents = given
    ids = operands.get("segment_ids")
    borders = None if ids is None else _borders(np.asarray(ids))
    arrays = {"q": q, "k": k, "v": v} | operands
    arrays.pop("segment_ids", None)
    packed = {"out": cotangents[0]} | arrays
    if borders is not None:  # one row of documents
        packed = {
            n: x.reshape(1, -1, *x.shape[2:]) if x.ndim > 2 else x
            for n, x in packed.items()
        }
    tensors = {n: device_torch.to_torch(x, place) for n, x in packed.items()}
    out = tensors.pop("out")
    run_it = _runner(function, call, variant, borders, place)
    return TorchPrograms(
        attend=run_it,
        tensors=tensors,
        trained=tuple(n for n in tensors if n not in call.constant),
        fixed=variant.fixed,
        cotangents={
            "out": out,
            "state": device_torch.to_torch(cotangents[1], place),
        },
        ours=lambda name, x: x if name == "state" else x.reshape(_shape(name, arrays)),
        place=place,
    ), None


def _shape(name: str, arrays) -> tuple[int, ...]:
    """Of an array with its rows apart."""
    if name != "out":
        return arrays[name].shape
    return (*arrays["q"].shape[:2], arrays["v"].shape[2], arrays["v"].shape[3])


def _runner(function, call: Call, variant, borders, place: Place):
    """(tensors, whether the state is wanted) -> {"out", "state"}."""
    scale = 1.0 if variant.spec.scale is None else variant.spec.scale
    more, last = {}, None
    if borders is not None:
        starts, last = borders
        more["cu_seqlens"] = torch.tensor(starts, dtype=torch.long).to(place.device)
        last = torch.tensor(last, dtype=torch.long).to(place.device)

    def run_it(x, with_state: bool):
        out, state = function(
            **{name: x[name] for name in ("q", "k", "v")},
            **{argument: x[name] for argument, name in call.arguments.items()},
            scale=scale,
            initial_state=None,
            output_final_state=with_state,
            **more,
        )
        if not with_state:
            return {"out": out}
        return {"out": out, "state": state if last is None else state[last]}

    return run_it


def _borders(ids: np.ndarray) -> tuple[list[int], list[int]]:
    """Where documents begin when all rows lie behind one another, with the end; and
    which document is the last of each row."""
    starts, last = [], []
    for row, line in enumerate(ids):
        changes = 1 + np.flatnonzero(line[1:] != line[:-1])
        starts += [row * len(line) + int(place) for place in (0, *changes)]
        last.append(len(starts) - 1)
    return [*starts, ids.size], last


def _missing(variant, place: Place) -> str | None:
    if not isinstance(variant, LinearVariant):
        return "does not exist for attention"
    if variant.spec.normalise:
        return "divides by the normaliser outside its kernels"
    if variant.group > 1:
        return "has no query heads that share a key/value head"
    return device_torch.missing(place)
