"""What the mixers of a model add to a task's loss and metrics."""

import jax


def with_reports(total: jax.Array, metrics: dict, out, share: jax.Array):
    """The loss and the metrics of a (micro-)batch with those that its mixers report.

    Args:
        total: the task's own loss, a scalar.
        metrics: its own metrics.
        out: the layers' StackOut: losses (as weighted) are added, metrics are not.
        share: of the whole batch that the micro-batch is.

    Returns:
        (loss, metrics), of which micro-batches add up to the batch's.
    """
    losses = {name: value * share for name, value in out.losses.items()}
    more = {name: value * share for name, value in out.metrics.items()}
    return sum(losses.values(), start=total), metrics | losses | more
