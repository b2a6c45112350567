"""Plans of small models on this machine's CPU, and the four shipped models' sizes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from attnjax.core import config as configs
from attnjax.core.errors import UserError
from attnjax.planning import formulas, planner, problem, search, targets, text
from attnjax.training import experiment, feeds

ROOT = Path(__file__).parents[2]


MODEL = {"num_layers": 3, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48}


def _config(**changes):
    given = {
        "model": MODEL,
        "data": {"name": "stdlib", "tokenizer": "bytes", "seq_len": 31},
        "train": {"batch_size": 6, "steps": 10, **changes.pop("train", {})},
    }
    return experiment.resolve({**given, **changes})


@pytest.fixture(scope="module")
def plan():
    config = _config(model={**MODEL, "params": "match"})
    return planner.plan(config, targets.parse("cpu:1"))


def test_parameters_and_optimizer_are_weighed(plan):
    assert plan.train.parameters == 4 * plan.parameters
    assert 8 * plan.parameters <= plan.train.optimizer < 8.5 * plan.parameters
    assert plan.train.fits and plan.decode.fits
    assert plan.train.compiled.temporaries > 0


def test_products_of_the_step_are_those_of_the_model(plan):
    here = problem.experiment(
        plan.config, plan.target, targets.devices(plan.target)[:1]
    )
    model = 3 * here.model.flops(31) * 6
    assert 0.8 * model < plan.train.costs.flops < 1.6 * model


def test_the_report_names_what_was_found(plan):
    found = "\n".join(text.lines(plan))
    for words in (
        "training step: fits", "decode step, 1 sequence of up to 31 tokens: fits",
        "activations and temporaries", "attention by blocked", "not estimated",
        "traced and compiled in", "FFN width 48 -> 48 for the ",
    ):  # fmt: skip
        assert words in found


def test_json_holds_the_same(plan):
    found = planner.to_json(plan)
    assert found["train"]["fits"] is True
    sizes = found["train"]["bytes_per_device"]
    assert sizes["total"] >= sizes["parameters"] + sizes["optimizer"]
    assert found["train"]["attention"][0]["used"] == "blocked"


def test_micro_batches_need_less(plan):
    other = planner.plan(_config(train={"accumulate": 6}), plan.target, decode=False)
    assert other.train.compiled.temporaries < plan.train.compiled.temporaries
    assert other.decode is None


def test_devices_that_share_tokens_are_planned():
    config = _config(
        mesh={"sequence": 2, "sequence_form": "ring"},
        data={"name": "stdlib", "tokenizer": "bytes", "seq_len": 32},
    )
    found = planner.plan(config, targets.parse("cpu:2"), decode=False)
    assert found.train.fits and found.mesh["sequence"] == 2
    assert "collective-permute" in {row.kind for row in found.train.collectives}
    # Each part of the ring is attention of a share of the tokens.
    assert "q [6, 16, 4, 8], k [6, 16, 4, 8]" in "\n".join(text.lines(found))


def test_an_impossible_mesh_is_refused():
    with pytest.raises(UserError, match="sizes must multiply to the 1 devices"):
        planner.plan(_config(mesh={"data": 3}), targets.parse("cpu:1"))


def test_decoding_fewer_than_one_sequence_is_refused():
    with pytest.raises(UserError, match="--decode_batch: must be at least 1; got 0"):
        planner.plan(_config(), targets.parse("cpu:1"), decode_batch=0)


def test_a_model_without_decode_form_is_planned_for_training_alone(monkeypatch):
    def refuse(*_, **__):
        raise UserError("x: has no decode form")

    monkeypatch.setattr(problem, "decoding", refuse)
    found = planner.plan(_config(), targets.parse("cpu:1"))
    assert found.decode is None
    assert "decode step: not planned (x: has no decode form)" in text.lines(found)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2_124m", 124_439_808),
        ("gpt2_1.5b", 1_557_611_200),
        ("llama_8b", 8_030_261_248),
        ("llama_70b", 70_553_706_496),
    ],
)
def test_shipped_models_have_the_published_sizes(name, count):
    path = ROOT / "configs" / "lm" / f"{name}.py"
    config = experiment.resolve(configs.load_file(str(path)))
    model = experiment.build_model(config, feeds.make(config).planned_sizes())
    params, _ = jax.eval_shape(model.init, 0)
    assert sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params)) == count


def _facts(**changes):
    numbers = dict(
        params=10**6, head=8192, tables=2, layers=3, width=32, mlp=48, heads=4,
        kv_heads=2, vocab=256, batch=24, seq_len=31, flops=6e7, loss_tokens=100,
        state_bytes=12 * 10**6, item=2, node=8,
        rates={"flops": 1e15, "bandwidth": 5e12, "link": 4e11, "network": 5e10},
    )  # fmt: skip
    return formulas.Facts(**{**numbers, **changes})


def _settings(monkeypatch, facts, **mesh):
    monkeypatch.setattr(formulas.Facts, "of", lambda config, target: facts)
    return search.settings({"mesh": mesh}, targets.parse("h200:8"))


def test_settings_of_a_search_are_all_possible(monkeypatch):
    found = _settings(monkeypatch, _facts())
    for one in [setting.split for setting in found]:
        assert one.data * one.fsdp * one.tensor == 8
        assert 2 % one.tensor == 0  # key/value heads
        assert 24 % (one.data * one.fsdp * one.accumulate) == 0
    assert {one.split.remat for one in found} == set(search.REMATS)
    assert len(set(found)) == len(found)
    assert [one.cost for one in found] == sorted(one.cost for one in found)


def test_a_search_keeps_the_devices_that_share_tokens(monkeypatch):
    shared = _settings(monkeypatch, _facts(), sequence=2)
    whole = {one.split: one for one in _settings(monkeypatch, _facts())}
    assert {o.split.data * o.split.fsdp * o.split.tensor for o in shared} == {4}
    apart = {
        one: dataclasses.replace(one.split, data=2 * one.split.data, sequence=1)
        for one in shared
    }
    # As many tokens a device, of the same weights.
    alike = [one for one in shared if apart[one] in whole]
    assert alike
    assert all(one.memory == whole[apart[one]].memory for one in alike)
    config = shared[0].apply(_config(mesh={"sequence": 2}))
    assert config["mesh"]["sequence"] == 2
    assert "sequence=2" in search.describe(shared[0])
    with pytest.raises(UserError, match="must be a divisor of the target's 8 devices"):
        _settings(monkeypatch, _facts(), sequence=3)


def test_a_search_puts_what_fits_first(monkeypatch):
    target = targets.parse("cpu:1")
    whole = planner.plan(_config(), target, decode=False).train.total
    monkeypatch.setattr(planner, "usable_bytes", lambda target: 0.8 * whole)
    found = search.search(_config(), target, tries=4, enough=1)
    assert found.possible == 6
    assert found.plans[0].train.fits
    assert "--config.train.accumulate=" in search.lines(found, 1)[1]


def test_a_search_that_cannot_spread_the_batch_says_so(monkeypatch):
    with pytest.raises(UserError, match="--search: config.train.batch_size must be"):
        _settings(monkeypatch, _facts(batch=7, heads=3, kv_heads=3))
