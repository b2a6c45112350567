"""The fused kernels on a GPU: correctness first, then times, in parts of minutes.

Every row of the results is one variant checked or timed; rows are written as they are
made, and a second start goes on where the first one stopped. A row that was begun and
never finished (a kernel that hung or took the process with it) is passed over.
"""

import dataclasses
import datetime
import functools
import json
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import kernels
from attnjax.benchmarks import machine, tables, timing
from attnjax.benchmarks.device_cases import (
    LINEAR_VARIANTS,
    VARIANTS,
    LinearVariant,
    Size,
    Variant,
    draw,
    flops,
)
from attnjax.benchmarks.device_families import Family, family_of
from attnjax.core.errors import UserError

# An error in bfloat16 may be this many times that of the yardstick.
ALLOWED = 1.5
RESULTS = Path("benchmarks/results")
CHECKED = Size(2, 1000, 4)
TIMED = (Size(8, 2048, 16), Size(2, 8192, 16), Size(1, 16384, 16))
TIMED_VARIANT = Size(4, 4096, 16)
TIMED_LINEAR = Size(1, 8192, 32)
AnyVariant = Variant | LinearVariant


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
        implementations: what is compared, ours first.
        target: what the kernels are chosen for; None means the default device.
        interpret: of the run of `mosaic_gpu`, to try the script without a GPU.
        rounds, calls: of a timing.
    """

    variants: dict[str, AnyVariant] = dataclasses.field(
        default_factory=lambda: VARIANTS | LINEAR_VARIANTS
    )
    checked: Size = CHECKED
    timed: tuple[Size, ...] = TIMED
    timed_variant: Size = TIMED_VARIANT
    timed_linear: Size = TIMED_LINEAR
    implementations: tuple[str, ...] = ("mosaic_gpu", "cudnn", "blocked")
    target: kernels.Target | None = None
    interpret: object = None
    rounds: int = 7
    calls: int = 10


def run(
    pattern: str | None = None,
    *,
    path: Path | None = None,
    minutes: float = 8.0,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Make the rows that are missing in `path`, correctness first.

    Args:
        pattern: regular expression of rows ("check causal 128", "time ...").
        path: results so far; None means one for this device and day.
        minutes: no row is begun after this long.

    Returns:
        "machine", "rows" {name: row} and "left" (names of rows still to be made).

    Raises:
        UserError: when the pattern matches nothing, or `path` holds results of another
            machine or other versions.
    """
    settings = settings or Settings()
    path = path or _path_of_today()
    work = {
        name: make
        for name, make in _work(settings).items()
        if re.search(pattern or "", name)
    }
    if not work:
        raise UserError(
            f"bench device_kernels: --filter matches no row; got {pattern!r}. Rows "
            f"are 'check NAME' and 'time NAME' of: {', '.join(settings.variants)}."
        )
    report, start = _load(path), time.perf_counter()
    rows = report["rows"]
    for name, make in work.items():
        if name in rows or time.perf_counter() - start > 60 * minutes:
            continue
        rows[name] = {"state": "begun"}
        _save(path, report)
        rows[name] = _attempt(make)
        _save(path, report)
        print(f"{name}: {_summary(rows[name])}", flush=True)
    report["left"] = [name for name in work if name not in rows]
    _save(path, report)
    return report


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


def _work(settings: Settings) -> dict[str, Callable[[], dict]]:
    """Every row by name, in order: all checks, then all times."""
    work = {}
    for name, variant in settings.variants.items():
        make = functools.partial(check, settings, variant)
        work[f"check {name}"] = make
    for name, variant in settings.variants.items():
        for size in _timed_sizes(settings, variant):
            make = functools.partial(measure, settings, variant, size)
            work[f"time {name} S={size.length}"] = make
    return work


def _timed_sizes(settings: Settings, variant: AnyVariant) -> tuple[Size, ...]:
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
    given = draw(variant, settings.checked, seed=1)
    wanted = _exact(variant, given)
    errors, repeats, reasons = {}, None, {}
    for name in settings.implementations:
        program, reason = _program(settings, variant, name, given)
        if program is None:
            reasons[name] = reason
            continue
        got = program(*given)
        errors[name] = _errors(got, wanted)
        if name == "mosaic_gpu":
            again = program(*given)
            repeats = all(map(_same, jax.tree.leaves(got), jax.tree.leaves(again)))
    if "mosaic_gpu" not in errors:
        return {"errors": errors, "refused": reasons, "verdict": "refused"}
    yardstick, limits = _yardstick(settings, variant, errors)
    worst = max(
        errors["mosaic_gpu"][quantity] / limits[quantity] for quantity in limits
    )
    good = worst <= ALLOWED and repeats
    return {
        "errors": errors,
        "refused": reasons,
        "yardstick": yardstick,
        "worst_ratio": worst,
        "repeats": repeats,
        "verdict": "passed" if good else "FAILED",
    }


def _yardstick(settings: Settings, variant: AnyVariant, errors):
    """(name, {quantity: error}) that ours is held to."""
    for name in ("cudnn", "blocked"):
        if name in errors:
            found = errors[name]
            return name, {n: found[n] for n in ("out", "dq", "dk", "dv")}
        if name not in settings.implementations:
            continue
        plain = Variant(
            kernels.AttentionSpec(kernels.Causal()), variant.dims, variant.group
        )
        given = draw(plain, settings.checked, seed=1)
        program, _ = _program(settings, plain, name, given)
        if program is not None:
            found = _errors(program(*given), _exact(plain, given))
            limits = {n: found[n] for n in ("out", "dq", "dk", "dv")}
            return f"{name}, plain causal", limits
    raise UserError(
        "bench device_kernels: a check needs cudnn or blocked as its yardstick; got "
        f"implementations={settings.implementations}."
    )


def _runner(settings: Settings, variant: AnyVariant, name: str, given):
    """((q, k, v, operands) -> (output, log-sum, state or None), None), or (None, why
    the implementation cannot)."""
    qkv, operands, _ = given
    target, family = settings.target or kernels.default_target(), family_of(variant)
    request = family.make_request(*qkv, variant.spec, operands, target)
    module = family.modules.get(name)
    if module is None:
        return None, f"does not exist for {family.name}"
    reason = module.supports(request)
    if reason is not None:
        return None, reason
    more = {}
    if name == "mosaic_gpu" and settings.interpret is not None:
        more["interpret"] = settings.interpret
    return functools.partial(family.run, module, request, more), None


def _program(settings: Settings, variant: AnyVariant, name: str, given):
    """(jitted (qkv, operands, cotangents) -> values and gradients, None), or (None,
    why the implementation cannot)."""
    run_it, reason = _runner(settings, variant, name, given)
    if run_it is None:
        return None, reason
    family = family_of(variant)
    return jax.jit(functools.partial(_values_and_gradients, run_it, family)), None


def _values_and_gradients(run_it, family: Family, qkv, operands, cotangents):
    """{"out", "lse" or "state", "dq", "dk", "dv", "d OPERAND"}."""
    trained = {
        n: x for n, x in operands.items() if jnp.issubdtype(x.dtype, jnp.inexact)
    }

    def total(qkv, trained):
        out, beside = run_it(*qkv, operands | trained)
        out = out.astype(qkv[0].dtype)
        wide = jnp.promote_types(jnp.float32, out.dtype)
        value = jnp.sum(out.astype(wide) * cotangents[0].astype(wide))
        if beside is None:
            return value, {"out": out}
        value += jnp.sum(beside * cotangents[1].astype(beside.dtype))
        return value, {"out": out, family.beside: beside}

    gradients = jax.grad(total, argnums=(0, 1), has_aux=True)
    (d_qkv, d_trained), found = gradients(qkv, trained)
    found |= dict(zip(("dq", "dk", "dv"), d_qkv, strict=True))
    return found | {f"d {name}": x for name, x in d_trained.items()}


def _exact(variant: AnyVariant, given) -> dict[str, np.ndarray]:
    """The same in dense float64."""
    with jax.enable_x64(True):
        qkv, operands, cotangents = jax.tree.map(_widen, given)
        target, family = kernels.default_target(), family_of(variant)
        request = family.make_request(*qkv, variant.spec, operands, target)
        run_it = functools.partial(family.run, family.modules["reference"], request, {})
        program = functools.partial(_values_and_gradients, run_it, family)
        found = jax.jit(program)(qkv, operands, cotangents)
        return {name: np.asarray(x) for name, x in found.items()}


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _errors(got, wanted) -> dict[str, float]:
    """Distances relative to the norm, infinite where something is not finite."""
    found = {}
    for name, right in wanted.items():
        left = np.asarray(got[name]).astype(np.float64)
        error = np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-300)
        found[name] = float(error) if np.isfinite(error) else float("inf")
    return found


def _same(left: jax.Array, right: jax.Array) -> bool:
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


def measure(settings: Settings, variant: AnyVariant, size: Size) -> dict[str, Any]:
    """Milliseconds and TFLOP/s, forward and forward with backward, of each
    implementation in alternating rounds."""
    given = draw(variant, size, seed=2)
    forward, both, reasons = {}, {}, {}
    for name in settings.implementations:
        run_it, reason = _runner(settings, variant, name, given)
        if run_it is None:
            reasons[name] = reason
            continue
        try:
            forward[name] = _repeater(functools.partial(_output, run_it), given)
            family = family_of(variant)
            program = functools.partial(_values_and_gradients, run_it, family)
            both[name] = _repeater(program, given)
        except jax.errors.JaxRuntimeError as error:
            forward.pop(name, None)
            reasons[name] = str(error).splitlines()[0][:300]
    turns = {"rounds": settings.rounds, "calls": settings.calls}
    times = {
        "forward": timing.interleave(forward, **turns),
        "train": timing.interleave(both, **turns),
    }
    row: dict[str, Any] = {"refused": reasons, "times": {}}
    for name in both:
        parts = {part: found[name].median for part, found in times.items()}
        backward = max(parts["train"] - parts["forward"], 1e-12)
        count = flops(variant, size)
        row["times"][name] = {
            "forward_ms": 1e3 * parts["forward"],
            "train_ms": 1e3 * parts["train"],
            "forward_tflops": 1e-12 * count / parts["forward"],
            "backward_tflops": 1e-12 * 2.5 * count / backward,
        }
    for base in ("cudnn", "blocked"):
        if "mosaic_gpu" in both and base in both:
            for part, found in times.items():
                walls = found[base].wall, found["mosaic_gpu"].wall
                row[f"{part}_speedup_over_{base}"] = dataclasses.asdict(
                    timing.ratio(*walls)
                )
    return row


def _output(run_it, qkv, operands, _):
    return run_it(*qkv, operands)[0]


def _repeater(program, given) -> Callable[[int], None]:
    compiled = jax.jit(program).lower(*given).compile()

    def repeat(count: int) -> None:
        for _ in range(count):
            out = compiled(*given)
        jax.block_until_ready(out)

    return repeat


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


def _summary(row: dict[str, Any]) -> str:
    if row["state"] == "failed":
        return f"FAILED: {row['error'].splitlines()[0][:200]}"
    if "verdict" in row:
        more = f", worst ratio {row['worst_ratio']:.2f}" if "worst_ratio" in row else ""
        return row["verdict"] + more
    cells = [f"{n} {x['train_ms']:.2f} ms" for n, x in row["times"].items()]
    return "fwd+bwd " + ", ".join(cells)


def print_report(report: dict[str, Any]) -> None:
    """The report as text: what was checked, what was timed, what is left."""
    print(machine.line(report["machine"]))
    rows = report["rows"]
    checks = {name: row for name, row in rows.items() if name.startswith("check ")}
    if checks:
        cells = [(name, *_check_cells(row)) for name, row in checks.items()]
        tables.show(("check", "verdict", "held to", "x", "repeats"), cells)
    lines = []
    for name, row in rows.items():
        for implementation, x in row.get("times", {}).items():
            parts = ("forward_ms", "train_ms", "forward_tflops", "backward_tflops")
            lines.append(
                (f"{name} {implementation}", *(f"{x[part]:.2f}" for part in parts))
            )
    if lines:
        columns = ("time", "fwd ms", "fwd+bwd ms", "fwd TFLOP/s", "bwd TFLOP/s")
        tables.show(columns, lines)
    for name, row in rows.items():
        if row["state"] == "failed":
            print(f"{name}: {_summary(row)}")
    stuck = [name for name, row in rows.items() if row["state"] == "begun"]
    if stuck:
        print(f"begun and never finished: {', '.join(stuck)}")
    print(f"{len(report.get('left', []))} rows left; run the command again for more")


def _check_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["state"] != "done":
        return ({"begun": "never finished"}.get(row["state"], "FAILED"), "", "", "")
    if "worst_ratio" not in row:
        return (row["verdict"], "", "", "")
    ratio = f"{row['worst_ratio']:.2f}"
    return (row["verdict"], row["yardstick"], ratio, "yes" if row["repeats"] else "NO")
