"""What one host of several does: its rows of the batch, and who writes files."""

import jax


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
