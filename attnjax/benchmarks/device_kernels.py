"""The fused kernels on a GPU: correctness first, then times, in parts of minutes.

Beside them, in the same rounds, run cuDNN, our blocked form and what is installed of
FlexAttention, flash-linear-attention and tokamax (`device_peers.INSTALL`).

Every row of the results is one variant checked or timed; rows are written as they are
made, and a second start goes on where the first one stopped. A row that was begun and
never finished (a kernel that hung or took the process with it) is passed over.
"""

import dataclasses
import datetime
import functools
import gc
import json
import re
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import kernels
from attnjax.benchmarks import (
    device_decode,
    device_peers,
    device_programs,
    device_report,
    device_torch,
    machine,
    timing,
)
from attnjax.benchmarks.device_cases import (
    CACHES,
    DECODE_VARIANTS,
    LINEAR_VARIANTS,
    VARIANTS,
    DecodeVariant,
    LinearVariant,
    Size,
    Variant,
    draw,
    draw_decode,
    flops,
)
from attnjax.core.errors import UserError

# An error in bfloat16 may be this many times that of the yardstick.
ALLOWED = 1.5
RESULTS = Path("benchmarks/results")
CHECKED = Size(2, 1000, 4)
TIMED = (Size(8, 2048, 16), Size(2, 8192, 16), Size(1, 16384, 16))
TIMED_VARIANT = Size(4, 4096, 16)
TIMED_LINEAR = Size(1, 8192, 32)
CHECKED_DECODE = Size(2, 2048, 8)
TIMED_DECODE = tuple(Size(8, cache, 32) for cache in CACHES)
AnyVariant = Variant | LinearVariant | DecodeVariant
OURS = "mosaic_gpu"
# Ours, which need not agree with the reference before they are timed: their checks say.
OWN = (OURS, "blocked")
# What an error is held to, the first that computes the same.
YARDSTICKS = ("cudnn", "blocked")
IMPLEMENTATIONS = (*OWN, "cudnn", "cudnn_mask", "tokamax", *device_peers.PEERS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        variants: by name.
        checked: size of the correctness rows.
        timed: sizes of the timing rows of plain variants; the last one is that of
            variants for long sequences.
        timed_variant: size of the timing rows of the others, and of plain ones.
        timed_linear: size of the timing rows of recurrences.
        checked_decode, timed_decode: sizes of the rows of steps of decoding, whose
            length is the cache's.
        implementations: what is compared, ours first.
        target: what the kernels are chosen for; None means the default device.
        interpret: of the run of `mosaic_gpu`, to try the script without a GPU.
        place: where PyTorch computes.
        rounds, calls: of a timing.
        steps: of a chain of decoding.
    """

    variants: dict[str, AnyVariant] = dataclasses.field(
        default_factory=lambda: VARIANTS | LINEAR_VARIANTS | DECODE_VARIANTS
    )
    checked: Size = CHECKED
    timed: tuple[Size, ...] = TIMED
    timed_variant: Size = TIMED_VARIANT
    timed_linear: Size = TIMED_LINEAR
    checked_decode: Size = CHECKED_DECODE
    timed_decode: tuple[Size, ...] = TIMED_DECODE
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    target: kernels.Target | None = None
    interpret: object = None
    place: device_torch.Place = device_torch.GPU
    rounds: int = 7
    calls: int = 10
    steps: int = device_decode.STEPS


def settings_without(names: str | None) -> Settings:
    """The settings, but for implementations named with commas between.

    Raises:
        UserError: when there is no such implementation, or it is ours.
    """
    left_out = [name.strip() for name in (names or "").split(",") if name.strip()]
    others = [name for name in IMPLEMENTATIONS if name != OURS]
    for name in left_out:
        if name not in others:
            raise UserError(
                f"bench device_kernels: --without takes some of {', '.join(others)}; "
                f"got {name!r}."
            )
    kept = tuple(name for name in IMPLEMENTATIONS if name not in left_out)
    return Settings(implementations=kept)


def run(
    pattern: str | None = None,
    *,
    path: Path | None = None,
    minutes: float = 8.0,
    settings: Settings | None = None,
    retry: bool = False,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Make the rows that are missing in `path`, correctness first.

    Args:
        pattern: regular expression of rows ("check causal 128", "time ...").
        path: results so far; None means one for this device and day.
        minutes: no row is begun after this long.
        retry: also make rows again that failed or never finished.
        bandwidth: of the device's memory in TB/s, kept with the results; steps of
            decoding are shown as a share of it.

    Returns:
        "machine", "rows" {name: row} and "left" (names of rows still to be made).

    Raises:
        UserError: without a GPU and a `path`, when the pattern matches nothing, or when
            `path` holds results of another machine or other versions.
    """
    settings = settings or Settings()
    if path is None and jax.default_backend() == "cpu":
        raise UserError(
            "bench device_kernels: needs a GPU; got the cpu, all that jax finds here. "
            "Install jax[cuda12] on a machine with one; for this one there is: python "
            "-m attnjax.bench kernels"
        )
    path = path or _path_of_today()
    report, start = _load(path), time.perf_counter()
    rows = report["rows"]
    if bandwidth is not None:
        report["bandwidth"] = bandwidth
    work = {
        name: make
        for name, make in _work(settings, rows).items()
        if re.search(pattern or "", name)
    }
    if not work:
        raise UserError(
            f"bench device_kernels: --filter matches no row; got {pattern!r}. Rows "
            f"are 'check NAME' and 'time NAME' of: {', '.join(settings.variants)}."
        )
    if retry:
        for name in work:
            if rows.get(name, {}).get("state") in ("begun", "failed"):
                del rows[name]
    for name, make in work.items():
        if name in rows or time.perf_counter() - start > 60 * minutes:
            continue
        rows[name] = {"state": "begun"}
        _save(path, report)
        rows[name] = _attempt(make)
        _save(path, report)
        print(f"{name}: {device_report.summary(rows[name])}", flush=True)
        _free()
        if not _answers():
            print("the device does not answer any more; run the command again")
            break
    report["left"] = [name for name in work if name not in rows]
    _save(path, report)
    return report


def _free() -> None:
    """Give back the memory of a row."""
    gc.collect()
    device_torch.release()


def _answers() -> bool:
    """Whether the device still computes: a kernel that read beyond its arrays leaves
    it useless to this process, and every later row would fail with it."""
    try:
        return float(jnp.ones(()) + 1) == 2
    except jax.errors.JaxRuntimeError:
        return False


def _attempt(make: Callable[[], dict]) -> dict[str, Any]:
    """A row, or what went wrong with it: a kernel that fails must not cost the time
    of the others."""
    try:
        return {"state": "done", **make()}
    except UserError:
        raise
    except Exception as error:
        lines = traceback.format_exception_only(error)
        return {"state": "failed", "error": "".join(lines)[:2000]}


def _work(settings: Settings, rows: Mapping) -> dict[str, Callable[[], dict]]:
    """Every row by name, in order: all checks, then all times, which go by what the
    checks among `rows` found."""
    work = {}
    for name, variant in settings.variants.items():
        make = check_decode if isinstance(variant, DecodeVariant) else check
        work[f"check {name}"] = functools.partial(make, settings, variant)
    for name, variant in settings.variants.items():
        for size in _timed_sizes(settings, variant):
            make = measure_decode if isinstance(variant, DecodeVariant) else measure
            work[f"time {name} S={size.length}"] = functools.partial(
                _made, make, settings, variant, size, rows, f"check {name}"
            )
    return work


def _made(make, settings, variant, size, rows, check_name):
    return make(settings, variant, size, rows.get(check_name))


def _timed_sizes(settings: Settings, variant: AnyVariant) -> tuple[Size, ...]:
    if isinstance(variant, DecodeVariant):
        return settings.timed_decode
    if variant.timed is not None:
        return (variant.timed,)
    if isinstance(variant, LinearVariant):
        return (settings.timed_linear,)
    if variant.plain:  # beside the others too
        return (*settings.timed, settings.timed_variant)
    return (settings.timed[-1] if variant.long else settings.timed_variant,)


def check(settings: Settings, variant: AnyVariant) -> dict[str, Any]:
    """Errors of each implementation against dense float64, and whether ours are
    within `ALLOWED` of the yardstick's and its gradients repeat bit for bit.

    The yardstick is cuDNN on the variant, or on plain attention of the same sizes
    where it cannot compute the variant; blocked, which rounds results alone and so
    is stricter, where there is no cuDNN.
    """
    size = variant.checked or settings.checked
    given = draw(variant, size, seed=1)
    find = functools.partial(device_programs.find, settings, variant, given=given)
    wanted = device_programs.exact(variant, given)
    errors, reasons, repeats = _errors(settings, find, wanted)
    if OURS not in errors:
        return {"errors": errors, "refused": reasons, "verdict": "refused"}
    yardstick, limits = _yardstick(settings, variant, size, errors)
    worst = max(errors[OURS][quantity] / limits[quantity] for quantity in limits)
    good = worst <= ALLOWED and repeats
    return {
        "errors": errors,
        "refused": reasons,
        "yardstick": yardstick,
        "worst_ratio": worst,
        "repeats": repeats,
        "verdict": "passed" if good else "FAILED",
    }


def check_decode(settings: Settings, variant: DecodeVariant) -> dict[str, Any]:
    """The same for a step of decoding: its output alone, held to cuDNN's or, where
    that cannot compute it, to that of blocked."""
    given = draw_decode(variant, settings.checked_decode, seed=1)
    find = functools.partial(device_decode.find, settings, variant, given=given)
    wanted = device_decode.exact(variant, given)
    errors, reasons, repeats = _errors(settings, find, wanted)
    held = [name for name in YARDSTICKS if _agrees(errors, name)]
    if OURS not in errors or not held:
        return {"errors": errors, "refused": reasons, "verdict": "refused"}
    worst = errors[OURS]["out"] / errors[held[0]]["out"]
    return {
        "errors": errors,
        "refused": reasons,
        "yardstick": held[0],
        "worst_ratio": worst,
        "repeats": repeats,
        "verdict": "passed" if worst <= ALLOWED and repeats else "FAILED",
    }


def _errors(settings: Settings, find, wanted):
    """({name: {quantity: error}}, {name: why there is none}, whether ours repeats)."""
    errors, repeats, reasons = {}, None, {}
    for name in settings.implementations:
        try:
            programs, reason = find(name=name)
            if programs is None:
                reasons[name] = reason
                continue
            got = programs.values()
            errors[name] = device_programs.distances(got, wanted)
            if name == OURS:
                again = programs.values()
                repeats = all(map(_same, jax.tree.leaves(got), jax.tree.leaves(again)))
        except Exception as error:
            if name in OWN:
                raise
            reasons[name] = device_peers.failed(error)
    return errors, reasons, repeats


def _yardstick(settings: Settings, variant: AnyVariant, size: Size, errors):
    """(name, {quantity: error}) that ours is held to."""
    quantities = ("out", "dq", "dk", "dv")
    for name in YARDSTICKS:
        if _agrees(errors, name):
            return name, {n: errors[name][n] for n in quantities}
        if name not in settings.implementations:
            continue
        plain = Variant(
            kernels.AttentionSpec(kernels.Causal()), variant.dims, variant.group
        )
        given = draw(plain, size, seed=1)
        find = functools.partial(device_programs.find, settings, plain, given=given)
        alone = dataclasses.replace(settings, implementations=(name,))
        found, _, _ = _errors(alone, find, device_programs.exact(plain, given))
        if _agrees(found, name):
            return f"{name}, plain causal", {n: found[name][n] for n in quantities}
    raise UserError(
        "bench device_kernels: a check needs cudnn or blocked as its yardstick; got "
        f"implementations={settings.implementations}."
    )


def _agrees(errors, name: str) -> bool:
    return name in errors and device_peers.disagreement(errors[name]) is None


def _same(left: jax.Array, right: jax.Array) -> bool:
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


def measure(
    settings: Settings, variant: AnyVariant, size: Size, checked=None
) -> dict[str, Any]:
    """Milliseconds and TFLOP/s, forward and forward with backward, of each
    implementation in alternating rounds; those of others once they were seen to
    compute the same.

    Args:
        checked: the row of `check` on the variant, if there is one.
    """
    given = draw(variant, size, seed=2)
    find = functools.partial(device_programs.find, settings, variant, given=given)
    found, reasons = _timed(settings, variant, find, check, checked)
    forward, both = {}, {}
    for name, programs in found.items():
        try:
            forward[name], both[name] = programs.forward(), programs.train()
        except Exception as error:
            if name == OURS:
                raise
            forward.pop(name, None)
            reasons[name] = device_peers.failed(error)
    both = {name: program for name, program in both.items() if program is not None}
    turns = {"rounds": settings.rounds, "calls": settings.calls}
    times = {
        "forward": timing.interleave(forward, **turns),
        "train": timing.interleave(both, **turns),
    }
    row: dict[str, Any] = {"refused": reasons, "times": {}}
    count = flops(variant, size)
    for name in forward:
        row["times"][name] = _cells(
            count, {part: x[name].median for part, x in times.items() if name in x}
        )
    for base in forward:
        for part, samples in times.items():
            if base != OURS and OURS in samples and base in samples:
                walls = samples[base].wall, samples[OURS].wall
                row[f"{part}_speedup_over_{base}"] = dataclasses.asdict(
                    timing.ratio(*walls)
                )
    return row


def _cells(count: float, seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds and TFLOP/s; without "train" those of the forward pass alone."""
    cells = {
        "forward_ms": 1e3 * seconds["forward"],
        "forward_tflops": 1e-12 * count / seconds["forward"],
    }
    if "train" in seconds:
        backward = max(seconds["train"] - seconds["forward"], 1e-12)
        cells["train_ms"] = 1e3 * seconds["train"]
        cells["backward_tflops"] = 1e-12 * 2.5 * count / backward
    return cells


def measure_decode(
    settings: Settings, variant: DecodeVariant, size: Size, checked=None
) -> dict[str, Any]:
    """Microseconds of a step and bytes of the cache a second, as `measure`."""
    given = draw_decode(variant, size, seed=2)
    find = functools.partial(device_decode.find, settings, variant, given=given)
    found, reasons = _timed(settings, variant, find, check_decode, checked)
    chains = {}
    for name, steps in found.items():
        try:
            chains[name] = steps.chain(settings.steps)
        except Exception as error:
            if name == OURS:
                raise
            reasons[name] = device_peers.failed(error)
    times = device_decode.time_chains(settings, chains, variant, size)
    return {"refused": reasons} | times


def _timed(settings: Settings, variant: AnyVariant, find, make_check, checked):
    """({name: programs}, {name: why it is not timed}): a peer that does not agree with
    the reference is named."""
    found, reasons = {}, {}
    for name in settings.implementations:
        try:
            programs, reason = find(name=name)
        except Exception as error:
            if name in OWN:
                raise
            programs, reason = None, device_peers.failed(error)
        if programs is not None and name not in OWN:
            reason = _disagreement(settings, variant, name, make_check, checked)
        if reason is None:
            found[name] = programs
        else:
            reasons[name] = reason
    return found, reasons


def _disagreement(settings, variant, name: str, make_check, checked) -> str | None:
    """Why an implementation of others must not be timed, by the row of its check or,
    without one, by a check of it alone."""
    known = checked or {}
    if name not in known.get("errors", {}) and name not in known.get("refused", {}):
        alone = dataclasses.replace(settings, implementations=(name,))
        known = make_check(alone, variant)
    if name in known["errors"]:
        return device_peers.disagreement(known["errors"][name])
    return f"is not timed unchecked: it {known['refused'][name]}"


def _path_of_today() -> Path:
    kind = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    return RESULTS / f"{kind}-{datetime.date.today().isoformat()}.json"


def _load(path: Path) -> dict[str, Any]:
    """The results so far, or an empty report."""
    here = {"benchmark": "device_kernels", "machine": machine.describe(), "rows": {}}
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        return here
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in ("device", "versions"):
        if found.get("machine", {}).get(key) != here["machine"][key]:
            raise UserError(
                f"bench device_kernels: {path} holds results of another {key}; got "
                f"{found.get('machine', {}).get(key)} beside {here['machine'][key]}. "
                "Name another file with --json."
            )
    return found


def _save(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
