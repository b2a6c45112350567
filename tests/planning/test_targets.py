"""Targets: what may be asked for, and what is said otherwise."""

import jax
import pytest

from attnjax.core.errors import UserError
from attnjax.planning import chips, targets


@pytest.mark.parametrize(
    ("text", "platform", "count"),
    [
        ("cpu:3", "cpu", 3),
        ("h100:1", "gpu", 1),
        ("h200:64", "gpu", 64),
        ("b200:16", "gpu", 16),
        ("v5e:2x4", "tpu", 8),
        ("v5p:4x4x8", "tpu", 128),
        ("v6e:16x16", "tpu", 256),
    ],
)
def test_names_stand_for_platforms_and_counts(text, platform, count):
    target = targets.parse(text)
    assert (target.platform, target.count) == (platform, count)
    assert target.kernel_target.platform == platform


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h20:8", "unknown chip 'h20' in 'h20:8'. Did you mean h200"),
        ("h200", "h200 takes a number of devices after the colon; got 'h200'"),
        ("h200:2x4", "h200 takes a number of devices"),
        ("v5e:8", "v5e takes 2 sizes after the colon; got 'v5e:8'. Write e.g. v5e:4x4"),
        ("v5p:4x4", "v5p takes 3 sizes"),
        ("h200:12", "more than 8 GPUs must be whole nodes of 8"),
        ("h200:0", r"must be in \[1, 4096\]; got 'h200:0'"),
        ("cpu:0", r"must be in \[1, 1024\]"),
        ("v5e:3x3", "v5e has no topology '3x3'. Nearest: v5e:.*Allowed: 1x1, 2x2"),
        ("v6e:16x32", "Nearest: v6e:16x16"),
        ("v5p:4x4x5", "Nearest: v5p:4x4x4. Allowed: sizes that rise"),
        ("v5p:16x16x28", "Nearest: v5p:16x16x24. Allowed: .* up to 16x16x24"),
        ("v5p:8x4x4", "Nearest: v5p:4x4x8"),
    ],
)
def test_impossible_targets_are_refused_with_what_is_possible(text, message):
    with pytest.raises(UserError, match=message):
        targets.parse(text)


def test_every_number_of_every_chip_names_its_source():
    for chip in chips.CHIPS.values():
        facts = chip.facts()
        assert len(facts) == 7
        for name, fact in facts.items():
            assert fact.source.strip(), (chip.name, name)
            assert fact.value >= 0


def test_descriptions_of_gpus_agree_with_the_table():
    for chip in chips.CHIPS.values():
        if chip.platform != "gpu":
            continue
        text = chip.description
        assert f"device_memory_size: {int(chip.memory.value)}" in text
        assert f"memory_bandwidth: {int(chip.bandwidth.value)}" in text
        assert f'name: "{chip.kind}"' in text
        assert "Sources:" in text


def test_peaks_agree_with_those_of_training():
    from attnjax.core.chips import peak_flops

    for chip in chips.CHIPS.values():
        assert peak_flops(chip.kind) == chip.flops.value


def test_missing_extra_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for platform in ("gpu", "tpu"):
        line = targets.missing_extra(platform)
        assert "pip install -c constraints.txt -e '.[aot]'" in line
        assert "\n" not in line
    assert targets.missing_extra("cpu") is None


def test_too_few_cpu_devices_are_an_error_of_the_process():
    with pytest.raises(UserError, match="this process has .* CPU devices"):
        targets.devices(targets.parse("cpu:1024"))


def test_a_plugin_that_fails_is_told_in_one_line(monkeypatch):
    def fail(target):
        raise jax.errors.JaxRuntimeError("\nABORTED: locked\nmore")

    monkeypatch.setattr(targets, "missing_extra", lambda platform: None)
    monkeypatch.setattr(targets, "_described", fail)
    with pytest.raises(UserError, match="not describe v5e:2x2: ABORTED: locked. Inst"):
        targets.devices(targets.parse("v5e:2x2"))
