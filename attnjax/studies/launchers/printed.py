"""The `print` launcher: the commands of what is left, for another tool."""

import shlex

from attnjax.core.errors import EXIT_OK
from attnjax.studies import ledger
from attnjax.studies.launchers import Options
from attnjax.studies.sweep_file import Study


def launch(study: Study, options: Options) -> int:
    """Print one shell line for each point that is neither done nor running.

    Points to be trained together share a line.
    """
    left = [
        point
        for point in study.asked
        if ledger.current(study.workdir, point.hash).state not in ("done", "running")
    ]
    for element in study.elements(left):
        note = "; ".join(" ".join(point.name.split()) for point in element.points)
        print(f"{shlex.join(element.command)}  # {note}")
    return EXIT_OK
