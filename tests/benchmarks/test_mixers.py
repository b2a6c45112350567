"""The benchmark of mechanisms finds, builds and describes all of them."""

import json
import math

import jax
import numpy as np
import pytest

from attnjax.benchmarks import mixers
from attnjax.core import discovery
from attnjax.core.errors import UserError

TINY = mixers.Sizes(
    batch_size=1, seq_len=16, embed_dim=16, num_heads=2, rounds=2, calls=1
)


def test_a_report_compares_with_attention(capsys):
    report = mixers.run("^(attention|linear_attention)$", sizes=TINY)
    rows = {row["mixer"]: row for row in report["rows"]}
    assert set(rows) == {"attention", "linear_attention"}
    assert rows["attention"]["parameters"] == 4 * 16 * 16
    assert rows["attention"]["train_ratio"] == 1.0
    linear = rows["linear_attention"]
    assert linear["state_size"] < rows["attention"]["state_size"] * 2
    assert linear["forward_low"] <= linear["forward_ratio"] <= linear["forward_high"]
    assert linear["flops"] > 0
    json.dumps(report)
    mixers.print_report(report)
    said = capsys.readouterr().out
    assert "linear_attention" in said and "fwd+bwd ms" in said


@pytest.mark.parametrize("name", discovery.names())
def test_every_mechanism_of_the_catalog_can_be_measured(name):
    layer = mixers.Layer(name, TINY)
    y, _ = layer.forward(*layer.arrays, layer.x, layer.ctx)
    assert y.shape == layer.x.shape
    grads = layer.train(*layer.arrays, layer.x, layer.ctx)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    assert layer.facts()["parameters"] == layer.spec.parameter_count(
        layer.config, layer.dims
    )


@pytest.mark.parametrize(
    ("ranks", "sides"), [((1,), (32,)), ((1, 2), (8, 4)), ((3,), (4, 4, 2))]
)
def test_tokens_are_laid_out_on_a_grid(ranks, sides):
    assert mixers._grid(32, ranks) == sides
    assert math.prod(sides) == 32


def test_a_grid_needs_a_power_of_two():
    with pytest.raises(ValueError, match="seq_len must be a power of 2; got 24"):
        mixers._grid(24, (2,))


def test_a_filter_that_matches_no_mechanism_is_refused():
    with pytest.raises(UserError, match=r"--filter matches no mechanism; got 'xyz'"):
        mixers.run("xyz", sizes=TINY)


OUTSIDE = '''
"""A mechanism with an option that has no default."""
import dataclasses
from attnjax.mixers import linear_attention

SPEC = dataclasses.replace(linear_attention.SPEC, name="needy")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        width: needed.
    """

    width: int


class Mixer(linear_attention.Mixer):
    def __init__(self, config, dims, *, rngs):
        super().__init__(linear_attention.Config(), dims, rngs=rngs)
'''


def test_needed_options_come_from_the_conformance_settings(tmp_path):
    path = tmp_path / "needy.py"
    path.write_text(OUTSIDE)
    with pytest.raises(UserError, match=r"CONFORMANCE\['config'\]; got none for width"):
        mixers.Layer(str(path), TINY)
    path = tmp_path / "again" / "needy.py"
    path.parent.mkdir()
    path.write_text(OUTSIDE + '\nCONFORMANCE = {"config": {"width": 3}}\n')
    assert mixers.Layer(str(path), TINY).config.width == 3


def test_what_cannot_be_built_is_named(monkeypatch, capsys):
    def refuse(base, name, sizes):
        raise UserError("needs another width")

    monkeypatch.setattr(mixers, "_measure", refuse)
    report = mixers.run("^attention$", sizes=TINY)
    assert report["rows"] == []
    mixers.print_report(report)
    assert "attention skipped: needs another width" in capsys.readouterr().out
