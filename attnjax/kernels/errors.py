"""Message helpers: this room imports jax alone, so it carries its own."""

import difflib
from collections.abc import Iterable


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown name: near matches, then all names."""
    known = sorted(options)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'nothing'}."
