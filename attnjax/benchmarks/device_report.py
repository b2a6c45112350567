"""What `device_kernels` found, as text: what was checked, timed, refused, is left."""

from typing import Any

from attnjax.benchmarks import device_peers, machine, tables


def summary(row: dict[str, Any]) -> str:
    """A row in one line."""
    if row["state"] == "failed":
        return f"FAILED: {row['error'].splitlines()[0][:200]}"
    if "verdict" in row:
        more = f", worst ratio {row['worst_ratio']:.2f}" if "worst_ratio" in row else ""
        return row["verdict"] + more
    times = row["times"].items()
    if "bytes" in row:
        return "a step " + ", ".join(f"{n} {x['us']:.1f} us" for n, x in times)
    cells = [f"{n} {x['train_ms']:.2f} ms" for n, x in times if "train_ms" in x]
    return "fwd+bwd " + ", ".join(cells)


def print_report(report: dict[str, Any]) -> None:
    """The report as tables."""
    print(machine.line(report["machine"]))
    rows = report["rows"]
    checks = {name: row for name, row in rows.items() if name.startswith("check ")}
    if checks:
        cells = [(name, *_check_cells(row)) for name, row in checks.items()]
        tables.show(("check", "verdict", "held to", "x", "repeats"), cells)
    timed = {name: row for name, row in rows.items() if "times" in row}
    _print_times({n: x for n, x in timed.items() if "bytes" not in x})
    _print_steps({n: x for n, x in timed.items() if "bytes" in x}, report)
    _print_refusals(rows)
    for name, row in rows.items():
        if row["state"] == "failed":
            print(f"{name}: {summary(row)}")
    stuck = [name for name, row in rows.items() if row["state"] == "begun"]
    if stuck:
        print(f"begun and never finished: {', '.join(stuck)}")
    print(f"{len(report.get('left', []))} rows left; run the command again for more")


def _print_times(rows: dict[str, Any]) -> None:
    parts = ("forward_ms", "train_ms", "forward_tflops", "backward_tflops")
    lines = [
        (f"{name} {who}", *(f"{x[part]:.2f}" if part in x else "" for part in parts))
        for name, row in rows.items()
        for who, x in row["times"].items()
    ]
    if lines:
        columns = ("time", "fwd ms", "fwd+bwd ms", "fwd TFLOP/s", "bwd TFLOP/s")
        tables.show(columns, lines)


def _print_steps(rows: dict[str, Any], report: dict[str, Any]) -> None:
    bandwidth = report.get("bandwidth")
    lines = []
    for name, row in rows.items():
        for who, x in row["times"].items():
            speed = 1e-12 * x["bytes_per_s"]
            share = f"{speed / bandwidth:.0%}" if bandwidth else "unknown"
            lines.append((f"{name} {who}", f"{x['us']:.1f}", f"{speed:.2f}", share))
    if lines:
        columns = ("a step of decoding", "us", "TB/s of the cache", "of the memory's")
        tables.show(columns, lines)


def _print_refusals(rows: dict[str, Any]) -> None:
    """Why others were not timed or checked, each reason once, and how to have them."""
    seen: dict[str, int] = {}
    for row in rows.values():
        for name, reason in row.get("refused", {}).items():
            line = f"{name} {reason}"
            seen[line] = seen.get(line, 0) + 1
    for line, count in seen.items():
        print(f"refused in {count} rows: {line}")
    if any("pip install" in line or "CUDA" in line for line in seen):
        print(device_peers.INSTALL)


def _check_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["state"] != "done":
        return ({"begun": "never finished"}.get(row["state"], "FAILED"), "", "", "")
    if "worst_ratio" not in row:
        return (row["verdict"], "", "", "")
    ratio = f"{row['worst_ratio']:.2f}"
    return (row["verdict"], row["yardstick"], ratio, "yes" if row["repeats"] else "NO")
