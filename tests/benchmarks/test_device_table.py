"""The README's table of the fused kernels: what it reads off results."""

import json
from pathlib import Path

import pytest

from attnjax import bench
from attnjax.benchmarks import device_cases, device_table
from attnjax.core.errors import UserError

ROOT = Path(__file__).parents[2]


def row(**times):
    """Milliseconds (forward, forward with backward) by implementation."""
    return {
        "state": "done",
        "times": {
            name: {"forward_ms": forward, "train_ms": both}
            for name, (forward, both) in times.items()
        },
    }


REPORT = {
    "benchmark": "device_kernels",
    "machine": {"device": "a GPU"},
    "rows": {
        "check causal 128": {"state": "done", "verdict": "passed"},
        "time causal 128 S=2048": row(mosaic_gpu=(2.0, 6.0), cudnn=(1.0, 4.0)),
        "time causal 128 S=4096": row(mosaic_gpu=(4.0, 9.0), cudnn=(3.0, 7.0)),
        "time causal 128 S=8192": row(mosaic_gpu=(8.0, 9.0), cudnn=(12.0, 12.5)),
        "time ALiBi S=4096": row(mosaic_gpu=(5.0, 10.0)),
        "time soft cap S=999": row(mosaic_gpu=(5.0, 10.0)),
        "time linear gated delta S=8192": row(mosaic_gpu=(1.0, 3.0), blocked=(3.0, 9)),
        "time window S=16384": {"state": "failed", "error": "x"},
    },
}


def cells(report):
    lines = device_table.render(report).splitlines()[2:]
    return {line.split(" | ")[0][2:]: line.split(" | ")[3][:-2] for line in lines}


def test_speeds_are_ratios_to_the_other_side_at_the_same_length():
    found = cells(REPORT)
    assert found["causal, forward"] == "0.50 to 1.50 x"
    assert found["causal, backward"] == "0.50 to 0.80 x"
    assert found["ALiBi, forward"] == "0.80 x"
    assert found["gated delta rule, forward"] == "3.00 x"
    assert found["gated delta rule, backward"] == "3.00 x"


def test_what_has_no_time_or_no_partner_is_not_measured():
    found = cells(REPORT)
    for name in ("soft cap, forward", "sigmoid, forward"):
        assert found[name] == "not measured"
    assert found["window of 1,024 in 16,384, forward"] == "not measured"
    assert set(cells(None).values()) == {"not measured"}


def test_every_line_is_of_a_variant_that_is_measured():
    every = device_cases.VARIANTS | device_cases.LINEAR_VARIANTS
    for line in device_table.LINES:
        assert line.variant in every


def test_the_newest_results_are_shown(tmp_path, capsys):
    assert device_table.newest(tmp_path) is None
    for name, device in (("z-2026-01-02", "old"), ("a-2026-11-01", "new")):
        report = REPORT | {"machine": {"device": device}}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    assert device_table.newest(tmp_path)["machine"]["device"] == "new"
    bench.main(["device_table", f"--json={tmp_path / 'z-2026-01-02.json'}"])
    assert "| D = 128, old |" in capsys.readouterr().out


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(UserError, match="cannot read"):
        device_table.read(file)
    file.write_text('{"benchmark": "kernels"}')
    with pytest.raises(UserError, match="holds no results of device_kernels"):
        device_table.read(file)


def test_the_readme_has_the_table_of_the_newest_results():
    report = device_table.newest(ROOT / device_table.RESULTS)
    assert device_table.render(report) in (ROOT / "README.md").read_text()
