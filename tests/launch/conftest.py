"""What the tests of several launchers need."""

import re
import shlex
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def shown_commands():
    """The words after `python launch/SCRIPT` of every example in the READMEs."""

    def found(script: str) -> list[list[str]]:
        commands = []
        for path in sorted(LAUNCH.glob("**/README.md")):
            text = path.read_text().replace("\\\n", " ")
            pattern = rf"^    python launch/{script} (.*)$"
            for line in re.findall(pattern, text, re.MULTILINE):
                commands.append(shlex.split(re.split(r" \| | >", line)[0]))
        return commands

    return found
