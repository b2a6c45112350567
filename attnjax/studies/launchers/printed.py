"""The `print` launcher: the command of every point that is left, for another tool."""

import shlex

from attnjax.core.errors import EXIT_OK
from attnjax.studies import ledger
from attnjax.studies.launchers import Options
from attnjax.studies.sweep_file import Study


def launch(study: Study, options: Options) -> int:
    """Print one shell line a point that is neither done nor running."""
    for point in study.points:
        state = ledger.current(study.workdir, point.hash)
        if state.state in ("done", "running"):
            continue
        words = study.command(point)
        note = " ".join(f"{point.name}".split())
        print(f"{shlex.join(words)}  # {note}")
    return EXIT_OK
