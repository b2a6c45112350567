from pathlib import Path

import pytest

from attnjax.core.errors import UserError
from attnjax.data import open_corpus
from attnjax.data.text import Config, open_source

SHARED_TEXT = Path(__file__).parents[3] / "shared" / "data" / "text"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number in range(12):
        name = f"deep/{number}.txt" if number % 2 else f"{number}.txt"
        (folder / name).write_text(f"text {number}. " * (20 + number))
    return folder


def documents(**options):
    source = open_source(Config(**options))
    return list(source.train()), list(source.eval())


def test_files_are_documents_and_some_are_held_out(folder):
    train, held_out = documents(name=f"text:{folder}/**/*.txt", eval_fraction=0.25)
    assert len(train) + len(held_out) == 12
    share = sum(map(len, held_out)) / sum(map(len, train + held_out))
    assert 0.1 < share <= 0.25
    assert all(f"text {n}. " * (20 + n) in train + held_out for n in range(12))


def test_the_choice_is_the_same_wherever_the_files_lie(folder, tmp_path):
    before = documents(name=f"text:{folder}/**/*.txt")
    for place in "abcdef":
        folder = folder.rename(tmp_path / place)
        got = documents(name="text:**/*.txt", data_dir=str(folder))
        # Files are read in the order of their paths, which moving does not change.
        assert got == before


def test_one_file_is_cut_at_a_character(tmp_path):
    (tmp_path / "one.txt").write_text("é" * 90 + "x" * 10, encoding="utf-8")
    train, held_out = documents(name="text:one.txt", data_dir=str(tmp_path))
    assert (train, held_out) == (["é" * 90], ["x" * 10])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbf0123456789")
    assert documents(name=f"text:{tmp_path}/one.txt") == (["012345678"], ["9"])


def test_two_files_leave_one_to_hold_out(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 50)
    (tmp_path / "b.txt").write_text("b" * 40)
    (tmp_path / "empty.txt").write_text("")
    train, held_out = documents(name=f"text:{tmp_path}/*.txt")
    assert held_out == ["b" * 40] and "a" * 50 in train


def test_held_out_files_can_be_named(folder):
    train, held_out = documents(
        name="text:**/*.txt", data_dir=str(folder), eval_files="deep/*.txt"
    )
    assert len(train) == len(held_out) == 6
    assert not set(train) & set(held_out)


def test_a_change_of_a_file_changes_the_corpus(tmp_path):
    config = Config(name=f"text:{tmp_path}/one.txt")
    (tmp_path / "one.txt").write_text("first version")
    first = open_corpus(config)
    (tmp_path / "one.txt").write_text("other version")
    second = open_corpus(config)
    assert first.fingerprint != second.fingerprint
    assert second.tokenizer.decode(second.train.tokens) == "other versi"


def test_the_same_text_elsewhere_has_the_same_fingerprint(tmp_path):
    prints = set()
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.txt").write_text("the same text")
        config = Config(name=f"text:{tmp_path / name}/*.txt")
        prints.add(open_corpus(config).fingerprint)
    assert len(prints) == 1


def test_provenance_names_the_files_without_their_place(folder):
    config = Config(name="text:**/1*.txt", data_dir=str(folder))
    provenance = open_corpus(config).provenance
    assert provenance["files"] == ["10.txt", "deep/1.txt", "deep/11.txt"]
    assert str(folder) not in str(provenance)


def test_no_match_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must name files; got .*no file matches\."):
        open_source(Config(name=f"text:{tmp_path}/*.txt"))
    with pytest.raises(UserError, match="only folders match"):
        open_source(Config(name=f"text:{tmp_path}"))


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("")
    config = Config(name=f"text:{tmp_path}/one.txt")
    with pytest.raises(UserError, match="both splits must hold text; got no text in t"):
        open_corpus(config)
    (tmp_path / "two.txt").write_text("")
    with pytest.raises(UserError, match="both splits must hold text"):
        open_corpus(Config(name=f"text:{tmp_path}/*.txt"))


def test_nothing_held_out_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789")
    config = Config(name=f"text:{tmp_path}/one.txt", eval_fraction=1e-20)
    with pytest.raises(UserError, match="both splits must hold text; got no text in e"):
        open_corpus(config)


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "one.txt").write_bytes("naïve".encode("latin-1"))
    message = r"must be UTF-8; got .*one.txt: byte 0xef at offset 2. Convert it"
    with pytest.raises(UserError, match=message):
        open_corpus(Config(name=f"text:{tmp_path}/one.txt"))


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("text")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    config = Config(name=f"text:{tmp_path}/one.txt")
    source = open_source(config)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="must be readable; got .*Permission denied"):
        list(source.train())


def test_holding_out_everything_is_refused(folder):
    config = Config(name=f"text:{folder}/*.txt", eval_files=f"{folder}/*.txt")
    with pytest.raises(UserError, match="files to train on must remain"):
        open_source(config)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_an_impossible_share_is_refused(fraction):
    with pytest.raises(UserError, match="eval_fraction must lie between 0 and 1"):
        Config(eval_fraction=fraction)


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason=f"no {SHARED_TEXT}")
def test_wikitext_reads():
    config = Config(
        name="text:wikitext2-*.txt",
        data_dir=str(SHARED_TEXT),
        eval_files="wikitext2-test.txt",
    )
    corpus = open_corpus(config)
    assert corpus.train.num_bytes > 1_000_000 < corpus.eval.num_bytes
    assert "Homarus" in corpus.tokenizer.decode(corpus.train.tokens[:100])
