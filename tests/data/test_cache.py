import concurrent.futures
import dataclasses
import errno
import itertools
import json
import os
import time

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data import cache, store
from attnjax.data.cache import open_text
from attnjax.data.config import TextConfig
from attnjax.data.source import TextSource

TRAIN = ["first document", "", "zweites Stück", "third", "x"]
HELD_OUT = ["held out", "end"]


@pytest.fixture
def source():
    reads = []

    def read(name, texts):
        reads.append(name)
        return iter(texts)

    made = TextSource(
        label="toy",
        identity={"version": 1},
        train=lambda: read("train", TRAIN),
        eval=lambda: read("eval", HELD_OUT),
        provenance={"origin": "tests"},
    )
    object.__setattr__(made, "reads", reads)
    return made


def folders(cache_dir):
    return [path for path in cache_dir.iterdir() if path.is_dir()]


def texts_of(corpus, split):
    offsets = split.document_offsets
    return [
        corpus.tokenizer.decode(split.tokens[a:b])
        for a, b in itertools.pairwise(offsets)
    ]


def test_documents_come_back_without_the_empty_ones(source):
    corpus = open_text(source, TextConfig())
    assert texts_of(corpus, corpus.train) == [text for text in TRAIN if text]
    assert texts_of(corpus, corpus.eval) == HELD_OUT
    assert corpus.train.num_bytes == sum(len(t.encode()) for t in TRAIN)
    assert corpus.train.tokens.dtype == np.uint8
    assert not corpus.train.tokens.flags.writeable


def test_text_is_read_once(source, cache_dir):
    first = open_text(source, TextConfig())
    second = open_text(source, TextConfig())
    assert source.reads == ["train", "eval"]
    assert first.fingerprint == second.fingerprint
    assert first.provenance == second.provenance
    assert first.provenance["origin"] == "tests"
    assert len(folders(cache_dir)) == 1


def test_documents_end_with_the_separator_of_the_tokenizer(source):
    corpus = open_text(source, TextConfig(tokenizer="bpe:258"))
    ends = corpus.train.document_offsets[1:] - 1
    assert (corpus.train.tokens[ends] == corpus.tokenizer.separator).all()
    assert (np.asarray(corpus.train.tokens) == corpus.tokenizer.separator).sum() == 4
    assert corpus.train.tokens.dtype == np.uint16


def test_another_tokenizer_is_another_cache(source, cache_dir):
    prints = {
        open_text(source, TextConfig(tokenizer=name)).fingerprint
        for name in ("bytes", "bpe:258", "bpe:259")
    }
    assert len(prints) == 3 and len(folders(cache_dir)) == 3


def test_another_separator_is_another_cache(source, tmp_path):
    made = open_text(source, TextConfig(tokenizer="bpe:258")).tokenizer
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(made.to_json()["tokenizer"]))
    name = f"json:{path}"
    ends = [
        open_text(source, TextConfig(tokenizer=name, eos_token=end)).train.separator
        for end in (None, "", "x")
    ]
    assert ends == [0, None, made.encode("x")[0]]


def test_documents_begin_with_the_token_that_is_named(source, tmp_path, cache_dir):
    made = open_text(source, TextConfig(tokenizer="bpe:258")).tokenizer
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(made.to_json()["tokenizer"]))
    name = f"json:{path}"
    plain = open_text(source, TextConfig(tokenizer=name)).train
    corpus = open_text(source, TextConfig(tokenizer=name, bos_token="x"))
    split, start = corpus.train, made.encode("x")[0]
    assert corpus.tokenizer.start == start
    begins = split.document_offsets[:-1]
    assert (split.tokens[begins] == start).all()
    rest = np.delete(np.asarray(split.tokens), begins)
    np.testing.assert_array_equal(rest, plain.tokens)
    assert len(folders(cache_dir)) == 3


def test_the_way_of_packing_shares_the_cache(source, cache_dir):
    open_text(source, TextConfig(seq_len=5, packing="windows"))
    open_text(source, TextConfig(seq_len=7, isolate=False))
    assert len(folders(cache_dir)) == 1


def test_groups_of_documents_change_nothing(source, monkeypatch, tmp_path):
    whole = open_text(source, TextConfig(cache_dir=str(tmp_path / "a")))
    monkeypatch.setattr(cache, "_GROUP", 3)
    parts = open_text(source, TextConfig(cache_dir=str(tmp_path / "b")))
    assert parts.fingerprint == whole.fingerprint


def test_the_boundaries_of_documents_are_part_of_the_fingerprint():
    def fingerprint(*texts):
        made = TextSource("toy", {"t": texts}, lambda: iter(texts), lambda: "x", {})
        return open_text(made, TextConfig()).fingerprint

    assert fingerprint("ab", "c") != fingerprint("a", "bc")


FILES = ["train.bin", "train.offsets.bin", "eval.bin", "eval.offsets.bin"]
FILES += ["tokenizer.json", "index.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_said_and_built_again(source, cache_dir, name, how, capsys):
    whole = open_text(source, TextConfig())
    (folder,) = folders(cache_dir)
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "flip":
        place = len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    again = open_text(source, TextConfig())
    said = capsys.readouterr().err
    assert "is damaged" in said
    assert ("bytes, not" in said) == (how == "cut" and name != "index.json")
    assert source.reads == ["train", "eval"] * 2
    assert again.fingerprint == whole.fingerprint
    assert texts_of(again, again.train) == [text for text in TRAIN if text]
    assert len(folders(cache_dir)) == 1
    # What was mapped before stays readable.
    assert len(texts_of(whole, whole.eval)) == 2


def test_every_flipped_byte_is_seen(source, cache_dir):
    open_text(source, TextConfig())
    (folder,) = folders(cache_dir)
    for path in folder.iterdir():
        data = path.read_bytes()
        for place in range(len(data)):
            flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            path.write_bytes(flipped)
            with pytest.raises(store.Damaged):
                store.open_store(folder, lambda folder, facts: None)
        path.write_bytes(data)
    store.open_store(folder, lambda folder, facts: None)


def test_a_large_file_is_checked_in_samples(source, cache_dir, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 4)
    monkeypatch.setattr(store, "ALL_CHECKED", 8)
    monkeypatch.setattr(store, "SAMPLED", 2)
    open_text(source, TextConfig())
    (folder,) = folders(cache_dir)
    data = bytearray((folder / "train.bin").read_bytes())
    data[0] ^= 1  # the first and the last block are always among them
    (folder / "train.bin").write_bytes(data)
    open_text(source, TextConfig())
    assert source.reads == ["train", "eval"] * 2


def test_an_interrupted_build_leaves_nothing(source, cache_dir):
    def fails():
        yield "text"
        raise KeyboardInterrupt

    broken = TextSource("toy", source.identity, fails, source.eval, {})
    with pytest.raises(KeyboardInterrupt):
        open_text(broken, TextConfig())
    assert folders(cache_dir) == []
    assert open_text(source, TextConfig()).train.num_documents == 4


def test_one_builds_and_the_others_wait(source):
    def slowly():
        time.sleep(0.2)
        return iter(TRAIN)

    counted = source.train
    slow = dataclasses.replace(source, train=lambda: (counted(), slowly())[1])
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: open_text(slow, TextConfig()), range(3)))
    assert source.reads == ["train", "eval"]
    assert len({corpus.fingerprint for corpus in opened}) == 1


def test_a_file_in_the_place_of_the_cache_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write the cache; got .*a file is"):
            open_text(source, TextConfig(cache_dir=str(place)))


def test_a_full_disk_is_refused_and_left_clean(source, cache_dir, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("attnjax.data.folders._flush", full)
    with pytest.raises(UserError, match=r"the disk is full\. Free space"):
        open_text(source, TextConfig())
    assert folders(cache_dir) == []


def test_a_read_only_folder_is_refused(source, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match="it may not be written"):
        open_text(source, TextConfig())


def test_a_split_without_text_is_refused_and_not_cached(cache_dir):
    empty = TextSource("toy", {}, lambda: iter(["a"]), lambda: iter([""]), {})
    with pytest.raises(UserError, match="both splits must hold text; got no text in e"):
        open_text(empty, TextConfig())
    assert folders(cache_dir) == []
