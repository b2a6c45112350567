"""Watching which implementations the families take, and ruling some of them out.

For programs that are compiled but not run, on a machine that lacks what an
implementation needs: `planning` compiles for GPUs without cuDNN.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

from attnjax.kernels.linear.request import LinearRequest
from attnjax.kernels.request import Request

# What computes a call whose weights are read: none of the implementations returns them.
EXPLICIT = "explicit"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one call of `attention` or `linear_attention` runs.

    Attributes:
        request: the call.
        wanted: the implementation that a run on the target would take.
        used: the one taken here; `EXPLICIT` for none, as `wanted` then is.
        reason: why they differ, "" where they do not; why there is none.
    """

    request: Request | LinearRequest
    wanted: str
    used: str
    reason: str = ""

    @property
    def family(self) -> str:
        """The function that was called."""
        linear = isinstance(self.request, LinearRequest)
        return "linear_attention" if linear else "attention"

    @property
    def shapes(self) -> str:
        """The shapes of the call, for a message."""
        return describe(self.request)

    def __str__(self) -> str:
        """What runs, on which shapes, and instead of what."""
        text = f"{self.used}: {self.shapes}"
        if self.used == EXPLICIT:
            text += f"; {self.reason}"
        elif self.reason:
            text += f"; stands in for {self.wanted} ({self.reason})"
        return text


def describe(r: Request | LinearRequest) -> str:
    """The shapes of a call, for a message."""
    if isinstance(r, LinearRequest):
        length, heads, dim, keys = r.length, (r.heads, r.kv_heads), r.dim, r.length
    else:
        length, heads, dim = r.q_len, (r.num_heads, r.num_kv_heads), r.head_dim
        keys = r.kv_len
    return (
        f"q [{r.batch}, {length}, {heads[0]}, {dim}], k [{r.batch}, {keys}, "
        f"{heads[1]}, {dim}], v [.., {r.value_dim}] {r.dtypes[0]}"
    )


@dataclasses.dataclass
class Watch:
    """Choices made while it is in force.

    Attributes:
        without: implementations that are not taken -> why.
        choices: in order of the calls, each kind of call once.
    """

    without: Mapping[str, str]
    choices: list[Choice] = dataclasses.field(default_factory=list)

    def settle(
        self,
        request: Request | LinearRequest,
        module: ModuleType,
        others: Sequence[ModuleType],
    ) -> ModuleType:
        """`module`, or the first of `others` that may stand in for it."""
        wanted, reason = module.NAME, self.without.get(module.NAME, "")
        if reason:
            able = [
                other
                for other in others
                if other.NAME not in self.without and other.supports(request) is None
            ]
            if not able:
                family = Choice(request, wanted, wanted).family
                raise NotImplementedError(
                    f"{family}: {wanted} is ruled out ({reason}) and no other "
                    "implementation supports the request."
                )
            module = able[0]
        self._note(Choice(request, wanted, module.NAME, reason))
        return module

    def _note(self, choice: Choice) -> None:
        if choice not in self.choices:
            self.choices.append(choice)


_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar(
    "kernel_choices", default=None
)


def current() -> Watch | None:
    """The watch in force, if any."""
    return _watch.get()


def tell_explicit(request: Request) -> None:
    """Note a call that is computed outside of the kernels, for whoever is watching."""
    watch = current()
    if watch is not None:
        why = "its weights are read, which no kernel returns"
        watch._note(Choice(request, EXPLICIT, EXPLICIT, why))


@contextlib.contextmanager
def watching(without: Mapping[str, str] | None = None) -> Iterator[Watch]:
    """Note every choice of an implementation traced in the context.

    Args:
        without: names of implementations that must not be taken -> the reason.
    """
    watch = Watch(dict(without or {}))
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)
