"""The README's table of the fused kernels, of what `device_kernels` measured on a GPU.

Speeds are ratios of median times in one run, ours to another's: 2 is twice as fast.
What no results file has is "not measured".
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from attnjax.benchmarks.device_kernels import RESULTS
from attnjax.core.errors import UserError

OURS = "mosaic_gpu"
PLAIN = "causal 128"
Part = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: in words.
        variant: of `device_cases`.
        part: of the computation.
        against: an implementation, on the same variant; or "plain": our kernel on
            plain causal attention of the same sizes.
        goal: the ratio we are after.
    """

    what: str
    variant: str
    part: Part
    against: str
    goal: float


LINES = (
    Line("causal, forward", PLAIN, "forward", "cudnn", 0.97),
    Line("causal, backward", PLAIN, "backward", "cudnn", 0.95),
    Line("ALiBi, forward", "ALiBi", "forward", "plain", 0.96),
    Line("soft cap, forward", "soft cap", "forward", "plain", 0.92),
    Line("learned sink, forward", "learned sink", "forward", "plain", 0.98),
    Line("softmax off by one, forward", "off by one", "forward", "plain", 0.98),
    Line("elementwise output gate, forward", "gate", "forward", "plain", 0.98),
    Line("sigmoid, forward", "sigmoid", "forward", "plain", 1.08),
    Line("softplus, forward", "softplus", "forward", "plain", 0.90),
    Line("window of 1,024 in 16,384, forward", "window", "forward", "cudnn", 2.5),
    Line("gated delta rule, forward", "linear gated delta", "forward", "blocked", 1.0),
    Line(
        "gated delta rule, backward", "linear gated delta", "backward", "blocked", 1.0
    ),
)
NAMES = {"cudnn": "cuDNN", "plain": "our plain kernel", "blocked": "our blocked form"}


def ratios(rows: dict[str, Any], line: Line) -> list[float]:
    """A line's speeds, one for each length at which both sides were timed."""
    found = []
    for title, row in rows.items():
        start = f"time {line.variant} S="
        if not title.startswith(start):
            continue
        other, name = row, line.against
        if name == "plain":
            other = rows.get(f"time {PLAIN} S={title.removeprefix(start)}", {})
            name = OURS
        ours = row.get("times", {}).get(OURS)
        theirs = other.get("times", {}).get(name)
        if ours and theirs:
            found.append(_time(theirs, line.part) / _time(ours, line.part))
    return found


def _time(times: dict[str, float], part: Part) -> float:
    forward = times["forward_ms"]
    return forward if part == "forward" else times["train_ms"] - forward


def render(report: dict[str, Any] | None) -> str:
    """The table in Markdown; None is no report."""
    rows = {} if report is None else report["rows"]
    device = "" if report is None else f", {report['machine']['device']}"
    lines = [
        f"| D = 128{device} | speed against | goal | measured |",
        "|---|---|---|---|",
    ]
    for line in LINES:
        found = sorted({f"{value:.2f}" for value in ratios(rows, line)}, key=float)
        span = " to ".join(found if len(found) < 3 else (found[0], found[-1]))
        measured = f"{span} x" if found else "not measured"
        against = NAMES[line.against]
        lines.append(f"| {line.what} | {against} | {line.goal:g} x | {measured} |")
    return "\n".join(lines)


def newest(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The latest results of `device_kernels`, by the date in their file names; None
    where there are none."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stem[-10:])
    return read(files[-1]) if files else None


def read(path: Path) -> dict[str, Any]:
    """A results file of `device_kernels`.

    Raises:
        UserError: not there, or of another kind.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"bench device_table: cannot read {path}: {error}.") from error
    if not isinstance(report, dict) or report.get("benchmark") != "device_kernels":
        raise UserError(
            f"bench device_table: {path} holds no results of device_kernels. Make them "
            "with: python -m attnjax.bench device_kernels"
        )
    return report
