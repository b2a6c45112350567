"""Hybrids by name: which layers keep a standard mixer beside a simpler one.

Source: Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602, section
4 and the appendix on layer schedules.
"""

from attnjax.core.errors import unknown

SCHEDULES = {
    "even": lambda i, n: i % 2 == 0,
    "odd": lambda i, n: i % 2 == 1,
    "top": lambda i, n: i <= n // 2,
    "middle": lambda i, n: i <= n // 4 or i > n - n // 4,
    "bottom": lambda i, n: i > n - n // 2,
    "quarter": lambda i, n: i % 4 == 0,
    "first": lambda i, n: i == 1,
    "last": lambda i, n: i == n,
    "bilateral": lambda i, n: i in (1, n),
    "uniform": lambda i, n: False,
}


def hybrid(
    name: str, num_layers: int, *, simple: str, standard: str = "attention"
) -> tuple[str, ...]:
    """`config.model.layers` of a hybrid: which layers keep standard attention.

    Args:
        name: one of `SCHEDULES`, defined on layers counted from 1: "even" (the
            paper's hybrid), "odd", "top" (the first half), "middle" (all but the middle
            half), "bottom", "quarter" (25%), "first", "last", "bilateral" or
            "uniform" (none).
        num_layers: depth.
        simple, standard: instance names.

    Raises:
        UserError: for an unknown name.
    """
    if name not in SCHEDULES:
        raise unknown("hybrid", "schedule", name, SCHEDULES)
    keeps = SCHEDULES[name]
    return tuple(
        standard if keeps(i, num_layers) else simple for i in range(1, num_layers + 1)
    )


def skipped(names: tuple[str, ...], *, simple: str) -> tuple[int, ...]:
    """The layers (from 0) that stay in the skip evaluation of a trained hybrid: what
    `python -m attnjax.evaluate --keep_layers` takes."""
    return tuple(i for i, name in enumerate(names) if name != simple)
