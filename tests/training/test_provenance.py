import json
import shlex
import subprocess
import sys

import attnjax
from attnjax.training import provenance


def git(folder, *words):
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", folder, *name, *words], check=True)


def test_a_source_tree_is_named_by_commit_and_changes(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    state = provenance.git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new.txt").write_text("untracked files are not the code")
    assert provenance.git_state(tmp_path)["dirty"] is False
    (tmp_path / "a.py").write_text("a = 2\n")
    assert provenance.git_state(tmp_path)["dirty"] is True


def test_an_installed_package_has_no_commit_even_below_a_repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    assert provenance.git_state(tmp_path / "site-packages") is None


def test_a_repository_without_a_commit_has_none(tmp_path):
    git(tmp_path, "init", "-q")
    assert provenance.git_state(tmp_path) is None


def test_sources_have_a_digest_of_names_and_contents(tmp_path):
    def digest():
        provenance.sources_digest.cache_clear()
        return provenance.sources_digest(tmp_path)

    (tmp_path / "a.py").write_text("x")
    one = digest()
    (tmp_path / "notes.txt").write_text("not code")
    assert digest() == one
    (tmp_path / "a.py").write_text("y")
    two = digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({one, two, digest()}) == 3


def test_the_description_is_json_and_names_what_numbers_depend_on(monkeypatch):
    # A test worker's own command line is not that of pytest.
    words = ["python", "-m", "attnjax.train", "--config.data.name=text:a b"]
    monkeypatch.setattr("sys.orig_argv", words)
    told = provenance.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["code"]["attnjax"] == attnjax.__version__
    assert told["packages"]["jax"]
    assert told["machine"]["cores"] >= 1
    assert told["machine"]["device_platform"] == "cpu"
    assert told["command"].endswith(shlex.join(sys.orig_argv[1:]))


def test_a_package_that_is_not_there_has_no_version():
    assert provenance._version("no-such-package-here") is None
