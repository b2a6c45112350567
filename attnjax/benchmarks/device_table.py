"""The README's table of the fused kernels, of what `device_kernels` measured on a GPU.

Speeds are ratios of median times in one run, ours to another's: 2 is twice as fast.
What no results file has is "not measured".
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from attnjax.benchmarks.device_kernels import OURS, RESULTS
from attnjax.core.errors import UserError

PLAIN = "causal 128"
Part = Literal["forward", "backward", "both", "step"]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: in words.
        variants: of `device_cases`: one, or several whose speeds are shown together.
        part: of the computation; "both" is forward with backward, "step" one of
            decoding.
        against: an implementation, on the same variant; "plain": our kernel on
            plain causal attention of the same sizes; or "memory": the time in which
            the device could read the cache.
        goal: the ratio we are after; None where there is no goal.
    """

    what: str
    variants: tuple[str, ...]
    part: Part
    against: str
    goal: float | None = None


def _pair(what: str, variants: tuple[str, ...], against: str, goal: float):
    """Forward and backward."""
    return (
        Line(f"{what}, forward", variants, "forward", against, goal),
        Line(f"{what}, backward", variants, "backward", against, goal),
    )


HOOKED = ("soft cap", "ALiBi", "score function", "distances", "causal bias")
ALL_KEYS, SOME_KEYS = ("decode all keys",), ("decode window and sinks",)
LINES = (
    Line("causal, forward", (PLAIN,), "forward", "cudnn", 0.97),
    Line("causal, backward", (PLAIN,), "backward", "cudnn", 0.95),
    Line("causal, backward", (PLAIN,), "backward", "tokamax", 1.15),
    Line("ALiBi, forward", ("ALiBi",), "forward", "plain", 0.96),
    Line("bias, forward", ("causal bias",), "forward", "plain", 0.96),
    Line("soft cap, forward", ("soft cap",), "forward", "plain", 0.92),
    Line("soft cap, forward and backward", ("soft cap",), "both", "plain", 0.90),
    Line("learned sink, forward", ("learned sink",), "forward", "plain", 0.98),
    Line("softmax off by one, forward", ("off by one",), "forward", "plain", 0.98),
    Line("elementwise output gate, forward", ("gate",), "forward", "plain", 0.98),
    Line("sigmoid, forward", ("sigmoid",), "forward", "plain", 1.08),
    Line("softplus, forward", ("softplus",), "forward", "plain", 0.90),
    Line("any score hook, forward", HOOKED, "forward", "flex", 1.6),
    Line("any score hook, backward", HOOKED, "backward", "flex", 1.4),
    Line(
        "window of 1,024 in 16,384, forward", ("window",), "forward", "cudnn_mask", 2.5
    ),
    Line("packed documents, forward", ("packed",), "forward", "cudnn_mask", 2.5),
    Line(
        "packed documents, window of 1,024, forward",
        ("packed window",),
        "forward",
        "cudnn_mask",
        2.5,
    ),
    Line("bias, D = 64, forward", ("bias, one row",), "forward", "cudnn", 2.7),
    Line("bias, D = 64, backward", ("bias, one row",), "backward", "tokamax", 1.5),
    *_pair("gated delta rule, 16/32 heads", ("linear gated delta 16/32",), "fla", 1.6),
    *_pair("retention and lightning attention", ("linear retention",), "fla", 1.4),
    *_pair("gated linear attention", ("linear channel decay",), "fla", 1.4),
    Line("decoding, all keys", ALL_KEYS, "step", "cudnn"),
    Line("decoding, all keys", ALL_KEYS, "step", "flex"),
    Line("decoding, all keys", ALL_KEYS, "step", "memory"),
    Line("decoding, window of 1,024 and sinks", SOME_KEYS, "step", "flex"),
)
NAMES = {
    "cudnn": "cuDNN",
    "cudnn_mask": "cuDNN given the mask",
    "tokamax": "tokamax Mosaic",
    "flex": "FlexAttention",
    "fla": "fla Triton",
    "plain": "our plain kernel",
    "blocked": "our blocked form",
    "memory": "reading the cache",
}


def ratios(report: dict[str, Any], line: Line) -> list[float]:
    """A line's speeds, one for each length at which both sides were timed."""
    found, rows = [], report["rows"]
    for title, row in rows.items():
        variant, _, length = title.removeprefix("time ").rpartition(" S=")
        if not title.startswith("time ") or variant not in line.variants:
            continue
        other, name = row, line.against
        if name == "plain":
            other, name = rows.get(f"time {PLAIN} S={length}", {}), OURS
        ours = row.get("times", {}).get(OURS)
        theirs = other.get("times", {}).get(name)
        if name == "memory" and "bandwidth" in report and "bytes" in row:
            theirs = {"us": 1e-6 * row["bytes"] / report["bandwidth"]}
        both = [_time(x, line.part) if x else None for x in (theirs, ours)]
        if None not in both:
            found.append(both[0] / both[1])
    return found


def _time(times: dict[str, float], part: Part) -> float | None:
    """A part's time, or None where it was not timed."""
    if part == "step":
        return times["us"]
    forward, train = times["forward_ms"], times.get("train_ms")
    if part == "forward" or train is None:
        return forward if part == "forward" else None
    return train if part == "both" else train - forward


def render(report: dict[str, Any] | None) -> str:
    """The table in Markdown; None is no report."""
    device = "" if report is None else f", {report['machine']['device']}"
    lines = [
        f"| D = 128{device} | speed against | goal | measured |",
        "|---|---|---|---|",
    ]
    for line in LINES:
        values = [] if report is None else ratios(report, line)
        found = sorted({f"{value:.2f}" for value in values}, key=float)
        span = " to ".join(found if len(found) < 3 else (found[0], found[-1]))
        measured = f"{span} x" if found else "not measured"
        goal = "" if line.goal is None else f"{line.goal:g} x"
        against = NAMES[line.against]
        lines.append(f"| {line.what} | {against} | {goal} | {measured} |")
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
