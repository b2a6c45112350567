"""The three programs of the training benchmark compute the same thing."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from attnjax.benchmarks import jax_twin, recipe, torch_twin, train
from attnjax.core import config as config_files
from attnjax.core.errors import UserError
from attnjax.training import experiment

ROOT = Path(__file__).parents[2]
SMALL = recipe.Recipe(
    num_layers=2,
    num_heads=2,
    embed_dim=20,
    seq_len=11,
    batch_size=3,
    vocab_size=13,
    warmup_steps=2,
    steps=7,
    clip_norm=0.05,
)
IDS = recipe.tokens(SMALL)


@pytest.fixture(scope="module")
def ours():
    return train.Framework(SMALL, IDS)


@pytest.fixture(scope="module")
def losses(ours):
    """The framework's losses over warm-up, peak, decay and the floor."""
    return ours.run(9)


def test_the_recipe_is_the_shakespeare_config():
    given = config_files.load_file(str(ROOT / "configs" / "lm_shakespeare.py"))
    theirs = experiment.resolve(given)
    ours = experiment.resolve(recipe.config(recipe.Recipe()))
    for group in ("model", "optim", "task"):
        assert ours[group] == theirs[group]
    for name in ("steps", "batch_size", "accumulate"):
        assert ours["train"][name] == theirs["train"][name]
    assert ours["data"] == theirs["data"]


def test_hand_written_step_has_the_same_losses(ours, losses):
    hand = train.Hand(SMALL, IDS, ours.weights)
    np.testing.assert_allclose(hand.run(9), losses, rtol=0, atol=1e-5)


def test_pytorch_has_the_same_losses(ours, losses):
    if torch_twin.missing():
        pytest.skip(torch_twin.missing())
    eager = train.Eager(SMALL, IDS, ours.weights)
    np.testing.assert_allclose(eager.run(9), losses, rtol=0, atol=1e-4)


def test_losses_fall_and_are_not_trivially_equal(losses):
    assert abs(losses[0] - np.log(SMALL.vocab_size)) < 0.1
    assert losses[-1] < losses[2] - 1e-3


@pytest.mark.parametrize("name", ["query", "down", "norm_mlp"])
def test_a_changed_weight_changes_the_twins_loss(ours, name):
    changed = jax.tree.map(np.copy, ours.weights)
    changed["layers"][name][1] *= 1.5
    before = jax_twin.loss(ours.weights, IDS, SMALL)
    assert abs(jax_twin.loss(changed, IDS, SMALL) - before) > 1e-7


@pytest.mark.parametrize("unroll", [1, "all"])
def test_compiled_step_costs_what_the_hand_written_one_does(unroll):
    sizes = recipe.Recipe()
    ids = recipe.tokens(sizes)
    ours = train.Framework(sizes, ids, unroll=unroll)
    hand = train.Hand(sizes, ids, ours.weights, unroll=unroll)
    found = train.compiled_sizes({train.OURS: ours, train.HAND: hand})
    assert found[train.OURS]["flops"] > 1e9
    assert found["ratio"]["flops"] == pytest.approx(1, abs=0.01)
    assert found["ratio"]["temporary_bytes"] == pytest.approx(1, abs=0.01)


def test_schedules_of_the_twins_agree():
    steps = np.arange(12)
    torch_rates = [torch_twin.learning_rate(SMALL, int(s)) for s in steps]
    jax_rates = jax_twin.learning_rate(SMALL, steps)
    np.testing.assert_allclose(jax_rates, torch_rates, rtol=1e-5, atol=1e-9)
    flat = dataclasses.replace(SMALL, warmup_steps=0)
    assert float(jax_twin.learning_rate(flat, np.int32(0))) == pytest.approx(
        torch_twin.learning_rate(flat, 0)
    )


QUICK = train.Settings(rounds=2, calls=1, check_steps=1)


def test_a_report_has_every_program_and_prints(capsys):
    report = train.run(sizes=SMALL, settings=QUICK)
    names = [row["program"] for row in report["rows"]]
    assert set(names) | set(report["skipped"]) == set(train.PROGRAMS)
    for row in report["rows"]:
        assert row["tokens_per_second"] == pytest.approx(33e3 / row["ms"])
        assert row["ratio_low"] <= row["time_ratio"] <= row["ratio_high"]
    assert report["rows"][0]["time_ratio"] == 1.0
    firsts = [values[0] for values in report["losses"].values()]
    np.testing.assert_allclose(firsts, firsts[0], rtol=0, atol=1e-4)
    train.print_report(report)
    said = capsys.readouterr().out
    assert "tokens/s" in said and "FLOPs" in said
    assert all(name in said for name in names)


def test_without_pytorch_the_reason_is_told(ours, monkeypatch, capsys):
    monkeypatch.setattr(train, "Framework", lambda sizes, ids: ours)
    monkeypatch.setattr(torch_twin, "torch", None)
    monkeypatch.setattr(torch_twin, "REASON", "not here", raising=False)
    report = train.run("torch", sizes=SMALL, settings=QUICK)
    assert report["skipped"] == {train.TORCH: "not here"}
    assert [row["program"] for row in report["rows"]] == [train.OURS]
    assert report["compiled"] is None
    train.print_report(report)
    assert f"{train.TORCH} skipped: not here" in capsys.readouterr().out


def test_a_filter_that_matches_no_program_is_refused():
    with pytest.raises(UserError, match=r"--filter matches no program; got 'numpy'"):
        train.run("numpy", sizes=SMALL, settings=QUICK)
