"""One tiny run through every front door, as a user goes through them."""

import json
from pathlib import Path

import numpy as np
import pytest

import attnjax
from attnjax import evaluate, generate, train
from attnjax.core.errors import EXIT_OK, UserError
from attnjax.training import metrics

pytestmark = pytest.mark.usefixtures("shared_programs")

ROOT = Path(__file__).parents[2]
TINY = {
    "model.embed_dim": 24,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.num_layers": 2,
    "data.seq_len": 16,
    "train.batch_size": 8,
    "train.steps": 12,
    "train.log_every": 3,
    "train.save_every": 6,
    "train.sample_tokens": 0,
    "train.tensorboard": "false",
    "eval.every": 6,
    "eval.batches": 2,
    "mesh.data": 8,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(30):
        text = "".join(f"{index} + {n} = {index + n}\n" for n in range(40))
        (folder / f"{index:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def go(corpus, tmp_path_factory):
    """Runs the training command with tiny settings; keyword arguments change them."""
    cache = tmp_path_factory.mktemp("cache")

    def run(workdir, *words, **changes) -> int:
        settings = {
            **TINY,
            "data.name": f"text:{corpus}/*.txt",
            "data.cache_dir": cache,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        argv = [f"--config={ROOT / 'configs' / 'quickstart.py'}", *words]
        argv += [f"--config.{key}={value}" for key, value in settings.items()]
        return train.main([*argv, f"--workdir={workdir}"])

    return run


@pytest.fixture(scope="module")
def run(go, tmp_path_factory) -> Path:
    """A finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    assert go(workdir, train__sample_tokens=8) == EXIT_OK
    return workdir


def rows(workdir) -> list[dict]:
    return metrics.comparable(metrics.read(workdir / "metrics.jsonl"))


def test_run_directory_holds_what_the_readme_says(run):
    for name in ("config.json", "manifest.json", "metrics.jsonl", "summary.json"):
        assert (run / name).is_file()
    assert list((run / "plots").glob("*.png"))
    assert list((run / "samples").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    last = [row for row in rows(run) if row["split"] == "eval"][-1]
    assert summary["final"]["loss"] == last["loss"]
    assert summary["tokens_seen"] == 12 * 8 * 16
    # Two layers: keys and values of one head of 12 and 16 tokens, their positions and
    # documents, how many there are and the newest document; 4 bytes each.
    state = 2 * (2 * 12 * 16 + 2 * 16 + 2) * 4
    assert summary["decode_state_bytes_per_token"] == state / 16


def test_metrics_have_every_logged_step_once(run):
    steps = [(row["step"], row["split"]) for row in rows(run)]
    assert steps == [
        (3, "train"),
        (6, "train"),
        (6, "eval"),
        (9, "train"),
        (12, "train"),
        (12, "eval"),
    ]


def test_training_lowers_the_loss(run):
    losses = [row["loss"] for row in rows(run) if row["split"] == "train"]
    assert losses[-1] < losses[0] - 0.1


def test_finished_run_has_nothing_to_do(run, capsys):
    assert train.main([f"--workdir={run}"]) == EXIT_OK
    assert "nothing to do" in capsys.readouterr().out


def test_other_config_is_refused_with_the_difference(run, go):
    with pytest.raises(
        UserError, match=r"- optim.beta2 = 0.95\n.*\+ optim.beta2 = 0.5"
    ):
        go(run, optim__beta2=0.5)


def test_steps_per_dispatch_and_mesh_change_no_result(run, go, tmp_path):
    assert go(tmp_path / "r", train__steps_per_dispatch=3) == EXIT_OK
    assert rows(tmp_path / "r") == rows(run)


def test_accumulation_gives_the_same_losses(run, go, tmp_path):
    changes = {"train__accumulate": 2, "mesh__data": 1, "mesh__fsdp": 4}
    changes["mesh__tensor"] = 2
    assert go(tmp_path / "r", **changes) == EXIT_OK
    for ours, theirs in zip(rows(tmp_path / "r"), rows(run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


def test_extend_raises_the_steps_and_keeps_what_was_done(go, tmp_path, capsys):
    workdir = tmp_path / "r"
    assert go(workdir, train__steps=6) == EXIT_OK
    before = rows(workdir)
    with pytest.raises(UserError, match="--extend"):
        go(workdir, train__steps=12)
    assert go(workdir, "--extend", train__steps=12) == EXIT_OK
    assert "learning rate jumps" in capsys.readouterr().out
    assert rows(workdir)[: len(before)] == before
    assert rows(workdir)[-1]["step"] == 12


def test_init_from_starts_where_the_other_run_ended(run, go, tmp_path, capsys):
    changes = {"train__init_from": run, "optim__learning_rate": 0.0}
    assert go(tmp_path / "r", **changes) == EXIT_OK
    assert "arrays taken over" in capsys.readouterr().out
    ended = [row for row in rows(run) if row["split"] == "eval"][-1]["loss"]
    begun = next(r for r in rows(tmp_path / "r") if r["split"] == "eval")["loss"]
    assert begun == pytest.approx(ended, abs=1e-6)


def test_init_from_a_schedule_with_fewer_layers(run, go, tmp_path, capsys):
    changes = {"model__num_layers": 1, "train__init_layers": "1,"}
    assert go(tmp_path / "r", train__init_from=run, **changes) == EXIT_OK
    assert "not used" in capsys.readouterr().out


def test_frozen_parameters_do_not_change(go, tmp_path):
    assert go(tmp_path / "r", optim__freeze="layers/000/|token_embedding") == EXIT_OK
    trained = attnjax.load(tmp_path / "r")
    start = trained.model.init(0)[0]

    def of(params, layer, name):
        return np.asarray(params["layers"]["group_0"]["sub_0"][name]["up"]["kernel"])[
            layer
        ]

    moved = [
        np.abs(of(trained.params, layer, "mlp") - of(start, layer, "mlp")).max()
        for layer in (0, 1)
    ]
    assert moved[0] < 1e-6  # compiled and uncompiled initialisation differ in rounding
    assert moved[1] > 1e-4


def test_non_finite_updates_stop_the_run_by_name(go, tmp_path):
    changes = {"optim__learning_rate": 1e30, "optim__clip_norm": "none"}
    changes["optim__warmup_steps"] = 0
    with pytest.raises(UserError, match=r"updates in a row were not finite.*layers/00"):
        go(tmp_path / "r", **changes)
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["ends"][-1]["status"] == "bad_steps"


def test_non_finite_updates_can_be_skipped(go, tmp_path):
    changes = {"optim__learning_rate": 1e30, "optim__clip_norm": "none"}
    changes |= {"optim__warmup_steps": 0, "train__on_bad_step": "skip"}
    assert go(tmp_path / "r", **changes) == EXIT_OK


def test_generate_writes_what_it_shows(run, tmp_path, capsys):
    words = [f"--workdir={run}", "--prompt=1 + ", "--max_new_tokens=5", "--num=2"]
    generate.main(words)
    shown = capsys.readouterr().out
    assert shown.count("1 + ") >= 2
    generate.main([*words, f"--out={tmp_path / 'text'}"])
    assert (tmp_path / "text").read_text() == shown


def test_evaluate_repeats_the_last_evaluation(run, capsys, tmp_path):
    evaluate.main([f"--workdir={run}", f"--out={tmp_path / 'm.json'}"])
    measured = json.loads((tmp_path / "m.json").read_text())
    ended = [row for row in rows(run) if row["split"] == "eval"][-1]
    assert measured["loss"] == pytest.approx(ended["loss"], abs=1e-6)


def test_evaluate_at_another_context_and_without_a_layer(run, tmp_path):
    out = tmp_path / "m.json"
    evaluate.main([f"--workdir={run}", "--config.data.seq_len=8", f"--out={out}"])
    assert json.loads(out.read_text())["seq_len"] == 8
    evaluate.main(
        [f"--workdir={run}", "--keep_layers=1,", f"--out={out}"]
        + ["--config.eval.explain=3", "--config.eval.explain_len=5"]
    )
    found = json.loads(out.read_text())
    assert np.isfinite(found["loss"])
    assert 0 < found["first_token_attention"] < 1
    assert found["max_activation"] > 0


def test_evaluate_refuses_settings_that_need_other_parameters(run):
    with pytest.raises(UserError, match="other parameters than the run has"):
        evaluate.main([f"--workdir={run}", "--config.model.embed_dim=32"])


def test_load_gives_logits_of_the_trained_model(run):
    loaded = attnjax.load(run)
    assert loaded.step == 12
    logits = loaded.logits("1 + 2")
    assert logits.shape == (5, 256)
    assert np.isfinite(logits).all()
    other = loaded.logits("1 + 3")
    np.testing.assert_allclose(logits[:4], other[:4], atol=1e-5)


def test_hooks_see_every_step_and_evaluation(go, corpus, tmp_path):
    from attnjax.core import config as configs
    from attnjax.training import experiment
    from attnjax.training.loop import Hook
    from attnjax.training.run import train as train_run

    seen = []

    class Recorder(Hook):
        def on_step(self, step, metrics):
            seen.append(step)

        def on_eval(self, step, metrics, params):
            seen.append(("eval", step, metrics["loss"] > 0, "layers" in params))

    given = configs.load_file(str(ROOT / "configs" / "quickstart.py"))
    changes = {**TINY, "data.name": f"text:{corpus}/*.txt", "train.steps": 3}
    changes |= {"data.cache_dir": tmp_path / "cache"}
    given = configs.apply_overrides(given, [(k, str(v)) for k, v in changes.items()])
    code = train_run(experiment.resolve(given), tmp_path / "r", hooks=(Recorder(),))
    assert code == EXIT_OK
    assert seen == [1, 2, 3, ("eval", 3, True, True)]


def test_a_mistake_does_not_claim_the_run_directory(go, tmp_path):
    workdir = tmp_path / "r"
    with pytest.raises(UserError, match=r"batch_size: must be a multiple"):
        go(workdir, train__batch_size=9)
    with pytest.raises(UserError, match=r"init_from: .* is not a run directory"):
        go(workdir, train__init_from=tmp_path)
    assert not (workdir / "config.json").exists()
    assert go(workdir, train__steps=1) == EXIT_OK
