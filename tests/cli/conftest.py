"""Front doors called in this process, on a tiny text."""

import contextlib
import io

import pytest

from attnjax.core.cli import run_main

CONFIG = '''
"""A model of a few hundred parameters."""


def get_config():
    """The smallest run."""
    return {{
        "model": {{
            "layers": "linear_attention",
            "num_layers": 2,
            "embed_dim": 8,
            "num_heads": 2,
            "max_len": 16,
        }},
        "data": {{
            "name": "text:{folder}/*.txt",
            "seq_len": 16,
            "cache_dir": "{folder}/cache",
        }},
        "train": {{
            "steps": 2,
            "batch_size": 8,
            "log_every": 1,
            "sample_tokens": 0,
            "tensorboard": False,
        }},
        "eval": {{"batches": 1}},
    }}
'''


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The path of a config that trains in a second on files beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    for index in range(3):
        text = f"The {index}th file says little, and says it again. " * 40
        (folder / f"part{index}.txt").write_text(text)
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(folder=folder))
    return path


def end(main, *argv):
    """The exit code, stdout and stderr of a front door, as a shell would see them."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(main, [str(word) for word in argv])
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def run_door():
    """Calls a front door's main: (main, *words) -> (exit code, stdout, stderr)."""
    return end


@pytest.fixture(scope="session")
def told(run_door):
    """What a front door says to a mistake: one line and exit 2, or the test fails."""

    def tell(main, *argv, lines=1):
        code, _, err = run_door(main, *argv)
        assert code == 2, err
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert lines is None or err.count("\n") == lines, err
        return err.removeprefix("error: ")

    return tell
