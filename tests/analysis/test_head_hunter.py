"""A greedy search over heads, with objectives that are known and with a denoiser."""

import types

import jax
import numpy as np
import pytest

from attnjax.analysis.head_hunter import Trial, search
from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.decoding import pictures
from attnjax.decoding.run import LoadedDenoiser
from attnjax.models import dit
from attnjax.tasks.diffusion import Config, Diffusion

POOL = tuple((layer, head) for layer in range(3) for head in range(5))
WORTH = dict(zip(POOL, np.random.default_rng(0).normal(size=len(POOL)), strict=True))


def worth(heads):
    return sum(WORTH[e] for e in heads)


@pytest.mark.parametrize(("per_round", "rounds"), [(4, 1), (1, 4), (2, 3), (15, 1)])
def test_the_best_heads_of_an_additive_objective_are_found(per_round, rounds):
    calls = []

    def score(heads):
        calls.append(heads)
        return worth(heads)

    found = search(score, POOL, per_round=per_round, rounds=rounds)
    best = sorted(POOL, key=WORTH.get, reverse=True)[: per_round * rounds]
    assert list(found.heads) == best and len(set(found.heads)) == len(best)
    left = [len(POOL) - per_round * i for i in range(rounds)]
    assert [len(table) for table in found.rounds] == left and len(calls) == sum(left)


def test_each_round_knows_what_was_chosen_before():
    # A second head of a layer is worth nothing: one a layer is best.
    def score(heads):
        best = {}
        for layer, head in heads:
            best[layer] = max(best.get(layer, 0.0), 10 - layer - 0.1 * head)
        return sum(best.values())

    lines = []
    found = search(score, POOL, per_round=1, rounds=3, told=lines.append)
    assert found.heads == ((0, 0), (1, 0), (2, 0))
    assert lines[1] == "round 2/3: 1:0, score 19.0000"
    together = search(score, POOL, per_round=3)
    assert together.heads == ((0, 0), (0, 1), (0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_round": 4, "rounds": 4}, "got per_round=4, rounds=4, 15 heads"),
        ({"per_round": 0}, "got per_round=0, rounds=1"),
        ({"pool": POOL + POOL[:1]}, "names a head twice"),
        ({"score": lambda heads: np.nan}, "got nan for layer 0, head 0"),
    ],
)
def test_a_search_that_cannot_be_is_refused(change, message):
    given = {"score": worth, "pool": POOL, "per_round": 1} | change
    with pytest.raises(UserError, match=message):
        search(given.pop("score"), given.pop("pool"), **given)


@pytest.fixture(scope="module")
def denoiser():
    """A network of two layers with numbers from numpy."""
    small = dict(embed_dim=8, num_heads=2, num_layers=2, patch_size=2, mlp_dim=8)
    config = schema.build(dit.Config, dit.resolve(small))
    model = dit.DiT(config, image_size=4, channels=1, out_channels=1, num_classes=3)
    rng = np.random.default_rng(0)
    params, buffers = jax.eval_shape(model.init, 0)
    params = jax.tree.map(
        lambda a: (0.4 * rng.normal(size=a.shape)).astype(np.float32), params
    )
    noise = schema.resolve(Config, {"noise": {"process": "flow"}}, path="config.task")
    run = LoadedDenoiser(
        None,
        {},
        model,
        params,
        jax.tree.map(np.zeros_like, buffers),
        0,
        ("a", "b", "c"),
    )
    run.task = Diffusion(schema.build(Config, noise), model)
    run.feed = types.SimpleNamespace()
    return run


def test_a_trial_scores_every_set_with_one_program(denoiser):
    def objective(images, labels):
        return images.mean(axis=(1, 2, 3)) * (1 + labels)

    how = {"steps": 1, "sampler": "euler", "perturb_scale": 3.0}
    before = pictures._program.cache_info().misses
    trial = Trial(denoiser, [0, 2], objective, **how, perturb_strength=0.5)
    assert trial.pool == ((0, 0), (0, 1), (1, 0), (1, 1))
    found = search(trial, trial.pool, per_round=1, rounds=2)
    plain = trial(())
    assert pictures._program.cache_info().misses == before + 1
    assert len({plain, *found.rounds[0].values()}) == 5

    def drawn(**settings):
        images = denoiser.draw([0, 2], steps=1, sampler="euler", **settings)
        return objective(images, np.asarray([0, 2])).mean()

    assert plain == pytest.approx(drawn(), abs=1e-6)
    one = drawn(perturb_scale=3.0, perturb_strength=0.5, perturb_heads="1:0")
    assert found.rounds[0][1, 0] == pytest.approx(one, abs=1e-5)
    with pytest.raises(UserError, match="perturb_scale must be above 0 in the search"):
        Trial(denoiser, [0, 2], objective, steps=1)


def test_no_class_can_be_asked_for(denoiser):
    assert denoiser.labels(["b", "no_class", 0]).tolist() == [1, 3, 0]
    with pytest.raises(
        UserError, match="unknown class 'no-class'. Did you mean no_class"
    ):
        denoiser.labels(["no-class"])


def test_adaptive_steps_that_do_not_suffice_are_refused(denoiser, monkeypatch):
    drawn = {}

    def draw(task, params, buffers, labels, *, settings):
        drawn["settings"] = settings
        return np.full((len(labels), 4, 4, 1), np.nan), 13

    monkeypatch.setattr(pictures, "draw", draw)
    with pytest.raises(UserError, match="must suffice; got steps=2, which did not"):
        denoiser.draw([0, 1], sampler="dopri5", steps=2)
    assert drawn["settings"].sampler == "dopri5"
    # Other samplers give what they give.
    assert denoiser.draw_counted([0], sampler="euler")[1] == 13
