"""python -m attnjax.conformance: its table and its exit codes."""

from pathlib import Path

import pytest

from attnjax.conformance.__main__ import main
from attnjax.core.errors import UserError

TOY = Path(__file__).with_name("toy_mixer.txt").read_text()


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy_mixer.py"
    path.write_text(TOY)
    return path


def test_a_mechanism_that_conforms_exits_0(toy, capsys):
    assert main([str(toy), "--case", "flops|well_formed"]) == 0
    told = capsys.readouterr().out
    assert "pass" in told and "toy_mixer: 2 pass" in told


def test_a_failure_is_told_and_exits_1(toy, capsys):
    toy.write_text(TOY.replace("4.0 * seq_len", "0.0 * seq_len"))
    assert main([str(toy), "--case", "flops"]) == 1
    told = capsys.readouterr().out
    assert "fail" in told and "SPEC.flops must be positive" in told
    assert "toy_mixer: 1 fail" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_mixer"], "no_such_mixer"),
        (["toy", "--case", "("], "--case: must be a regular expression; got '\\('"),
        (["attention", "--case", "no_such_case"], "--case: matches no case of"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)
