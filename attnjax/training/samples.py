"""What a run makes to be looked at: text and pictures, in RUN/samples."""

from pathlib import Path

import numpy as np
from PIL import Image

from attnjax.training import hosts
from attnjax.training.disk import disk_errors


def path(run, step: int, kind: str) -> Path:
    """The file of the sample of a step; kind is "txt" or "png"."""
    return run.path / "samples" / f"step_{step}.{kind}"


def keep(run, step: int, made: str | np.ndarray) -> None:
    """Write a text, or a picture uint8 [H, W] or [H, W, 3]; the writing process does.

    Raises:
        UserError: when the disk cannot take it.
    """
    if not hosts.is_writer():
        return
    with disk_errors("workdir"):
        run.samples()
        if isinstance(made, str):
            path(run, step, "txt").write_text(made)
        else:
            Image.fromarray(made).save(path(run, step, "png"))
