"""Reading checkpoints: find the newest intact one, verify it, restore it anywhere.

A run's checkpoints are RUN/checkpoints/<step>/ with
    state/          arrays, written by Orbax (OCDBT; any sharding reads any other)
    meta.json       step, format, what `save` was given as meta, every array's shape
    digests.json    size and sha256 of all files above, see `digests`
A save is built under `<step>.saving` and renamed when its digests are on the disk, so
a bare number is a finished checkpoint and one with a problem has been damaged since.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnjax.core.errors import UserError
from attnjax.training import digests, disk, state_tree

FORMAT = 1
STATE = "state"
META = "meta.json"
SAVING = ".saving"
DELETING = ".deleting"
_STEP = re.compile(r"(0|[1-9][0-9]*)")
_SHOWN = 4  # lines of one list in a message


@dataclasses.dataclass(frozen=True)
class Found:
    """The newest intact checkpoint.

    Attributes:
        step: its step.
        path: its directory.
        meta: what `save` was given.
        metric: the value it is ranked by, or None.
        skipped: (step, reason) of each newer one that is damaged.
    """

    step: int
    path: Path
    meta: dict
    metric: float | None = None
    skipped: tuple[tuple[int, str], ...] = ()


class CheckpointReader:
    """Reads the checkpoints of a directory and changes nothing in it.

    Args:
        directory: RUN/checkpoints; need not exist.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).absolute()
        self._verified: set[int] = set()

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The steps that have been saved, damaged ones included, in order."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def verify(self, step: int) -> list[str]:
        """What is wrong with a step's files: nothing when it is intact."""
        path = self.path(step)
        if not path.is_dir():
            return [f"{path.name}: missing"]
        found = digests.problems(path)
        if not found:
            self._verified.add(step)
        return found

    def latest(self) -> Found | None:
        """The newest intact checkpoint; None when nothing was ever saved.

        Raises:
            UserError: when there are checkpoints and none is intact, with what is
                wrong with each; when one was written in a newer format.
        """
        skipped: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            found = self.verify(step)
            if found:
                skipped.append((step, _shorten(found)))
                continue
            content = self._meta(step)
            return Found(
                step,
                self.path(step),
                content["meta"],
                content["metric"],
                tuple(skipped),
            )
        if skipped:
            raise self._refusal(skipped)
        return None

    def meta(self, step: int) -> dict:
        """What `save` was given as meta, after verifying the step."""
        self._require(step)
        return self._meta(step)["meta"]

    def signature(self, step: int) -> dict[str, list]:
        """Path -> [shape, dtype] of every array of a step, without reading them."""
        self._require(step)
        return self._meta(step)["arrays"]

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        """Read a step into the structure, shardings and devices of `abstract_state`.

        Args:
            step: as from `latest()`.
            abstract_state: a tree of jax.ShapeDtypeStruct. Its shardings may differ
                from those of the save; without one, an array goes to the first device.

        Returns:
            (state, meta).

        Raises:
            UserError: when the step is damaged, or holds other arrays than asked for.
        """
        self._require(step)
        content = self._meta(step)
        wanted = state_tree.named(abstract_state)
        self._check_fit(step, content["arrays"], wanted)
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        args = {
            path: ocp.ArrayRestoreArgs(
                restore_type=jax.Array,
                sharding=getattr(leaf, "sharding", None) or default,
                dtype=leaf.dtype,
                global_shape=leaf.shape,
            )
            for path, leaf in wanted.items()
            if leaf.size
        }
        leaves = self._read(step, args)
        for path, leaf in wanted.items():
            if not leaf.size:
                place = getattr(leaf, "sharding", None) or default
                leaves[path] = jax.device_put(np.zeros(leaf.shape, leaf.dtype), place)
        return state_tree.like(abstract_state, leaves), content["meta"]

    def restore_numpy(
        self, step: int, *, only: tuple[str, ...] | None = None
    ) -> tuple[dict, dict]:
        """Read a step into host memory, on any machine: no devices are asked.

        Args:
            step: as from `latest()`.
            only: names of top groups to read, such as ("params",); None reads all.

        Returns:
            (nested dicts of numpy arrays, meta). Nodes that were tuples are dicts
            keyed "0", "1", ...

        Raises:
            UserError: when the step is damaged or has no such group.
        """
        self._require(step)
        content = self._meta(step)
        have, empty = content["arrays"], content["empty"]
        groups = {path.split("/")[0] for path in [*have, *empty]}
        for name in only or ():
            if name not in groups:
                raise UserError(
                    f"checkpoint {self.path(step)}: no group {name!r}. Known: "
                    f"{', '.join(sorted(groups))}."
                )
        chosen = groups if only is None else set(only)
        args = {
            path: ocp.RestoreArgs(restore_type=np.ndarray)
            for path, (shape, _) in have.items()
            if path.split("/")[0] in chosen and 0 not in shape
        }
        leaves = {path: np.asarray(x) for path, x in self._read(step, args).items()}
        leaves |= {
            path: np.zeros(shape, jax.numpy.dtype(dtype))
            for path, (shape, dtype) in have.items()
            if 0 in shape and path.split("/")[0] in chosen
        }
        leaves |= {path: {} for path in empty if path.split("/")[0] in chosen}
        return state_tree.unescaped(state_tree.nest(leaves)), content["meta"]

    def _read(self, step: int, args: dict[str, Any]) -> dict[str, Any]:
        """Path -> array for every path of `args` (Orbax restore arguments)."""
        if not args:
            return {}
        nested = state_tree.nest(args)
        handler = ocp.PyTreeCheckpointHandler()
        request = ocp.args.PyTreeRestore(
            item=nested, restore_args=nested, partial_restore=True
        )
        with ocp.Checkpointer(handler) as reader:
            tree = reader.restore(self.path(step) / STATE, args=request)
        return {path: state_tree.at(tree, path) for path in args}

    def _meta(self, step: int) -> dict:
        """meta.json of a verified step."""
        content = disk.read_json(
            self.path(step) / META, owner="checkpoint", cure="It has just been changed."
        )
        if content["format"] > FORMAT:
            raise UserError(
                f"checkpoint {self.path(step)}: written in format {content['format']} "
                f"by {content['saved_by']}; this version reads up to {FORMAT}. Update "
                "attnjax to read it."
            )
        return content

    def _require(self, step: int) -> None:
        if step in self._verified:
            return
        if not self.path(step).is_dir():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"checkpoint: no step {step} in {self.directory}. Saved steps: {have}."
            )
        found = self.verify(step)
        if found:
            raise UserError(
                f"checkpoint {self.path(step)}: damaged: {_shorten(found)}. Use "
                "another step, or restore its files from a copy."
            )

    def _check_fit(self, step: int, saved: dict, wanted: dict) -> None:
        lines = state_tree.differences(saved, state_tree.signature(wanted))
        if lines:
            shown = "\n".join(lines[:20] + (["  ..."] if len(lines) > 20 else []))
            raise UserError(
                f"checkpoint {self.path(step)}: its arrays are not those of this "
                f"config (- saved, + wanted):\n{shown}\nUse the config that it was "
                "saved with, or start another run with train.init_from."
            )

    def _refusal(self, skipped: list[tuple[int, str]]) -> UserError:
        listing = "\n".join(f"  step {step}: {reason}" for step, reason in skipped)
        return UserError(
            f"checkpoints: {self.directory} holds {len(skipped)} and none is intact, "
            f"so the run refuses to start rather than begin at step 0 again:\n"
            f"{listing}\n"
            "Restore the files of one step from a copy; or, to begin again on purpose, "
            "choose another --workdir or move this directory away."
        )


def _shorten(problems: list[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
