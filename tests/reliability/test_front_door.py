"""What the training command itself says about a run directory, end to end."""

import json
import shutil

import pytest
import tiny_run

pytestmark = pytest.mark.reliability
OPTIONS = {
    "model.num_layers": 1,
    "train.steps": 40,
    "train.save_every": 15,
    "eval.every": 20,
    "train.tensorboard": "false",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = tiny_run.Bench(tmp_path_factory.mktemp("bench"), options=OPTIONS)
    assert made.finish("done") == 0, made.log("done")
    return made


def run(bench, name, *words):
    """Run the command with more words; (exit code, what this process printed)."""
    before = len(bench.log(name))
    code = bench.start(name, [*bench.command(name), *words]).wait(
        timeout=tiny_run.PATIENCE
    )
    return code, bench.log(name)[before:].strip()


def test_a_second_process_is_refused_and_the_first_goes_on(bench):
    first = bench.start("busy")
    lock = bench.folder / "busy" / ".lock"
    tiny_run.wait_for(lambda: lock.exists() and lock.stat().st_size, process=first)
    code, told = run(bench, "busy")
    assert first.wait(timeout=tiny_run.PATIENCE) == 0
    assert code == 2
    assert f"is in use by another process (process {first.pid} on" in told
    code, told = run(bench, "busy")
    assert (code, "is finished at step 40" in told) == (0, True)


def test_another_config_is_refused_with_the_difference(bench):
    code, told = run(bench, "done", "--config.optim.learning_rate=0.5")
    assert code == 2
    assert told.startswith("error: workdir: ")
    assert "- optim.learning_rate = 0.004\n  + optim.learning_rate = 0.5" in told


def test_saving_and_logging_may_change_between_starts(bench):
    code, told = run(bench, "done", "--config.train.keep_last=5")
    assert (code, "is finished at step 40" in told) == (0, True)


def test_a_killed_run_resumes_from_its_directory_alone(bench):
    process = bench.start("alone")
    folder = bench.folder / "alone"
    tiny_run.wait_for(lambda: tiny_run.newest_checkpoint(folder) >= 15, process=process)
    process.kill()
    process.wait()
    front = bench.command("alone")[:3]
    code = bench.start("alone", [*front, "--workdir", str(folder)]).wait(
        timeout=tiny_run.PATIENCE
    )
    assert code == 0, bench.log("alone")
    assert "resuming from step" in bench.log("alone")
    assert tiny_run.differences(bench.folder / "done", folder) == []


def test_a_finished_run_is_extended_on_request_only(bench):
    shutil.copytree(bench.folder / "done", bench.folder / "longer")
    more = "--config.train.steps=50"
    code, told = run(bench, "longer", more)
    assert code == 2
    assert "+ train.steps = 50" in told and "--extend" in told
    code, told = run(bench, "longer", more, "--extend")
    assert code == 0, told
    assert "resuming from step 40" in told
    manifest = json.loads((bench.folder / "longer" / "manifest.json").read_text())
    assert [(e["from"], e["to"]) for e in manifest["extended"]] == [(40, 50)]
    assert tiny_run.last_step(bench.folder / "longer") == 50


def test_damage_to_every_checkpoint_refuses_to_start(bench):
    shutil.copytree(bench.folder / "done", bench.folder / "hurt")
    folder = bench.folder / "hurt"
    for path in (folder / "checkpoints").glob("*/meta.json"):
        path.write_text(path.read_text().replace('"step"', '"stop"'))
    before = (folder / "metrics.jsonl").read_bytes()
    code, told = run(bench, "hurt", "--config.train.steps=50", "--extend")
    assert code == 2, told
    assert "refuses to start" in told
    assert "step 40: meta.json: content changed" in told
    assert "Traceback" not in told
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_other_data_under_the_same_name_are_refused(bench):
    shutil.copytree(bench.folder / "done", bench.folder / "moved")
    extra = bench.folder / "corpus" / "99.txt"
    extra.write_text("One document more. " * 20)
    code, told = run(bench, "moved", "--config.train.steps=50", "--extend")
    extra.unlink()
    assert code == 2, told
    assert "was begun on other data" in told
