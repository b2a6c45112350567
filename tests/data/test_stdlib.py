import platform

import pytest

from attnjax.core.errors import UserError
from attnjax.data import config_class, open_corpus
from attnjax.data.stdlib import Config, is_held_out, open_source


@pytest.fixture(scope="module")
def source():
    return open_source(Config())


def test_it_is_megabytes_of_text_with_a_small_held_out_share(source):
    train, held_out = (list(split()) for split in (source.train, source.eval))
    sizes = [sum(map(len, split)) for split in (train, held_out)]
    assert 5e6 < sizes[0] < 2e7
    assert 1e5 < sizes[1] < 1e6
    assert not set(train) & set(held_out)


def test_reading_twice_gives_the_same_documents(source):
    assert list(source.eval()) == list(source.eval())


def test_tests_tables_and_installed_packages_are_left_out(source):
    names = [name for name, *_ in source.identity["files"]]
    assert "json/decoder.py" in names
    assert not [n for n in names if n.split("/")[0] in ("test", "site-packages")]
    assert not [n for n in names if "_sysconfigdata" in n or "encodings/" in n]


def test_the_language_reference_is_there(source):
    assert any(
        "for_stmt ::=" in text.replace("  ", " ").replace(" ::", " ::")
        for text in [*source.train(), *source.eval()]
    )


def test_holding_out_depends_on_the_name_alone():
    names = [f"package/module_{i}.py" for i in range(4000)]
    held_out = [name for name in names if is_held_out(name)]
    assert 140 < len(held_out) < 260
    assert held_out == [name for name in reversed(names) if is_held_out(name)][::-1]


def test_the_corpus_opens_by_name_and_tells_its_python():
    corpus = open_corpus(config_class("stdlib")())
    assert corpus.provenance["python_version"] == platform.python_version()
    assert corpus.train.num_bytes == corpus.train.num_tokens
    text = corpus.tokenizer.decode(corpus.eval.tokens[:4000])
    assert "\n" in text and "\ufffd" not in text[:-2]


def test_an_interpreter_without_source_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold \.py files; got none in .*Set"):
        open_source(Config(data_dir=str(tmp_path)))


def test_an_interpreter_without_the_reference_is_refused(source, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"must have the module pydoc_data\.topics"):
        list(source.eval())
