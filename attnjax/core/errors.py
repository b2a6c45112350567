"""The errors that a user can cause, and how they are said."""

import difflib
from collections.abc import Iterable

# Exit codes of every front door.
EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_SAVED = 75  # "saved, run me again": sysexits' EX_TEMPFAIL


class UserError(Exception):
    """A mistake that the person at the keyboard can mend.

    The text is `<Owner>: <rule>; got <name>=<value>. <Cure>`; front doors print
    it without a traceback and exit with `exit_code`.
    """

    exit_code = EXIT_USER


class PeerError(UserError):
    """Another process of the same run is missing or gone.

    Nobody's mistake: the same command may do when it is run again, so launchers try.
    """

    exit_code = EXIT_FAULT


def nearest(name: str, options: Iterable[str], *, limit: int = 3) -> str:
    """Say what else `name` may have meant, as a sentence that ends a message.

    Example:
        >>> nearest("adamv", ["adamw", "lion", "muon"])
        'Did you mean adamw? Known: adamw, lion, muon.'
    """
    known = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), known, n=limit, cutoff=0.5)
    listing = ", ".join(known) if known else "nothing"
    if len(known) > 30:
        listing = ", ".join(known[:30]) + ", ..."
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Known: {listing}."


def unknown(owner: str, what: str, name: str, options: Iterable[str]) -> UserError:
    """The error for a name that is not in a set of names."""
    return UserError(f"{owner}: unknown {what} {name!r}. {nearest(name, options)}")
