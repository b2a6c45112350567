"""Programs of PyTorch beside those of JAX: arrays, gradients, timing.

PyTorch is optional; `missing` says why it cannot run. Arrays are the same numbers,
brought over before anything is timed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

try:
    import torch
except ImportError as error:
    torch = None
    REASON = f"PyTorch is not installed ({error}); pip install torch"

Tensors = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where PyTorch computes.

    Attributes:
        device: "cuda", or "cpu" to try a peer without a GPU.
        compile: with torch.compile, as it is to be timed.
        gradients: whether there are any (FlexAttention has none on a CPU).
    """

    device: str = "cuda"
    compile: bool = True
    gradients: bool = True


GPU = Place()


def missing(place: Place) -> str | None:
    """Why PyTorch cannot compute there, or None."""
    if torch is None:
        return REASON
    if place.device == "cuda" and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device"
    return None


def to_torch(x, place: Place):
    """A tensor of an array's bits, on the device."""
    array = np.array(x)
    if array.dtype == jnp.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.to(place.device)


def to_numpy(x) -> np.ndarray:
    """A tensor's numbers; bfloat16 as float32."""
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def compiled(function: Callable, place: Place) -> Callable:
    """The function through torch.compile with its kernels tuned, shapes fixed. What was
    compiled before is forgotten, so that no limit of recompilations is met, beyond
    which PyTorch would fall back to slow code."""
    if not place.compile:
        return function
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs"
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


@dataclasses.dataclass(frozen=True)
class TorchPrograms:
    """Programs of a PyTorch function.

    Attributes:
        attend: (tensors, whether what comes beside the output is wanted) -> outputs:
            "out", and "lse" or "state".
        tensors: q, k, v and operands by name, as `attend` lays them out.
        trained: names of those that have a gradient.
        fixed: names of those that have none when timed.
        cotangents: of each output, in the layout of `attend`.
        ours: (name, tensor) -> the same in our layout.
        place: where.
    """

    attend: Callable[[Tensors, bool], Tensors]
    tensors: Tensors
    trained: tuple[str, ...]
    fixed: tuple[str, ...]
    cotangents: Tensors
    ours: Callable[[str, Any], Any]
    place: Place

    def values(self) -> Mapping[str, np.ndarray]:
        """Outputs, and gradients of what is trained."""
        outputs, gradients = self._both(self._leaves(self.trained))
        found = {name: self.ours(name, x) for name, x in outputs.items()}
        for name, x in gradients.items():
            title = f"d{name}" if name in ("q", "k", "v") else f"d {name}"
            found[title] = self.ours(name, x)
        return {name: to_numpy(x) for name, x in found.items()}

    def forward(self) -> Callable[[int], None]:
        """The output alone, without a tape."""

        def call():
            with torch.no_grad():
                self.attend(self.tensors, False)

        return self.repeater(call)

    def train(self) -> Callable[[int], None] | None:
        """Outputs and gradients; None where there are none."""
        leaves = self._leaves(n for n in self.trained if n not in self.fixed)
        return self.repeater(lambda: self._both(leaves)) if leaves else None

    def repeater(self, call: Callable[[], Any]) -> Callable[[int], None]:
        """Calls, and waits for the device. The first call, which compiles, is made
        here: its failure is not one of a timing."""

        def repeat(count: int) -> None:
            for _ in range(count):
                call()
            if self.place.device == "cuda":
                torch.cuda.synchronize()

        repeat(1)
        return repeat

    def _leaves(self, names) -> Tensors:
        names = names if self.place.gradients else ()
        return {n: self.tensors[n].detach().requires_grad_() for n in names}

    def _both(self, leaves: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.attend(self.tensors | leaves, True)
        if not leaves:
            return outputs, {}
        gradients = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.values()),
            [self.cotangents[n].to(x.dtype) for n, x in outputs.items()],
        )
        return outputs, dict(zip(leaves, gradients, strict=True))


@dataclasses.dataclass(frozen=True)
class TorchSteps:
    """Steps of decoding with a PyTorch function.

    Attributes:
        step: query -> output, of the query's shape.
        q: the first query.
        ours: an output in our layout.
        place: where.
    """

    step: Callable[[Any], Any]
    q: Any
    ours: Callable[[Any], Any]
    place: Place

    def values(self) -> Mapping[str, np.ndarray]:
        """The output of one step."""
        with torch.no_grad():
            return {"out": to_numpy(self.ours(self.step(self.q)))}

    def chain(self, length: int) -> Callable[[int], None]:
        """Chains of steps, each output the next query; on a GPU one CUDA graph, so
        that the time is the device's and not Python's."""
        run_it = self._chain(length)
        if self.place.device != "cuda":
            return lambda count: [run_it() for _ in range(count)] and None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what compiles must not be captured
            run_it()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_it()

        def repeat(count: int) -> None:
            for _ in range(count):
                graph.replay()
            torch.cuda.synchronize()

        return repeat

    def _chain(self, length: int) -> Callable[[], Any]:
        def run_it():
            with torch.no_grad():
                q = self.q
                for _ in range(length):
                    q = self.step(q)
                return q

        return run_it


def release() -> None:
    """Give memory that nothing uses back to the device, where JAX can have it."""
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
