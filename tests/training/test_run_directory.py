import errno
import json
import os
from pathlib import Path

import pytest

from attnjax.core.errors import UserError
from attnjax.training import provenance
from attnjax.training.run_directory import RunDirectory

CONFIG = {
    "model": {"layers": "attention*2", "embed_dim": 8},
    "train": {"steps": 10, "log_every": 1},
    "mesh": {"data": 1},
}
EXCLUDES = ("mesh", "train.log_every")


def config(**train):
    return {**CONFIG, "train": {**CONFIG["train"], **train}}


def enter(path, given=CONFIG, **options):
    return RunDirectory.open(path, given, identity_excludes=EXCLUDES, **options)


def begin(path, given=CONFIG, *, steps=0, data="abc"):
    """Open and start a run, as a training process does."""
    run = enter(path, given)
    run.start(steps, data_fingerprint=data)
    return run


@pytest.fixture
def path(tmp_path):
    with begin(tmp_path / "runs" / "one"):
        pass
    return tmp_path / "runs" / "one"


def read(path, name):
    return json.loads((path / name).read_text())


def test_a_new_run_writes_its_config_and_manifest(tmp_path):
    with enter(tmp_path / "new") as run:
        assert run.is_new
        run.start(0, data_fingerprint="abc", data={"documents": 3})
    assert read(run.path, "config.json") == CONFIG
    manifest = read(run.path, "manifest.json")
    assert manifest["data"] == {"fingerprint": "abc", "provenance": {"documents": 3}}
    assert manifest["packages"]["jax"]
    assert manifest["code"]["sources"]
    assert manifest["machine"]["device_count"] == 8
    assert "command" in manifest and len(manifest["config_hash"]) == 64
    (start,) = manifest["starts"]
    assert (start["step"], start["pid"]) == (0, os.getpid())
    assert start["code"] == manifest["code"]


def test_the_same_config_goes_on(path):
    with begin(path, steps=5) as run:
        assert not run.is_new
        assert run.extended_from is None
    assert [start["step"] for start in read(path, "manifest.json")["starts"]] == [0, 5]


def test_excluded_keys_may_differ_and_the_newest_config_is_kept(path):
    other = {**config(log_every=7), "mesh": {"data": -1}}
    with enter(path, other):
        pass
    assert read(path, "config.json") == other
    hashes = [read(path, "manifest.json")["config_hash"]]
    with enter(path):
        hashes.append(read(path, "manifest.json")["config_hash"])
    assert hashes[0] == hashes[1]


def test_another_config_is_refused_with_the_difference(path):
    other = {**CONFIG, "model": {"layers": "attention*2", "num_heads": 4}}
    with pytest.raises(UserError, match="belongs to another config") as caught:
        enter(path, other)
    assert "  - model.embed_dim = 8\n  + model.num_heads = 4\n" in str(caught.value)
    assert "another --workdir" in str(caught.value)
    assert read(path, "config.json") == CONFIG
    with enter(path):
        pass  # the refused process has let go of the lock


def test_options_that_are_newer_than_the_run_take_their_defaults(path):
    def resolve(given):
        return {**given, "model": {"new_option": 1, **given["model"]}}

    with enter(path, resolve(CONFIG), resolve=resolve):
        pass
    assert read(path, "config.json")["model"]["new_option"] == 1
    other = {**CONFIG, "model": {**CONFIG["model"], "new_option": 2}}
    with pytest.raises(UserError, match=r"- model.new_option = 1\n  \+ .* = 2"):
        enter(path, other, resolve=resolve)


def test_more_steps_need_extend_and_are_recorded(path):
    with pytest.raises(UserError, match=r"\+ train.steps = 20\n.*pass --extend"):
        enter(path, config(steps=20))
    with enter(path, config(steps=20), extend=True) as run:
        assert run.extended_from == 10
    (entry,) = read(path, "manifest.json")["extended"]
    assert (entry["from"], entry["to"]) == (10, 20)
    with enter(path, config(steps=20), extend=True) as run:
        assert run.extended_from is None
    with pytest.raises(UserError, match=r"- train.steps = 20\n  \+ train.steps = 10"):
        enter(path)


def test_fewer_steps_are_refused_with_and_without_extend(path):
    with pytest.raises(UserError, match=r"can only be raised; got 10 -> 5\. Give more"):
        enter(path, config(steps=5), extend=True)
    with pytest.raises(UserError, match="another config") as caught:
        enter(path, config(steps=5))
    assert "--extend" not in str(caught.value)


def test_extend_allows_no_other_change(path):
    other = {**config(steps=20), "model": {"layers": "attention*3", "embed_dim": 8}}
    with pytest.raises(UserError, match="model.layers"):
        enter(path, other, extend=True)


def test_a_finished_run_says_so_until_it_is_extended(path):
    with enter(path) as run:
        assert not run.finished
        run.end("finished", 10)
        assert run.finished
    with enter(path) as run:
        assert (run.finished, run.finished_step) == (True, 10)
    with enter(path, config(steps=20), extend=True) as run:
        assert not run.finished
    (end,) = read(path, "manifest.json")["ends"]
    assert (end["status"], end["step"]) == ("finished", 10)


def test_a_resume_tells_what_makes_other_bits(path, monkeypatch):
    with enter(path) as run:
        assert run.start(0, data_fingerprint="abc") == []
        monkeypatch.setattr(provenance, "sources_digest", lambda _: "other")
        monkeypatch.setattr(provenance, "_version", lambda _: "9.9")
        lines = run.start(5, data_fingerprint="abc")
    assert "attnjax's own code has changed" in lines[0]
    assert any(line.startswith("jax was 0.") and "now 9.9" in line for line in lines)


def test_a_saved_end_is_not_finished(path):
    with enter(path) as run:
        run.end("saved", 10)
        assert not run.finished


def test_other_data_are_refused_with_what_changed(path):
    with enter(path) as run:
        run.start(0, data_fingerprint="abc", data={"python_version": "3.11"})
        with pytest.raises(UserError, match="begun on other data") as caught:
            run.start(0, data_fingerprint="abd", data={"python_version": "3.12"})
    assert "'abc', now 'abd'" in str(caught.value)
    assert '- python_version = "3.11"; + python_version = "3.12"' in str(caught.value)


def test_a_second_opening_is_refused(path):
    with enter(path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        enter(path)


def test_other_processes_of_a_run_neither_lock_nor_write(path, tmp_path):
    with enter(path), enter(path, primary=False) as run:
        run.start(0, data_fingerprint="abc")
        run.end("finished", 10)
        run.set_phase("step")
        run.write_summary({})
    assert read(path, "manifest.json")["ends"] == []
    assert not (path / "summary.json").exists()
    enter(tmp_path / "none", primary=False)
    assert not (tmp_path / "none").exists()


def test_a_run_that_never_started_does_not_own_the_directory(tmp_path):
    with enter(tmp_path):
        pass  # a start that failed, say for want of data
    with enter(tmp_path, config(steps=20)) as run:
        assert run.is_new
    assert read(tmp_path, "config.json") == config(steps=20)


def test_a_kill_between_manifest_and_config_is_a_new_run(path):
    (path / "config.json").unlink()
    with enter(path, config(steps=20)) as run:
        assert run.is_new


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_results_without_their_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"holds {name} and no config.json"):
        enter(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_files_are_named(path, name, content):
    (path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*Restore it from a copy"):
        enter(path)


def test_loading_reads_and_neither_locks_nor_writes(path):
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    with enter(path):
        pass
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    run = RunDirectory.load(path)
    assert run.config == CONFIG
    assert run.run_id == read(path, "manifest.json")["run_id"]
    run.end("finished", 10)
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


def test_loading_what_is_no_run_says_what_a_run_is(tmp_path):
    with pytest.raises(
        UserError, match=r"is not a run: it has no config\.json\. A run"
    ):
        RunDirectory.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        RunDirectory.load(tmp_path / "nowhere")


def test_a_file_in_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a directory must be"):
        enter(tmp_path / "file")
    with pytest.raises(UserError, match="a file stands where a directory must be"):
        enter(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_an_unwritable_disk_is_one_line(tmp_path, monkeypatch, number, text):
    def fails(self, *_, **__):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", fails)
    with pytest.raises(UserError, match=f"^workdir: .*new.*{text}"):
        enter(tmp_path / "new")


def test_the_phase_is_one_word_written_on_change(path, monkeypatch):
    with enter(path) as run:
        run.set_phase("compile")
        assert (path / "phase").read_text().split() == ["compile"]
        run.set_phase("step")
        assert (path / "phase").read_text().split() == ["step"]
        (path / "phase").unlink()
        run.set_phase("step")
        assert not (path / "phase").exists()
        with pytest.raises(ValueError, match="must be one of .*got 'lunch'"):
            run.set_phase("lunch")


def test_summaries_may_hold_nan(path):
    with enter(path) as run:
        run.write_summary({"loss": float("nan"), "steps": 3})
    assert read(path, "summary.json") == {"loss": "NaN", "steps": 3}


def test_folders_are_made_when_asked_for(path):
    with enter(path) as run:
        assert run.samples().is_dir() and run.plots().is_dir()
        assert not run.checkpoints.exists()
        assert run.metrics.parent == run.path
