"""The README's table of the fused kernels: what it reads off results."""

import json
from pathlib import Path

import pytest

from attnjax import bench
from attnjax.benchmarks import device_kernels, device_table
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


def steps(count, **times):
    """Microseconds of a step by implementation, of a cache of so many bytes."""
    return {
        "state": "done",
        "bytes": count,
        "times": {name: {"us": x} for name, x in times.items()},
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
        "time linear gated delta 16/32 S=8192": row(mosaic_gpu=(1.0, 3.0), fla=(3, 7)),
        "time window S=16384": {"state": "failed", "error": "x"},
        "time score function S=4096": row(mosaic_gpu=(1, 3), flex=(1.5, 5.5)),
        "time distances S=4096": row(mosaic_gpu=(1, 3), flex=(2.5, 9.5)),
        "time decode all keys S=4096": steps(2e6, mosaic_gpu=10.0, flex=25.0),
        "time decode all keys S=32768": steps(1.6e7, mosaic_gpu=40.0, flex=60.0),
    },
}


def cells(report):
    """What was measured, by line and what it is against."""
    lines = device_table.render(report).splitlines()[2:]
    parts = [line.strip("| ").split(" | ") for line in lines]
    assert len({(what, against) for what, against, *_ in parts}) == len(parts)
    return {f"{x[0]} / {x[1]}": x[-1] for x in parts}


def test_speeds_are_ratios_to_the_other_side_at_the_same_length():
    found = cells(REPORT)
    assert found["causal, forward / cuDNN"] == "0.50 to 1.50 x"
    assert found["causal, backward / cuDNN"] == "0.50 to 0.80 x"
    assert found["ALiBi, forward / our plain kernel"] == "0.80 x"
    assert found["gated delta rule, 16/32 heads, forward / fla Triton"] == "3.00 x"
    assert found["gated delta rule, 16/32 heads, backward / fla Triton"] == "2.00 x"


def test_several_variants_share_a_line():
    found = cells(REPORT)
    assert found["any score hook, forward / FlexAttention"] == "1.50 to 2.50 x"
    assert found["any score hook, backward / FlexAttention"] == "2.00 to 3.50 x"


def test_forward_with_backward_is_one_time():
    more = {
        "time soft cap S=4096": row(mosaic_gpu=(5.0, 12.0)),
        "time causal 128 S=4096": row(mosaic_gpu=(4.0, 9.0)),
    }
    found = cells(REPORT | {"rows": more})
    name = "soft cap, forward and backward / our plain kernel"
    assert found[name] == "0.75 x"


def test_steps_of_decoding_are_a_share_of_the_memory_where_its_speed_is_known():
    found = cells(REPORT)
    assert found["decoding, all keys / FlexAttention"] == "1.50 to 2.50 x"
    assert found["decoding, all keys / reading the cache"] == "not measured"
    found = cells(REPORT | {"bandwidth": 0.5})  # TB/s: 4 and 32 us
    assert found["decoding, all keys / reading the cache"] == "0.40 to 0.80 x"


def test_a_peer_without_gradients_has_no_backward():
    only = {"state": "done", "times": {"flex": {"forward_ms": 2.0}}}
    only["times"]["mosaic_gpu"] = {"forward_ms": 1.0, "train_ms": 3.0}
    found = cells(REPORT | {"rows": {"time ALiBi S=4096": only}})
    assert found["any score hook, forward / FlexAttention"] == "2.00 x"
    assert found["any score hook, backward / FlexAttention"] == "not measured"


def test_what_has_no_time_or_no_partner_is_not_measured():
    found = cells(REPORT)
    for name in ("soft cap, forward", "sigmoid, forward"):
        assert found[f"{name} / our plain kernel"] == "not measured"
    window = "window of 1,024 in 16,384, forward / cuDNN given the mask"
    assert found[window] == "not measured"
    assert set(cells(None).values()) == {"not measured"}


def test_every_line_is_of_a_variant_that_is_measured():
    every = device_kernels.Settings().variants
    for line in device_table.LINES:
        assert set(line.variants) <= set(every)
        assert line.against in ("plain", "memory", *device_kernels.IMPLEMENTATIONS)


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
