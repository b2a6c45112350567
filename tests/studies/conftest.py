"""Sweep files over a config that no test trains."""

import sys
from pathlib import Path

import pytest

# The helpers of this folder are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

CONFIG = """
def get_config():
    return {"model": {"layers": "attention", "num_layers": 1, "embed_dim": 8,
                      "num_heads": 2},
            "data": {"name": "stdlib", "seq_len": 16}, "train": {"steps": 3}}
"""
HEAD = "from attnjax.studies import *\nBASE = point('config.py')\n"


@pytest.fixture
def sweep_of(tmp_path):
    """Writes a sweep file: (body of the file) -> its path."""
    (tmp_path / "config.py").write_text(CONFIG)

    def write(body, *, name="sweep.py"):
        path = tmp_path / name
        path.write_text(HEAD + body)
        return path

    return write


SEEDS = "def sweep():\n    return seeds(BASE, {})\n"


@pytest.fixture
def study(sweep_of, tmp_path):
    """A written study of three seeds, in its work directory."""
    from attnjax.studies import sweep_file

    made = sweep_file.load(sweep_of(SEEDS.format(3)), tmp_path / "work")
    made.write()
    return made
