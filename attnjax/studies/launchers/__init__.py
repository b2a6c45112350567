"""How the points of a study get run: here, by a cluster's scheduler, or by you.

A launcher is a function of a written study and options; each point is a process of
`attnjax.studies.worker`, which holds the point's lock and keeps its state, so it never
matters who else runs points of the same directory.
"""

import dataclasses
import importlib
from collections.abc import Callable

from attnjax.core.errors import unknown
from attnjax.studies.sweep_file import Study

# name -> module with `launch(study, options) -> exit code`
LAUNCHERS = {
    "local": "attnjax.studies.launchers.local",
    "print": "attnjax.studies.launchers.printed",
    "slurm": "attnjax.studies.launchers.slurm",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What launchers take.

    Attributes:
        jobs: points that run at one time.
        retries: how often a point that crashed is begun again.
        slurm: file with settings of the slurm launcher, or None.
    """

    jobs: int = 1
    retries: int = 2
    slurm: str | None = None


def find(name: str) -> Callable[[Study, Options], int]:
    """The launcher of a name."""
    if name not in LAUNCHERS:
        raise unknown("--launcher", "launcher", name, LAUNCHERS)
    return importlib.import_module(LAUNCHERS[name]).launch
