"""Watching which implementations `attention` takes, and ruling some of them out.

For programs that are compiled but not run, on a machine that lacks what an
implementation needs: `planning` compiles for GPUs without cuDNN.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

from attnjax.kernels.request import Request


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one call of `attention` runs.

    Attributes:
        request: the call.
        wanted: the implementation that a run on the target would take.
        used: the one taken here.
        reason: why they differ, "" where they do not.
    """

    request: Request
    wanted: str
    used: str
    reason: str = ""


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
        self, request: Request, module: ModuleType, others: Sequence[ModuleType]
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
                raise NotImplementedError(
                    f"attention: {wanted} is ruled out ({reason}) and no other "
                    "implementation supports the request."
                )
            module = able[0]
        choice = Choice(request, wanted, module.NAME, reason)
        if choice not in self.choices:
            self.choices.append(choice)
        return module


_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar(
    "attention_choices", default=None
)


def current() -> Watch | None:
    """The watch in force, if any."""
    return _watch.get()


@contextlib.contextmanager
def watching(without: Mapping[str, str] | None = None) -> Iterator[Watch]:
    """Note every choice of `attention` traced in the context.

    Args:
        without: names of implementations that must not be taken -> the reason.
    """
    watch = Watch(dict(without or {}))
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)
