import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data import batch, eval_batches, num_predicted, open_corpus
from attnjax.data.tokenizers import make_tokenizer
from attnjax.data.tokenizers.base import Building
from attnjax.data.tokens import Config

END = 9


def write(folder, name, ids, *, header=False):
    folder.mkdir(exist_ok=True)
    data = np.asarray(ids, "<u2").tobytes()
    if header:
        head = np.zeros(256, "<i4")
        head[:3] = 20240520, 1, len(ids)
        data = head.tobytes() + data
    (folder / name).write_bytes(data)


def open_folder(folder, **options):
    return open_corpus(Config(name="tokens:*.bin", data_dir=str(folder), **options))


@pytest.fixture
def raw(tmp_path):
    """nanoGPT: a separator after every document."""
    folder = tmp_path / "raw"
    write(folder, "train.bin", [1, 2, 3, END, 4, END, 5, 6])
    write(folder, "val.bin", [7, 8, END, 2, END])
    return folder


@pytest.fixture
def llmc(tmp_path):
    """llm.c: a separator before every document, which may cross files."""
    folder = tmp_path / "llmc"
    write(folder, "x_train_000001.bin", [END, 1, 2, END, 3], header=True)
    write(folder, "x_train_000002.bin", [4, 5, END, 6], header=True)
    write(folder, "x_val_000000.bin", [END, 7, 8], header=True)
    return folder


def test_without_separator_a_split_is_one_document(raw):
    corpus = open_folder(raw)
    assert corpus.train.tokens.tolist() == [1, 2, 3, 9, 4, 9, 5, 6]
    assert corpus.train.document_offsets.tolist() == [0, 8]
    assert corpus.eval.tokens.tolist() == [7, 8, 9, 2, 9]
    assert corpus.tokenizer.vocab_size == 10 and corpus.tokenizer.separator is None
    assert corpus.train.num_bytes is None


def test_raw_documents_end_with_the_separator(raw):
    corpus = open_folder(raw, eot_token=END)
    assert corpus.train.document_offsets.tolist() == [0, 4, 6, 8]
    assert corpus.eval.document_offsets.tolist() == [0, 3, 5]
    assert corpus.tokenizer.separator == END
    (got,) = eval_batches(corpus.train, batch_size=1, seq_len=8)
    assert got["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 3, 3]]
    assert got["targets"][0, [2, 4, 7]].tolist() == [END] * 3
    assert got["weights"].tolist() == [[1, 1, 1, 0, 1, 0, 1, 1]]
    assert num_predicted(corpus.train) == 6


def test_llmc_documents_start_with_the_separator_and_cross_files(llmc):
    corpus = open_folder(llmc, eot_token=END)
    assert len(corpus.train.tokens) == 9
    assert corpus.train.document_offsets.tolist() == [0, 3, 7, 9]
    (got,) = eval_batches(corpus.train, batch_size=1, seq_len=9)
    assert got["tokens"].tolist() == [[9, 1, 2, 9, 3, 4, 5, 9, 6]]
    # The end of a document is the separator that starts the next one.
    assert got["targets"].tolist() == [[1, 2, 9, 3, 4, 5, 9, 6, 9]]
    assert got["weights"].all()


@pytest.mark.parametrize("mode", ["packed", "windows"])
def test_batches_come_from_several_files(llmc, mode):
    corpus = open_folder(llmc, eot_token=END)
    got = batch(corpus.train, seed=0, step=0, batch_size=5, seq_len=4, mode=mode)
    assert set(got["tokens"].ravel()) <= set(range(10))


def test_the_separator_may_come_from_the_tokenizer(tmp_path):
    text = "abc abd abe " * 9
    made = make_tokenizer("bpe:260", Building(train=lambda: iter([text])))
    import json

    (tmp_path / "vocabulary.json").write_text(json.dumps(made.to_json()["tokenizer"]))
    ids = made.encode(text).tolist()
    folder = tmp_path / "ids"
    write(folder, "train.bin", [*ids, 0, *ids, 0])
    write(folder, "val.bin", [*ids, 0])
    corpus = open_folder(folder, tokenizer=f"json:{tmp_path / 'vocabulary.json'}")
    assert corpus.train.num_documents == 2
    assert corpus.tokenizer.decode(corpus.eval.tokens[: len(ids)]) == text


def test_held_out_files_can_be_named(raw):
    corpus = open_folder(raw, eval_files="train.bin")
    assert corpus.eval.num_tokens == 8 and corpus.train.num_tokens == 5


def test_the_fingerprint_follows_content_not_place(raw, tmp_path):
    first = open_folder(raw)
    moved = raw.rename(tmp_path / "moved")
    assert open_folder(moved).fingerprint == first.fingerprint
    assert open_folder(moved, eot_token=END).fingerprint != first.fingerprint
    write(moved, "val.bin", [7, 8, 9, 2, 8])
    assert open_folder(moved).fingerprint != first.fingerprint


def test_a_larger_vocabulary_can_be_asked_for(raw):
    assert open_folder(raw, tokenizer="ids:64").tokenizer.vocab_size == 64


def test_a_separator_beyond_the_ids_found_is_counted(raw):
    assert open_folder(raw, eot_token=11).tokenizer.vocab_size == 12


def test_a_tokenizer_that_is_too_small_is_refused(raw):
    message = r"must have every id of the files; .* with 9 ids, largest id 9"
    with pytest.raises(UserError, match=message):
        open_folder(raw, tokenizer="ids:9")


def test_a_tokenizer_that_needs_text_is_refused(raw):
    with pytest.raises(UserError, match="built from text; got token ids"):
        open_folder(raw, tokenizer="chars")


def test_files_of_two_formats_are_refused(raw):
    write(raw, "more.bin", [1, 2], header=True)
    with pytest.raises(UserError, match="files must be of one format"):
        open_folder(raw)


@pytest.mark.parametrize(
    ("kept", "message"), [("train", "to be held out"), ("val", "to be trained on")]
)
def test_a_split_without_files_is_refused(raw, kept, message):
    for path in raw.iterdir():
        if kept not in path.name:
            path.unlink()
    with pytest.raises(UserError, match=f"got none {message}"):
        open_folder(raw)


def test_no_match_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokens: the pattern must name files"):
        open_folder(tmp_path)
