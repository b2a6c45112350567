"""What one host of several does: its rows of the batch, and who writes files."""

import os

import jax

from attnjax.core.errors import UserError

# How launchers tell a process that it is one of several.
NUM_PROCESSES = "JAX_NUM_PROCESSES"


def refuse_several() -> None:
    """Raise UserError in a job of several processes that were not joined.

    Each would train the whole run by itself.
    """
    told = os.environ.get(NUM_PROCESSES, "1")
    if told not in ("", "1") and not jax.distributed.is_initialized():
        raise UserError(
            f"train: one process must train a run; got {NUM_PROCESSES}={told}. "
            "Several are not supported yet: use the devices of one host."
        )


def host_rows(batch_size: int) -> slice | None:
    """This host's rows of a global batch; None when it is the only host."""
    count = jax.process_count()
    if count == 1:
        return None
    share = batch_size // count
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def is_writer() -> bool:
    """Whether this host writes metrics and summaries."""
    return jax.process_index() == 0
