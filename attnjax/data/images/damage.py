"""Images that cannot be decoded: named and counted, never the end of a run."""

import sys
import threading

from attnjax.core.errors import UserError

_NAMED = 5  # names in a line


def say_left_out(owner: str, unreadable: dict[str, str], total: int) -> None:
    """One line on stderr about images that are not part of the data set.

    Args:
        owner: the source.
        unreadable: name -> why.
        total: images, these included.

    Raises:
        UserError: nothing is left.
    """
    if not unreadable:
        return
    if len(unreadable) == total:
        name, reason = next(iter(unreadable.items()))
        raise UserError(
            f"{owner}: at least one image must be readable; got {total} that cannot "
            f"be decoded, such as {name} ({reason}). Check that they are images."
        )
    told = [f"{name} ({reason})" for name, reason in sorted(unreadable.items())]
    more = ", ..." if len(told) > _NAMED else ""
    print(
        f"{owner}: left out {len(told)} of {total} images that cannot be decoded: "
        f"{', '.join(told[:_NAMED])}{more}",
        file=sys.stderr,
        flush=True,
    )


class Damage:
    """Images that turn out to be unreadable while batches are built.

    The first is told on stderr, then the count when it reaches 10, 100, 1000, ...
    """

    def __init__(self, owner: str):
        self._owner = owner
        self._lock = threading.Lock()
        self.unreadable: dict[str, str] = {}

    def note(self, name: str, reason: str) -> None:
        """Count an image, once."""
        with self._lock:
            if name in self.unreadable:
                return
            self.unreadable[name] = reason
            count = len(self.unreadable)
        if count == 1:
            line = (
                f"cannot decode {name} ({reason}); it has weight 0, as will every "
                "other image like it"
            )
        elif str(count).strip("0") == "1":
            line = f"{count} images cannot be decoded so far and have weight 0"
        else:
            return
        print(f"{self._owner}: {line}", file=sys.stderr, flush=True)
