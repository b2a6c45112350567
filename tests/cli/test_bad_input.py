"""A user's mistake gets one readable line and exit 2, whatever the mistake."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnjax import evaluate, generate, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(tiny, told, tmp_path):
    """Starts a new run of the tiny config with changes; gives what is said."""

    def tell(*changes, lines=1):
        words = [f"--config.{change}" for change in changes]
        workdir = tmp_path / "run"
        text = told(
            train.main, "--config", tiny, "--workdir", workdir, *words, lines=lines
        )
        assert not list(workdir.glob("checkpoints/*"))
        return text

    return tell


@pytest.fixture(scope="module")
def run(tiny, run_door, tmp_path_factory):
    """A finished run of the tiny config."""
    path = tmp_path_factory.mktemp("runs") / "run"
    code, _, err = run_door(train.main, "--config", tiny, "--workdir", path)
    assert code == 0, err
    return path


CONFIG_MISTAKES = {
    "an unknown key": (
        ["optim.lerning_rate=1"],
        r"config\.optim: unknown key 'lerning_rate'\. Did you mean learning_rate\?",
    ),
    "a key in the wrong group": (
        ["model.seq_len=3"],
        r"config\.model: unknown key 'seq_len'",
    ),
    "an unknown group": (
        ["optm.name=lion"],
        r"unknown group 'optm'\. Did you mean opt",
    ),
    "a word for a number": (
        ["optim.learning_rate=fast"],
        r"config\.optim\.learning_rate: must be a float; got 'fast'\. "
        r"Example: --config\.optim\.learning_rate=3e-4",
    ),
    "a fraction for a count": (
        ["train.steps=1.5"],
        r"config\.train\.steps: must be an int; got '1\.5'",
    ),
    "a value for a group": (["optim=3"], r"config\.optim: is a group of settings"),
    "a count below one": (["train.steps=0"], r"config\.train\.steps: must be at least"),
    "heads that do not divide the width": (
        ["model.num_heads=3"],
        r"config\.model\.num_heads: must divide embed_dim .*num_heads=3, embed_dim=8",
    ),
    "key/value heads that do not divide the heads": (
        ["model.num_kv_heads=3"],
        r"config\.model\.num_kv_heads: .*num_kv_heads=3",
    ),
    "a batch that the mesh does not divide": (
        ["train.batch_size=9"],
        r"config\.train\.batch_size: .* got .*9",
    ),
    "a mesh that the devices do not fill": (
        ["mesh.data=3"],
        r"config\.mesh: .*(3|devices)",
    ),
    "an unknown mixer": (
        ["model.layers=linear_atention"],
        r"unknown mixer 'linear_atention'\. Did you mean linear_attention",
    ),
    "a mixer's file that is not there": (
        ["model.layers=mine", 'model.mixers.mine={"type": "no/such.py"}'],
        r"no file 'no/such\.py'",
    ),
    "an unknown option of a mixer": (
        ["model.mixers.linear_attention.chunk=3"],
        r"config\.model\.mixers\.linear_attention: unknown key 'chunk'\. Did you mean",
    ),
    "a mixer's option of the wrong type": (
        ["model.mixers.linear_attention.chunk_size=big"],
        r"linear_attention\.chunk_size: must be an int; got 'big'",
    ),
    "a mixer's option of the wrong value": (
        ["model.mixers.linear_attention.chunk_size=0"],
        r"chunk_size must be a power of 2; got 0",
    ),
    "settings for a mixer in no layer": (
        ["model.mixers.other.type=linear_attention"],
        r"config\.model\.mixers: other is in no layer",
    ),
    "an unknown model": (["model.name=ml"], r"unknown model 'ml'\. Did you mean lm\?"),
    "an unknown optimizer": (
        ["optim.name=adamv"],
        r"config\.optim\.name: unknown (value|optimizer) 'adamv'\. Did you mean adamw",
    ),
    "an unknown schedule": (
        ["optim.schedule=cosin"],
        r"config\.optim\.schedule: unknown (value|schedule) 'cosin'\. Did you mean cos",
    ),
    "an unknown dataset": (
        ["data.name=stdlb"],
        r"unknown .*'stdlb'\. Did you mean stdlib\?",
    ),
    "an unknown tokenizer": (
        ["data.tokenizer=byte"],
        r"unknown tokenizer 'byte'\. Did you mean bytes",
    ),
    "a tokenizer file that is not there": (
        ["data.tokenizer=json:/no/such.json"],
        r"/no/such\.json",
    ),
    "an unknown dtype": (["model.dtype=float31"], r"model\.dtype: .*'float31'"),
    "an unknown activation": (
        ["model.activation=gleu"],
        r"config\.model\.activation: unknown activation 'gleu'\. Did you mean gelu",
    ),
    "a sequence longer than the learned positions": (
        ["model.positions=learned", "data.seq_len=17"],
        r"config\.data\.seq_len: must not exceed .* got seq_len=17, max_len=16\. Raise",
    ),
    "more tokens laid open than a row has": (
        ["data.seq_len=1", "eval.explain=5", "eval.explain_len=2"],
        r"config\.eval\.explain_len: must not .* got explain_len=2, seq_len=1\. Lower",
    ),
    "a dataset that is not prepared": (
        ["data.name=tfds:tiny_shakespeare", "data.data_dir=/no/such"],
        r"tiny_shakespeare.*prepare",
    ),
    "a text that is not there": (
        ["data.name=text:/no/such/*.txt"],
        r"/no/such/\*\.txt",
    ),
    "a run to start from that is none": (
        ["train.init_from=/no/such"],
        r"config\.train\.init_from: '/no/such' is not a run directory",
    ),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_the_config_is_one_line(mistake, refused):
    changes, match = CONFIG_MISTAKES[mistake]
    assert re.search(match, refused(*changes))


@pytest.mark.parametrize(
    ("layers", "caret"),
    [("(linear_attention*2", 0), ("linear_attention*x", 17), ("a)", 1), ("a ? b", 2)],
)
def test_a_schedule_that_does_not_parse_has_a_caret_under_the_place(
    layers, caret, refused
):
    text = refused(f"model.layers={layers}", lines=4)
    first, shown, pointer, _ = text.splitlines()
    assert first.startswith("config.model.layers: ")
    assert shown == f"  {layers}"
    assert pointer == " " * (2 + caret) + "^"


def test_an_empty_text_is_refused(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in refused(f"data.name=text:{tmp_path}/empty.txt")


def test_a_text_too_short_for_one_row_is_refused(refused, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    said = refused(f"data.name=text:{tmp_path}/short.txt")
    assert "split predicts no token" in said


def test_a_text_that_is_not_text_is_refused(refused, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00" * 99)
    text = refused(f"data.name=text:{tmp_path}/bytes.txt")
    assert "bytes.txt" in text
    assert "UTF-8" in text


LINE_MISTAKES = {
    "no workdir": (["--config=x.py"], "--workdir: is required: the run directory"),
    "an unknown flag": (
        ["--wokdir=x"],
        "unknown flag '--wokdir'. Did you mean --workdir",
    ),
    "a config value without its prefix": (
        ["--workdir=x", "--train.steps=3"],
        "set as --config.train.steps=VALUE",
    ),
    "a stray word": (["--workdir=x", "quick"], "does not know what to do with 'quick'"),
    "a missing value": (["--workdir"], "--workdir: needs a value"),
    "a workdir without a run": (["--workdir=/no/such"], "no config.json"),
    "a config that is not there": (
        ["--workdir=x", "--config=configs/quikstart.py"],
        "Did you mean configs/quickstart.py or",
    ),
}


@pytest.mark.parametrize("mistake", LINE_MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(mistake, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv, match = LINE_MISTAKES[mistake]
    assert match in told(train.main, *argv)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("def get_config(:", r"broken\.py:1: SyntaxError"),
        ("import not_there", r"broken\.py:1: ModuleNotFoundError: .*'not_there'"),
        ("x = 1", r"must define get_config\(\)"),
        ("def get_config():\n    return {'a': 1 / 0}", r":2: ZeroDivisionError"),
    ],
)
def test_a_broken_config_file_is_one_line_with_its_place(text, match, told, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(text)
    said = told(train.main, "--config", path, "--workdir", tmp_path / "run")
    assert re.search(match, said)


@pytest.mark.parametrize("door", [evaluate, generate], ids=["evaluate", "generate"])
def test_a_workdir_without_a_run_is_refused(door, told, tmp_path):
    text = told(door.main, "--workdir", tmp_path)
    assert "is not a run directory" in text
    assert "python -m attnjax.train --config FILE --workdir" in text


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--temperature=hot"], "--temperature: must be a float; got 'hot'"),
        (["--temperature=-1"], "temperature must not be negative; got -1.0"),
        (["--top_p=2"], "top_p must be in"),
        (["--num=0"], "must be at least 1; got num=0"),
        (["--step=99"], "99"),
        (["--max_tokens=3"], "Did you mean --max_new_tokens"),
    ],
)
def test_a_mistake_in_generation_is_one_line(words, match, told, run):
    assert match in told(generate.main, "--workdir", run, *words)


def test_another_config_in_a_run_is_refused_with_the_difference(told, tiny, run):
    text = told(
        train.main,
        *("--config", tiny, "--workdir", run, "--config.optim.learning_rate=0.5"),
        lines=4,
    )
    assert re.search(r"^ *- optim\.learning_rate = ", text, re.MULTILINE)
    assert re.search(r"^ *\+ optim\.learning_rate = 0\.5$", text, re.MULTILINE)


def test_a_tokenizer_that_does_not_match_the_checkpoint_is_refused(
    told, tiny, run, tmp_path
):
    text = told(
        train.main,
        *("--config", tiny, "--workdir", tmp_path / "run"),
        *("--config.data.tokenizer=chars", f"--config.train.init_from={run}"),
    )
    assert "tokenizer" in text


def test_a_run_without_an_intact_checkpoint_is_refused(told, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert "checkpoint" in told(generate.main, "--workdir", copy, lines=None)


def test_a_workdir_that_is_a_file_is_refused(told, tiny, tmp_path):
    (tmp_path / "run").write_text("")
    text = told(train.main, "--config", tiny, "--workdir", tmp_path / "run")
    assert str(tmp_path / "run") in text


def shell(*argv, before=()):
    """A front door as a shell runs it."""
    return subprocess.run(
        [*before, sys.executable, "-m", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_a_shell_sees_exit_2_and_one_line(tiny, tmp_path):
    done = shell(
        *("attnjax.train", "--config", tiny, "--workdir", tmp_path / "run"),
        "--config.optim.lerning_rate=1",
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: config.optim: unknown key 'lerning_rate'.")


def test_a_read_only_disk_is_one_line(tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--mount", "--propagation=private", "bash", "-c"]
    script = f'mount -t tmpfs -o ro tmpfs {disk} && exec "$@"'
    if subprocess.run([*mount, script, "x", "true"], capture_output=True).returncode:
        pytest.skip("mounting a file system needs rights that this user lacks")
    done = shell(
        *("attnjax.train", "--config", tiny, "--workdir", disk / "run"),
        before=[*mount, script, "with-disk"],
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "the file system is read-only" in done.stderr


def test_a_mistake_does_not_claim_the_run_directory(told, tiny, run_door, tmp_path):
    words = ["--config", tiny, "--workdir", tmp_path / "run"]
    told(train.main, *words, "--config.train.batch_size=9")
    code, _, err = run_door(train.main, *words)
    assert code == 0, err
