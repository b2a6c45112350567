"""What a sweep will cost, before it is run: parameters, FLOPs, time."""

import dataclasses
import datetime
import statistics

from attnjax.core import mappings
from attnjax.core.errors import UserError
from attnjax.models.matching import Matched
from attnjax.studies import ledger
from attnjax.studies.sweep_file import Planned, Study
from attnjax.training import experiment, identity


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a point.

    Attributes:
        parameters: of the model.
        forward_flops_per_unit: of one token at the training length, or of one image.
        unit: "token" or "image".
        training_flops: 3 x forward, over all of the run.
        matched: how the FFN width was found, or None.
        seconds: estimated, or None where nothing has been measured.
    """

    parameters: int
    forward_flops_per_unit: float
    unit: str
    training_flops: float
    matched: Matched | None = None
    seconds: float | None = None


def costs(study: Study) -> tuple[list[Cost], str]:
    """The cost of every point, and what the estimated times rest on.

    Times are those of finished points, scaled by training FLOPs: whole processes,
    with start, compilation and evaluations, beside whatever else ran then.
    """
    known: dict[str, Cost] = {}
    found = [_cost(study, point, known) for point in study.asked]
    paces = [
        cost.training_flops / seconds
        for point, cost in zip(study.asked, found, strict=True)
        if (seconds := _measured(study, point)) is not None
    ]
    if not paces:
        return found, "time unknown: no point of this sweep has finished here yet"
    pace = statistics.median(paces)
    timed = [
        dataclasses.replace(cost, seconds=cost.training_flops / pace) for cost in found
    ]
    return timed, (
        f"time from {len(paces)} finished points, by FLOPs (median "
        f"{pace / 1e9:.3g} GFLOP/s)"
    )


def _cost(study: Study, point: Planned, known: dict[str, Cost]) -> Cost:
    """The cost of a point; points that differ in their seed cost the same."""
    same = mappings.digest(point.config, exclude=(*identity.EXCLUDES, "train.seed"))
    if same in known:
        return known[same]
    try:
        built = experiment.build(point.config)
    except UserError as error:
        raise UserError(f"--sweep: {study.file}: {point.name}: {error}") from None
    feed, train, forward = built.feed, built.train, built.row_flops
    known[same] = Cost(
        built.model.parameter_count(),
        forward / feed.units_per_row,
        feed.unit,
        3 * forward * train.steps * train.batch_size,
        built.model.matched,
    )
    return known[same]


def _measured(study: Study, point: Planned) -> float | None:
    """Seconds of the process that ran a finished point alone from its first step."""
    state = ledger.current(study.workdir, point.hash)
    whole = state.state == "done" and state.attempt == 1 and not point.vectorize
    if not (whole and state.started and state.ended):
        return None
    start, end = map(datetime.datetime.fromisoformat, (state.started, state.ended))
    return max((end - start).total_seconds(), 1.0)


def _matched(study: Study, found: list[Cost]) -> list[str]:
    """A line for each width that params=match found; seeds share theirs."""
    told: dict[str, str] = {}
    for point, cost in zip(study.asked, found, strict=True):
        if cost.matched is not None:
            told.setdefault(cost.matched.line(), point.name)
    return ["", *(f"{name}: {line}" for line, name in told.items())] if told else []


def lines(study: Study) -> list[str]:
    """The forecast as an aligned table and a closing line."""
    found, basis = costs(study)
    units = dict.fromkeys(cost.unit for cost in found)
    flops = "FLOPs/" + " or ".join(units)
    head = ("hash", "state", "parameters", flops, "time", "point")
    rows = [head]
    for point, cost in zip(study.asked, found, strict=True):
        state = ledger.current(study.workdir, point.hash).state
        rows.append(
            (
                point.hash,
                state,
                f"{cost.parameters:,}",
                f"{cost.forward_flops_per_unit:.4g}",
                "unknown" if cost.seconds is None else f"{cost.seconds:.0f} s",
                point.name,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    text = []
    for row in rows:
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row[:-1], widths, strict=True))
        ]
        text.append("  ".join([*cells, row[-1]]))
    text += _matched(study, found)
    left = [
        cost.seconds
        for point, cost in zip(study.asked, found, strict=True)
        if not ledger.is_done(study.run_directory(point)) and cost.seconds is not None
    ]
    end = f"{len(study.asked)} points"
    if left:
        end += f", about {sum(left) / 60:.0f} minutes of training left, one at a time"
    return [*text, "", f"{end} ({basis})."]
