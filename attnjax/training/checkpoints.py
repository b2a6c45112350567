"""Saving checkpoints: asynchronous, sharded, and finished or not there at all.

`save` copies the state off the devices and returns; Orbax writes it in the background
under `<step>.saving`; when Orbax is done, digests of all files are written and the
directory takes its name. Only then may older checkpoints go. See `checkpoint_reader`
for the layout and for reading. Directories are on a POSIX file system, shared by all
processes of a run.
"""

import math
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import attnjax
from attnjax.core.errors import UserError
from attnjax.training import agreement, digests, disk, state_tree
from attnjax.training.checkpoint_reader import (
    DELETING,
    FORMAT,
    META,
    SAVING,
    STATE,
    CheckpointReader,
    Found,
)
from attnjax.training.quiet import hush_storage

__all__ = ["CheckpointReader", "Checkpointer", "Found"]

_LEFTOVER = re.compile(rf"(0|[1-9][0-9]*)({SAVING}|{DELETING})")


class Checkpointer(CheckpointReader):
    """Saves and restores the checkpoints of one run; one per process of the run.

    Args:
        directory: RUN/checkpoints; made when the first save needs it.
        keep_last: newest finished checkpoints that are kept, at least 1.
        keep_best: how many with the lowest metric are kept beside them.
        keep_every: keep every step that is a multiple of this; None keeps none so.

    Raises:
        UserError: on a full, read-only or forbidden disk, from any method.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        keep_every: int | None = None,
    ):
        super().__init__(directory)
        if (
            keep_last < 1
            or keep_best < 0
            or (keep_every is not None and keep_every < 1)
        ):
            raise UserError(
                "checkpoints: keep_last and keep_every must be at least 1, keep_best "
                f"at least 0; got keep_last={keep_last}, keep_best={keep_best}, "
                f"keep_every={keep_every}."
            )
        self._keep = (keep_last, keep_best, keep_every)
        self._damaged: set[int] = set()
        self._metrics: dict[int, float | None] = {}
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        hush_storage()

    def latest(self) -> Found | None:
        """As `CheckpointReader.latest`, and clears what earlier processes left.

        Torn saves and half-deleted checkpoints go, once an intact checkpoint is found
        or when no save has ever finished. Only one process may be using the directory:
        call it while holding the run's lock.
        """
        self.wait()
        found = None
        with agreement.shared_failure():
            if jax.process_index() == 0:
                found = super().latest()
                with disk_errors():
                    self.cleared = self._clear_leftovers()
        found = self._as_process_0(found)
        if found is not None:
            self._damaged |= {step for step, _ in found.skipped}
        return found

    def _as_process_0(self, found: Found | None) -> Found | None:
        """What process 0 found; the others need not verify it once more."""
        told = None
        if found is not None:
            told = [found.step, found.meta, found.metric, found.skipped]
        told = agreement.broadcast(told)
        if told is None or found is not None:
            return found
        step, meta, metric, skipped = told
        self._verified.add(step)
        pairs = tuple((number, reason) for number, reason in skipped)
        return Found(step, self.path(step), meta, metric, pairs)

    #: Names of torn saves that the last `latest()` removed, for a line to the user.
    cleared: tuple[str, ...] = ()

    def save(
        self, step: int, state: Any, meta: dict, *, metric: float | None = None
    ) -> bool:
        """Start saving; waits for the save before it, and for copies off the devices.

        `state` may be donated as soon as this returns.

        Args:
            step: number of finished training steps.
            state: a tree of arrays; on several processes, global arrays.
            meta: JSON.
            metric: what keep_best ranks by, lower is better; NaN is never best.

        Returns:
            False when an intact checkpoint of this step is already there.

        Raises:
            UserError: when this or the previous save fails for want of disk.
            TypeError, ValueError: for a leaf that is no array, meta that is not JSON.
        """
        self.wait()
        if agreement.broadcast(self._is_there(step)):
            return False
        leaves = state_tree.named(state)
        state_tree.check(leaves)
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        content = {
            "format": FORMAT,
            "step": step,
            "saved_by": f"attnjax {attnjax.__version__}",
            "metric": metric,
            "meta": meta,
            "arrays": state_tree.signature(leaves),
            "empty": state_tree.empties(state),
        }
        text = disk.to_json(content)
        building = self.directory / f"{step}{SAVING}"
        with agreement.shared_failure(), disk_errors():
            self._check_room(step, leaves)
            self._lay_out(building, text)
        with disk_errors():
            self._start(building, leaves)
        self._thread = threading.Thread(
            target=self._finish, args=(step, building, metric), name=f"commit-{step}"
        )
        self._thread.start()
        return True

    def drop_after(self, step: int) -> list[int]:
        """Remove checkpoints of later steps, newest first; which ones they were."""
        self.wait()
        later = [each for each in reversed(self.steps()) if each > step]
        with disk_errors():
            for each in later if jax.process_index() == 0 else ():
                _remove(self.path(each))
        self._verified -= set(later)
        self._damaged -= set(later)
        return later

    def wait(self) -> None:
        """Return when the save under way, if any, is finished; raise if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            with disk_errors():
                raise error

    def close(self) -> None:
        """Finish what is under way and let go of Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                orbax, self._orbax = self._orbax, None
                orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_room(self, step: int, leaves: dict[str, Any]) -> None:
        """Say what is missing before anything is written, where that can be known."""
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        need = sum(leaf.nbytes for leaf in leaves.values())
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise UserError(
                f"checkpoints: no space left on the disk: step {step} takes "
                f"{need / 1e6:,.1f} MB and {self.directory} has {free / 1e6:,.1f} MB "
                "free. Free some, or choose another --workdir."
            )

    def _is_there(self, step: int) -> bool:
        """Whether an intact checkpoint of a step is there; process 0 looks."""
        if jax.process_index() != 0 or step in self._damaged:
            return False
        if not self.path(step).is_dir():
            return False
        if step in self._verified or not self.verify(step):
            return True
        self._damaged.add(step)
        return False

    def _lay_out(self, building: Path, text: str) -> None:
        """Begin a save's directory, with meta.json in it."""
        if jax.process_index() != 0:
            return
        if building.exists():
            shutil.rmtree(building)
        building.mkdir()
        disk.write_atomic(building / META, text)

    def _start(self, building: Path, leaves: dict[str, Any]) -> None:
        """Hand the arrays to Orbax."""
        if self._orbax is None:
            # Uncompressed: weights do not compress, and zstd doubles the time.
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
            self._orbax = ocp.AsyncCheckpointer(handler)
        # Orbax copies off the devices, and copies host arrays, before it returns. It
        # refuses arrays without elements; their shape in meta.json says all.
        stored = {path: leaf for path, leaf in leaves.items() if leaf.size}
        self._orbax.save(
            building / STATE, args=ocp.args.PyTreeSave(state_tree.nest(stored))
        )

    def _finish(self, step: int, building: Path, metric: float | None) -> None:
        """In the background: wait for Orbax, seal, name, and let old ones go."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            digests.write(building)
            self._rename(step, building)
            self._verified.add(step)
            self._damaged.discard(step)
            self._metrics[step] = metric
            self._drop_old(step)
        except BaseException as error:
            self._error = error

    def _rename(self, step: int, building: Path) -> None:
        final = self.path(step)
        if final.exists():
            # A damaged checkpoint of this step: the new one takes its place.
            _remove(final)
        os.rename(building, final)
        disk.sync(self.directory)

    def _drop_old(self, newest: int) -> None:
        last, best, every = self._keep
        good = [step for step in self.steps() if step not in self._damaged]
        kept = set(good[-last:])
        ranked = [step for step in good if self._metric(step) is not None]
        kept |= set(sorted(ranked, key=lambda step: (self._metric(step), step))[:best])
        if every is not None:
            kept |= {step for step in good if step % every == 0}
        # What is newer than the step just saved is not ours to judge.
        for step in self.steps():
            if step < newest and step not in kept:
                _remove(self.path(step))
                self._verified.discard(step)
                self._damaged.discard(step)

    def _metric(self, step: int) -> float | None:
        if step not in self._metrics:
            # Ranking needs no digests: an unreadable one is simply not the best.
            try:
                self._metrics[step] = self._meta(step)["metric"]
            except (UserError, KeyError, TypeError):
                self._metrics[step] = None
        return self._metrics[step]

    def _clear_leftovers(self) -> tuple[str, ...]:
        if jax.process_index() != 0 or not self.directory.is_dir():
            return ()
        torn = sorted(
            path
            for path in self.directory.iterdir()
            if path.is_dir() and _LEFTOVER.fullmatch(path.name)
        )
        for path in torn:
            shutil.rmtree(path)
        return tuple(path.name for path in torn if path.name.endswith(SAVING))


def disk_errors():
    """`disk.disk_errors` for checkpoints."""
    return disk.disk_errors("checkpoints")


def _remove(path: Path) -> None:
    """Delete a checkpoint; a kill half-way leaves a name that is no checkpoint's."""
    doomed = path.with_name(path.name + DELETING)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
