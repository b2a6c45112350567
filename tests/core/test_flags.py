"""Command lines: what is read, what is refused, what --help says."""

import dataclasses
import re
from typing import Literal

import pytest

from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line, positional


@dataclasses.dataclass(frozen=True)
class Flags:
    """Does something with a run.

    Attributes:
        which: what to do.
        workdir: the run directory.
        temperature: of sampling, 0 is greedy.
        num: how many.
        dry_run: only say what would be done.
        from_: format and path.
    """

    which: Literal["train", "mixers"] = positional(default="train")
    workdir: str = ""
    temperature: float = 1.0
    num: int | None = None
    dry_run: bool = False
    from_: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Needy:
    """Needs a directory.

    Attributes:
        workdir: the run directory.
    """

    workdir: str


def parse(*argv, options=Flags, **settings):
    return parse_command_line(list(argv), options, program="attnjax.x", **settings)


def refused(match, *argv, **settings):
    with pytest.raises(UserError, match=match):
        parse(*argv, **settings)


def test_an_empty_line_gives_the_defaults():
    line = parse()
    assert (line.config, line.overrides, line.flags) == (None, (), Flags())


def test_flags_are_typed_by_their_fields():
    line = parse("--temperature=1", "--num", "1e2", "--dry_run", "mixers")
    assert line.flags == Flags("mixers", temperature=1.0, num=100, dry_run=True)
    assert isinstance(line.flags.temperature, float)


def test_a_bool_can_be_switched_off_and_dashes_are_underscores():
    assert parse("--dry-run").flags.dry_run
    assert not parse("--dry_run=false").flags.dry_run


def test_a_tuple_takes_several_words():
    assert parse("--from", "hf", "a/b").flags.from_ == ("hf", "a/b")
    assert parse("--from=hf,a/b").flags.from_ == ("hf", "a/b")


@dataclasses.dataclass(frozen=True)
class Ranged:
    """Acts within a range.

    Attributes:
        interval: its ends.
        num: how many.
    """

    interval: tuple[float, float] | None = None
    num: int | None = None


@pytest.mark.parametrize(
    "words",
    [["--interval", "0.2,.7"], ["--interval=0.2,.7"], ["--interval", "0.2", ".7"]],
    ids=" ".join,
)
def test_a_pair_of_numbers_is_two_words_or_one_with_a_comma(words):
    line = parse(*words, "--num", "3", options=Ranged)
    assert line.flags == Ranged((0.2, 0.7), 3)
    assert parse("--interval", "-1,2", options=Ranged).flags.interval == (-1.0, 2.0)
    refused("^--interval: ", "--interval", "0.2,0.3,0.4", options=Ranged)
    refused("^--interval: needs a value", "--interval", "0.2", options=Ranged)
    # In texts a comma is a character.
    assert parse("--from", "hf,x", "a/b").flags.from_ == ("hf,x", "a/b")


def test_config_and_overrides_are_collected_in_order():
    line = parse("--config", "f.py:x", "--config.a.b=1=2", "--config.c", "-1")
    assert line.config == "f.py:x"
    assert line.overrides == (("a.b", "1=2"), ("c", "-1"))
    assert parse("--config=g.py").config == "g.py"


def test_unknown_flags_are_refused_with_the_nearest():
    refused(r"unknown flag '--workdr'\. Did you mean --workdir\?", "--workdr=x")


def test_a_config_value_without_its_prefix_says_how():
    refused(r"set as --config\.train\.steps=VALUE", "--train.steps=3")


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--workdir"], r"^--workdir: needs a value; got none"),
        (["--workdir", "--num=3"], r"^--workdir: needs a value"),
        (["--config"], r"^--config: needs a value"),
        (["--config.a"], r"^--config\.a: needs a value"),
        (["--num=x"], r"^--num: must be an int; got 'x'\. Example: --num=7$"),
        (["--dry_run=maybe"], r"^--dry_run: must be a bool"),
        (["trian"], r"^WHICH: unknown value 'trian'\. Did you mean train"),
        (["train", "more"], "does not know what to do with 'more'"),
        (["--from", "hf"], r"^--from: needs a value"),
    ],
)
def test_wrong_lines_are_refused(argv, match):
    refused(match, *argv)


def test_a_required_flag_is_asked_for_with_its_help():
    refused(r"^--workdir: is required: the run directory\.$", options=Needy)


def test_config_flags_are_unknown_where_a_front_door_takes_none():
    refused("unknown flag '--config'", "--config=x", config=False, overrides=False)
    refused("unknown flag '--config.a'", "--config.a=x", config=False, overrides=False)


def test_help_names_every_flag_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m attnjax.x --config FILE[:ARGS]")
    assert "Does something with a run." in text
    for words in (
        "--temperature X",
        "--num N",
        "--dry_run ",
        "--from TEXT TEXT",
        "WHICH",
        "of sampling, 0 is greedy. [float, default 1.0]",
    ):
        assert words in text


def test_help_shows_the_whole_summary_and_defaults_as_one_would_type_them(capsys):
    @dataclasses.dataclass(frozen=True)
    class Wordy:
        """Says much; so much
        that it needs two lines.

        Attributes:
            prompt: the start.
            size: how big.
            layers: which.
        """

        prompt: str = "\n"
        size: int = 0
        layers: tuple[int, ...] | None = None

    with pytest.raises(SystemExit):
        parse("-h", options=Wordy)
    text = capsys.readouterr().out
    assert "\nSays much; so much\nthat it needs two lines.\n\n" in text
    assert r"the start. [str, default '\n']" in text
    assert re.search(r"--layers N,\.\.\. +which\.", text)
    assert "how big. [int, default 0]" in text
