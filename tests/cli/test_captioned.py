"""Mistakes with a denoiser that reads captions, at the front door."""

import re
from pathlib import Path

import pytest

from attnjax import train

QUICKSTART = Path(__file__).parents[2] / "configs" / "mmdit_quickstart.py"
WORDS = ["--config", QUICKSTART, "--config.mesh.data=8"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config.model.caption_dropout=0"],
            "without captions; got guidance=2, config.model.caption_dropout=0",
        ),
        (
            ["--config.model.text.max_len=8"],
            "at most 7 bytes of UTF-8, .*max_len=8 .*got 8 in 'an eight'",
        ),
        (["--config.data.augment.mixup=0.1"], "config.model.name=mmdit"),
        (["--config.model.label_dropout=0.1"], "label_dropout"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_one_line(words, message, told, tmp_path):
    found = told(train.main, *WORDS, "--workdir", tmp_path / "r", *words)
    assert re.search(message, found), found
