"""python -m attnjax.catalog: the table, one entry, JSON, Markdown, mistakes."""

import json

import pytest

from attnjax import catalog
from attnjax.core import discovery, entries
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode
from attnjax.models import options

NAMES = discovery.names()


def test_the_table_has_a_line_for_every_mechanism(capsys):
    assert catalog.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *NAMES]


def test_json_holds_every_entry(capsys):
    catalog.main(["--json"])
    told = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in told] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_one_entry_tells_all_its_options(name, capsys):
    catalog.main([name])
    text = capsys.readouterr().out
    catalog.main([name, "--json"])
    entry = json.loads(capsys.readouterr().out)
    assert text.startswith(f"{name}: {entry['title']}")
    assert all(f"  {option['name']} (" in text for option in entry["config"])
    assert max(len(line) for line in text.splitlines()) < 140


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_documented_and_every_paper_is_named(name):
    entry = entries.entry(discovery.find(name))
    assert [option["name"] for option in entry["config"] if not option["doc"]] == []
    assert entry["family"] and entry["title"] and entry["forms"]
    assert bool(entry["paper"]) == bool(entry["source"])


@pytest.mark.parametrize("group", options.groups(), ids=lambda group: group["name"])
def test_options_of_a_whole_model_are_told_too(group, capsys):
    catalog.main([group["name"]])
    text = capsys.readouterr().out
    assert text.startswith(f"{group['name']}: ")
    assert all(f"  {option['name']} (" in text for option in group["config"])
    assert all(option["doc"] for option in group["config"])
    catalog.main([group["name"], "--json"])
    assert json.loads(capsys.readouterr().out) == group


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(
        UserError, match="catalog: unknown mixer 'linear_atention'. Did"
    ):
        catalog.main(["linear_atention"])


def test_markdown_is_written_where_asked(tmp_path, capsys):
    path = tmp_path / "new" / "page.md"
    catalog.main(["--markdown", str(path)])
    assert f"wrote {len(NAMES)} mechanisms" in capsys.readouterr().out
    assert path.read_text().count("\n## ") == len(NAMES)


def test_the_terminal_table_names_every_mechanism(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for width, is_shown in (("130", True), ("80", False)):
        monkeypatch.setenv("COLUMNS", width)
        catalog.main([])
        text = capsys.readouterr().out
        assert all(name in text for name in NAMES)
        assert ("decode" in text.splitlines()[1]) == is_shown


@pytest.mark.parametrize(
    ("decode", "words"),
    [
        (Decode(), "exact"),
        (Decode(options=(("form", "parallel"),)), "exact with form=parallel"),
        (Decode(exact=False, reason="it forgets"), "differs: it forgets"),
        (Decode(exact=False), "differs"),
    ],
)
def test_decoding_is_told_in_words(decode, words):
    assert entries.decode_words(decode) == words


def test_what_does_not_decode_has_no_words_for_how():
    entry = entries.entry(discovery.find("davit"))
    assert catalog.decode_words(entry) == "none"
    assert "  decode  none" in catalog.describe(entry).splitlines()


def test_capabilities_are_told_in_words():
    can = Capabilities(cross=True, grid=(1, 2), needs_grid=True, decode=False)
    assert entries.capability_words(can) == [
        "causal",
        "cross",
        "needs grid",
        "segments",
        "grid 1-2",
    ]
