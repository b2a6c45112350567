"""Turns, ratios and their intervals."""

import numpy as np
import pytest

from attnjax.benchmarks import machine, tables, timing


def test_programs_take_turns_and_each_goes_first():
    log = []

    def program(name):
        return lambda count: log.append((name, count))

    samples = timing.interleave(
        {"a": program("a"), "b": program("b")}, rounds=2, calls=3
    )
    warm, rounds = log[:2], log[2:]
    assert warm == [("a", 1), ("b", 1)]
    assert rounds == [
        *(("a", 1), ("a", 3), ("b", 1), ("b", 3)),
        *(("b", 1), ("b", 3), ("a", 1), ("a", 3)),
    ]
    assert {name: len(s.wall) for name, s in samples.items()} == {"a": 2, "b": 2}
    assert all((s.wall >= 0).all() and (s.cpu >= 0).all() for s in samples.values())


def test_a_constant_ratio_has_an_interval_without_width():
    base = np.array([1.0, 5.0, 2.0])
    found = timing.ratio(3 * base, base)
    assert (found.median, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_ratios_are_paired_by_round():
    # Rounds differ by a factor 1000, the ratio within a round by a few per cent.
    rng = np.random.default_rng(3)
    base = 10.0 ** rng.uniform(-3, 0, size=101)
    times = base * rng.normal(2.0, 0.05, size=101)
    found = timing.ratio(times, base)
    assert found.low < 2.0 < found.high
    assert found.low < found.median < found.high
    assert found.high - found.low < 0.06


def test_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = timing.ratio(rng.normal(1.0, 0.2, 25), np.ones(25), resamples=300)
        hits += found.low <= 1.0 <= found.high
    assert hits >= 180


def test_samples_give_their_median():
    assert timing.Samples(np.array([3.0, 1.0, 2.0]), np.zeros(3)).median == 2.0


@pytest.mark.parametrize(("load", "is_told"), [(None, False), (0.1, False), (4, True)])
def test_a_busy_machine_is_named(load, is_told, capsys):
    timing.print_load(load)
    assert ("4.0 other programs" in capsys.readouterr().out) is is_told


def test_machine_names_cores_and_versions():
    told = machine.describe()
    assert told["cores"] >= 1
    assert told["versions"]["jax"] in machine.line(told)
    assert f"{told['cores']} cores" in machine.line(told)


def test_a_missing_package_has_no_version():
    assert machine._version("no-such-package-at-all") is None


def test_tables_align_figures_to_the_right():
    assert tables.text(("name", "ms"), [("a", "1.5"), ("longer", "10.25")]) == (
        "name       ms\na         1.5\nlonger  10.25"
    )


def test_tables_are_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    tables.show(("name", "ms"), [("a", "1.5")])
    assert "1.5" in capsys.readouterr().out
