"""Runs that are trained together leave what training them alone would have left."""

import contextlib
import functools
import json
import random
import shutil

import jax
import numpy as np
import pytest

from attnjax.core.errors import EXIT_OK, EXIT_SAVED, EXIT_USER, UserError
from attnjax.decoding.evaluate import evaluate_run
from attnjax.decoding.run import load_run
from attnjax.decoding.sampling import Sampler
from attnjax.training import (
    experiment,
    metrics,
    run,
    sharding,
    together,
    vectorized,
)
from attnjax.training.checkpoint_reader import CheckpointReader
from attnjax.training.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("shared_programs")

STEPS = 20
# What each run has of its own: another seed, or other numbers of the optimizer.
RUNS = (
    {"seed": 3},
    {"seed": 5},
    {"seed": 3, "learning_rate": 4e-3, "beta2": 0.99, "weight_decay": 0.3},
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for number in range(40):
        words = ("".join(rng.choices("abcdefg", k=rng.randint(1, 5))) for _ in "x" * 30)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def config_of(corpus, *, seed=0, model=None, train=None, **optim):
    return experiment.resolve(
        {
            "model": {
                **{"num_layers": 2, "embed_dim": 16, "num_heads": 2, "dropout": 0.1},
                **(model or {}),
            },
            "data": {
                "name": f"text:{corpus}/*.txt",
                "cache_dir": str(corpus / "cache"),
                "seq_len": 13,
                "packing": "packed",
            },
            "optim": {"warmup_steps": 5, "ema_decay": 0.9, "eps": 1e-6, **optim},
            "train": {
                **{"steps": STEPS, "batch_size": 8, "seed": seed, "log_every": 1},
                **{"save_every": 8, "sample_tokens": 0, "tensorboard": False},
                **(train or {}),
            },
            "eval": {"every": 10, "batches": 1},
        }
    )


def losses(workdir, split="train"):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [(r["step"], r["loss"]) for r in rows if r["split"] == split]


def assert_same_losses(left, right, split="train"):
    left, right = losses(left, split), losses(right, split)
    assert [step for step, _ in left] == [step for step, _ in right]
    np.testing.assert_allclose(
        [loss for _, loss in left], [loss for _, loss in right], rtol=0, atol=1e-4
    )


class StopAt:
    """A StopSignal that asks for a stop after so many looks at it."""

    def __init__(self, looks):
        self.left = looks

    @property
    def requested(self):
        self.left -= 1
        return "SIGTERM" if self.left < 0 else None

    def interrupting(self):
        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """(runs trained alone, the same trained together)."""
    folder = tmp_path_factory.mktemp("runs")
    configs = [config_of(corpus, **own) for own in RUNS]
    alone = [folder / f"alone_{i}" for i in range(len(RUNS))]
    group = [folder / f"group_{i}" for i in range(len(RUNS))]
    for config, workdir in zip(configs, alone, strict=True):
        assert run.train(config, workdir) == EXIT_OK
    outcomes = vectorized.train_group(configs, group)
    assert outcomes == [vectorized.Outcome(EXIT_OK)] * len(RUNS)
    return alone, group


def test_losses_are_those_of_separate_runs(runs):
    for alone, group in zip(*runs, strict=True):
        assert len(losses(group)) == STEPS
        assert_same_losses(alone, group)
        assert_same_losses(alone, group, "eval")
    # The runs are not one and the same.
    assert len({losses(group)[-1] for group in runs[1]}) == len(RUNS)


def test_a_directory_holds_what_a_separate_run_leaves(runs):
    for alone, group in zip(*runs, strict=True):
        names = [sorted(p.name for p in d.iterdir()) for d in (alone, group)]
        assert names[0] == names[1]
        assert RunDirectory.load(group).finished
        assert (alone / "config.json").read_bytes() == (
            group / "config.json"
        ).read_bytes()
        summaries = [
            json.loads((d / "summary.json").read_text()) for d in (alone, group)
        ]
        assert summaries[0].keys() == summaries[1].keys()
        readers = [CheckpointReader(d / "checkpoints") for d in (alone, group)]
        assert readers[0].steps() == readers[1].steps()
        found = [reader.latest() for reader in readers]
        assert found[0].meta == found[1].meta
        assert readers[0].signature(STEPS) == readers[1].signature(STEPS)
        states = [reader.restore_numpy(STEPS)[0] for reader in readers]
        for a, b in zip(*map(jax.tree.leaves, states), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


def test_a_member_is_evaluated_and_generated_from(runs):
    loaded = load_run(runs[1][1])
    result = evaluate_run(loaded)
    assert result["step"] == STEPS
    assert len(loaded.generate(max_new_tokens=3, sampler=Sampler(0.8), seed=0)) == 1
    np.testing.assert_allclose(
        result["loss"], evaluate_run(load_run(runs[0][1]))["loss"], atol=1e-4
    )


def test_a_finished_group_has_nothing_to_do(corpus, runs, capsys):
    configs = [config_of(corpus, **own) for own in RUNS]
    outcomes = vectorized.train_group(configs, runs[1])
    assert [one.code for one in outcomes] == [EXIT_OK] * len(RUNS)
    assert capsys.readouterr().out.count("nothing to do") == len(RUNS)


# ---- stopping and going on

# The tests above run on eight devices; these, which compile many programs, on one.
SHORT = {"steps": 12, "save_every": 4, "keep_last": 2, "keep_best": 0}


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", lambda config, devices=None: mesh(config))
        yield


@pytest.fixture
def short(corpus, tmp_path, one_device):
    """(configs, directories) of two short runs."""
    configs = [config_of(corpus, seed=seed, train=SHORT) for seed in (1, 2)]
    return configs, [tmp_path / "one", tmp_path / "two"]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory, one_device):
    """The same two runs, trained together without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    configs = [config_of(corpus, seed=seed, train=SHORT) for seed in (1, 2)]
    workdirs = [folder / "one", folder / "two"]
    outcomes = vectorized.train_group(configs, workdirs)
    assert [one.code for one in outcomes] == [EXIT_OK] * 2
    return workdirs


def stop(configs, workdirs, looks):
    outcomes = vectorized.train_group(configs, workdirs, signals=StopAt(looks))
    assert [one.code for one in outcomes] == [EXIT_SAVED] * 2
    return [CheckpointReader(d / "checkpoints").latest().step for d in workdirs]


def test_a_stopped_group_goes_on_bit_for_bit(short, whole, capsys):
    configs, workdirs = short
    steps = stop(configs, workdirs, looks=9)
    assert steps[0] == steps[1] and 0 < steps[0] < 12
    assert "2 runs go on together or alone" in capsys.readouterr().out
    outcomes = vectorized.train_group(configs, workdirs)
    assert [one.code for one in outcomes] == [EXIT_OK] * 2
    for one, other in zip(workdirs, whole, strict=True):
        assert losses(one) == losses(other)


@pytest.mark.reliability
def test_one_of_a_stopped_group_goes_on_alone(short, whole):
    configs, workdirs = short
    stop(configs, workdirs, looks=9)
    assert run.train(configs[1], workdirs[1]) == EXIT_OK
    assert_same_losses(workdirs[1], whole[1])
    # The other goes on when the group is asked for; the finished one stays.
    outcomes = vectorized.train_group(configs, workdirs)
    assert [one.code for one in outcomes] == [EXIT_OK] * 2
    assert_same_losses(workdirs[0], whole[0])


@pytest.mark.reliability
def test_runs_one_save_apart_meet_at_the_older_step(short, whole, capsys):
    configs, workdirs = short
    # Stopped at a step that is no multiple of save_every, so two saves are there.
    newest = stop(configs, workdirs, looks=9)[0]
    saved = CheckpointReader(workdirs[0] / "checkpoints")
    older = saved.steps()[0]
    assert older < newest
    shutil.rmtree(workdirs[0] / "checkpoints" / str(newest))
    outcomes = vectorized.train_group(configs, workdirs)
    assert [one.code for one in outcomes] == [EXIT_OK] * 2
    out = capsys.readouterr().out
    assert f"two: step {newest} goes; the runs meet at step {older}" in out
    assert f"resuming 2 runs from step {older}" in out
    for one, other in zip(workdirs, whole, strict=True):
        assert losses(one) == losses(other)


@pytest.mark.reliability
def test_runs_without_a_common_step_go_on_in_parts(short, whole, capsys):
    configs, workdirs = short
    stop(configs, workdirs, looks=9)
    shutil.rmtree(workdirs[0] / "checkpoints")
    outcomes = vectorized.train_group(configs, workdirs)
    assert [one.code for one in outcomes] == [EXIT_OK] * 2
    assert "runs meet" not in capsys.readouterr().out
    for one, other in zip(workdirs, whole, strict=True):
        assert_same_losses(one, other)


def test_a_run_that_diverges_leaves_the_others_going(corpus, tmp_path, whole):
    wild = config_of(corpus, seed=1, train=SHORT, learning_rate=1e38)
    calm = config_of(corpus, seed=2, train=SHORT)
    workdirs = [tmp_path / "wild", tmp_path / "calm"]
    outcomes = vectorized.train_group([wild, calm], workdirs)
    assert [one.code for one in outcomes] == [EXIT_USER, EXIT_OK]
    assert "updates in a row were not finite" in outcomes[0].error
    assert RunDirectory.load(workdirs[0]).manifest["ends"][-1]["status"] == "bad_steps"
    assert_same_losses(workdirs[1], whole[1])


def test_a_directory_of_another_run_fails_alone(corpus, short, whole):
    configs, workdirs = short
    shutil.copytree(whole[1], workdirs[0])
    outcomes = vectorized.train_group(configs, workdirs)
    assert [one.code for one in outcomes] == [EXIT_USER, EXIT_OK]
    assert "belongs to another config" in outcomes[0].error


@pytest.mark.parametrize("ratio, word", [(0.8, "together"), (1.1, "one after another")])
def test_auto_takes_what_measured_faster(
    short, whole, monkeypatch, capsys, ratio, word
):
    configs, workdirs = short
    monkeypatch.setattr(together, "measure", lambda group: ratio)
    outcomes = vectorized.train_group(configs, workdirs, vectorize="auto")
    assert [one.code for one in outcomes] == [EXIT_OK] * 2
    out = capsys.readouterr().out
    assert f"takes {ratio:.2f} of the time of 2 steps" in out and word in out
    assert ("2 runs in one program" in out) == (word == "together")
    for one, other in zip(workdirs, whole, strict=True):
        assert_same_losses(one, other)


def test_measuring_gives_a_ratio(corpus, one_device):
    configs = [config_of(corpus, seed=seed, train=SHORT) for seed in (1, 2)]
    first = experiment.build(configs[0])
    group = [experiment.like(first, config) for config in configs]
    ratio = together.measure(group, calls=1, rounds=1)
    assert 0 < ratio < float("inf")  # how large is the machine's business


def test_runs_that_cannot_be_trained_together_are_refused(corpus, tmp_path):
    configs = [config_of(corpus), config_of(corpus, model={"num_layers": 1})]
    with pytest.raises(UserError, match=r"differ in config\.model\.num_layers\. Group"):
        vectorized.train_group(configs, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="vectorize: must be True or 'auto'"):
        vectorized.train_group(configs, [tmp_path], vectorize="yes")
    with pytest.raises(ValueError, match="as many directories as configs"):
        vectorized.train_group(configs, [tmp_path])
    assert not list(tmp_path.iterdir())
