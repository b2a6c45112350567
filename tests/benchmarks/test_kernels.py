"""The kernel benchmark on tiny cases: what it compares is the same computation."""

import jax
import numpy as np
import pytest

from attnjax.benchmarks import kernels as bench
from attnjax.core.errors import UserError

TINY = bench.Shape(2, 19, 2, 2, 4)


def test_every_program_of_a_case_computes_the_same():
    case = bench.against_peers(TINY)
    arrays = bench._arrays(TINY)
    results = {
        name: jax.jit(bench._with_gradients(program))(*arrays)
        for name, program in case.programs.items()
    }
    for got in results.values():
        for left, right in zip(got, results[bench.OURS], strict=True):
            np.testing.assert_allclose(left, right, atol=2e-6)


def test_rows_hold_times_memory_and_paired_ratios(capsys):
    case = bench.against_peers(TINY, rounds=2)
    report = bench.run("jax.nn", cases=[case])
    assert [row["program"] for row in report["rows"]] == ["attnjax", "jax.nn"]
    ours, theirs = report["rows"]
    assert ours["time_ratio"] == ours["memory_ratio"] == 1.0
    assert 0 < theirs["ratio_low"] <= theirs["time_ratio"] <= theirs["ratio_high"]
    assert theirs["temporary_bytes"] > 0
    bench.print_report(report)
    shown = capsys.readouterr().out
    assert "causal B2 T19 H2 D4" in shown
    assert "jax.nn" in shown


def test_variants_run():
    case = bench.variants(64, rounds=1)
    rows = bench.run("window|packed", cases=[case])["rows"]
    assert [row["program"] for row in rows] == [
        "causal",
        "window of 256",
        "packed, 8 documents",
    ]


def test_a_filter_that_matches_nothing_names_the_cases():
    with pytest.raises(UserError, match="Cases: causal B2 T19 H2 D4"):
        bench.run("bwd", cases=[bench.against_peers(TINY)])
