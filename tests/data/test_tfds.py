import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnjax.core.errors import UserError
from attnjax.data import open_corpus
from attnjax.data.tfds import Config, library, open_source

pytest.importorskip("tensorflow_datasets")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "tfds"
TEXTS = {"train": ["one", "zwölf", "three"], "validation": ["four"], "test": ["five"]}


@pytest.fixture
def folder(tmp_path, write_data_set):
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    pairs = {s: [{"text": t} for t in texts] for s, texts in TEXTS.items()}
    write_data_set(tmp_path, "toy", {"text": text()}, pairs)
    pair = {"de": b"eins", "en": b"one"}
    write_data_set(
        tmp_path, "pairs", {"de": text(), "en": text()}, {"train": [pair], "a": [pair]}
    )
    number = {"label": tfds.features.ClassLabel(num_classes=3)}
    write_data_set(
        tmp_path, "numbers", number, {"train": [{"label": 1}], "test": [{"label": 2}]}
    )
    return tmp_path


def documents(folder, name="tfds:toy", **options):
    source = open_source(Config(name=name, data_dir=str(folder), **options))
    return list(source.train()), list(source.eval())


def test_examples_are_documents(folder):
    assert documents(folder) == (TEXTS["train"], TEXTS["validation"])


def test_splits_are_tfds_expressions(folder):
    got = documents(folder, train_split="train[1:]", eval_split="validation+test")
    assert got == (["zwölf", "three"], ["four", "five"])
    assert documents(folder, eval_split="test")[1] == ["five"]
    got = documents(folder, train_split="train[:2]", eval_split="train[2:]")
    assert got == (["one", "zwölf"], ["three"])


def test_the_folder_of_a_version_can_be_given(folder):
    assert documents(folder / "toy" / "1.0.0")[0] == TEXTS["train"]


def test_the_text_is_found_or_named(folder):
    named = documents(folder, "tfds:pairs", text_field="de", eval_split="a")
    assert named == (["eins"], ["eins"])
    with pytest.raises(UserError, match=r"one feature must be the text; got de, en in"):
        documents(folder, "tfds:pairs", eval_split="a")
    with pytest.raises(UserError, match=r"unknown text_field 'ed'\. .*Known: de, en"):
        documents(folder, "tfds:pairs", text_field="ed", eval_split="a")
    with pytest.raises(UserError, match=r"must have a text feature; .*with label\."):
        documents(folder, "tfds:numbers")


def test_many_examples_are_read_in_groups(folder, monkeypatch):
    monkeypatch.setattr("attnjax.data.tfds._GROUP", 2)
    assert documents(folder)[0] == TEXTS["train"]


def test_a_corpus_opens_and_tells_its_splits(folder):
    corpus = open_corpus(Config(name="tfds:toy", data_dir=str(folder)))
    assert corpus.train.num_documents == 3
    assert corpus.provenance["dataset"] == "toy/1.0.0"
    assert corpus.provenance["eval_split"] == "validation"


def test_tensorflow_is_not_imported(folder):
    program = (
        "import sys\n"
        "from attnjax.data import open_corpus, config_class\n"
        "config = config_class('tfds:toy')(name='tfds:toy', data_dir=sys.argv[1])\n"
        "print(open_corpus(config).train.num_tokens)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ATTNJAX_CACHE": str(folder / "other_cache")},
    )
    assert (done.returncode, done.stdout) == (0, "14\n"), done.stderr


def test_a_data_set_that_is_not_prepared_says_how(tmp_path):
    message = (
        r"must be prepared once; got name='tfds:tiny_shakespeare', nothing in .*"
        r"pip install 'attnjax\[tfds-prepare\]' && python -c .*'tiny_shakespeare', "
        r"data_dir='.*', file_format='array_record'\)\.download_and_prepare\(\)"
    )
    with pytest.raises(UserError, match=message):
        documents(tmp_path, "tfds:tiny_shakespeare")


def test_an_unknown_data_set_names_the_nearest(folder):
    with pytest.raises(UserError, match=r"unknown data set 'toyy'.*mean toy\?"):
        documents(folder, "tfds:toyy")
    with pytest.raises(UserError, match="Did you mean tiny_shakespeare"):
        documents(folder, "tfds:tiny_shakespear")


def test_a_name_tfds_does_not_understand_is_refused(folder):
    with pytest.raises(UserError, match=r"a name that TFDS understands .*\.\./x y"):
        documents(folder, "tfds:../x y")


def test_the_folder_of_another_data_set_is_refused(folder):
    message = r"must hold the data set named; got .* with 'toy', name='tfds:pairs'"
    with pytest.raises(UserError, match=message):
        documents(folder / "toy" / "1.0.0", "tfds:pairs")


def test_another_file_format_is_refused(folder):
    info = folder / "toy" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    message = r"prepared as array_record to be read without TensorFlow; got toy as tfre"
    with pytest.raises(UserError, match=message):
        documents(folder)


def test_an_unknown_split_is_refused(folder):
    message = r"must name examples .* got 'tset': .* Splits of toy: train, validation"
    with pytest.raises(UserError, match=message):
        documents(folder, eval_split="tset")


def test_an_empty_split_is_refused(folder):
    with pytest.raises(UserError, match=r"must name examples .* got 'train\[3:\]'"):
        documents(folder, eval_split="train[3:]")


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train", "train"), ("train[:2]", "train[1:]"), ("train+test", "validation+test")],
)
def test_training_on_what_is_held_out_is_refused(folder, train, held_out):
    with pytest.raises(UserError, match="must not be both trained on and held out"):
        documents(folder, train_split=train, eval_split=held_out)


def test_a_data_set_with_nothing_to_hold_out_is_refused(folder):
    with pytest.raises(UserError, match="something must be held out"):
        documents(folder, "tfds:pairs", text_field="de")


def test_text_that_is_not_utf_8_is_refused(tmp_path, write_data_set):
    import tensorflow_datasets as tfds

    bad = [{"text": b"ok"}, {"text": b"caf\xe9"}]
    splits = {"train": bad, "test": bad[:1]}
    write_data_set(tmp_path, "toy", {"text": tfds.features.Text()}, splits)
    message = r"must be UTF-8; got field 'text' of example 1: .*at byte 3"
    with pytest.raises(UserError, match=message):
        documents(tmp_path)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets array-record"):
        library()


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
def test_tiny_shakespeare_is_nanogpts():
    config = Config(
        name="tfds:tiny_shakespeare",
        data_dir=str(SHARED),
        eval_split="validation+test",
        tokenizer="chars",
        packing="windows",
    )
    corpus = open_corpus(config)
    assert corpus.tokenizer.vocab_size == 65
    assert corpus.train.num_tokens == 1_003_854
    assert corpus.eval.num_tokens == 111_540
    text = corpus.tokenizer.decode(corpus.train.tokens[:27])
    assert text == "First Citizen:\nBefore we pr"
