import collections
import math

import numpy as np
import pytest

from attnjax.data import Split, eval_batches, statistics
from attnjax.data.statistics import (
    bigram_entropy,
    bits_per_byte,
    bytes_per_token,
    ngram_entropy,
    unigram_entropy,
)
from attnjax.data.tokenizers.bytes import ByteTokenizer


def split_of(*texts, separator=None, num_bytes=None):
    ids = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    return Split(
        tokens=np.concatenate(ids),
        document_offsets=np.cumsum([0, *map(len, ids)]),
        separator=separator,
        num_bytes=num_bytes,
    )


def pairs_of(split, mode):
    """The pairs that evaluation scores, from the batches themselves."""
    found = []
    for batch in eval_batches(split, batch_size=2, seq_len=5, mode=mode):
        real = batch["weights"] > 0
        found += zip(batch["tokens"][real], batch["targets"][real], strict=True)
    return [(int(a), int(b)) for a, b in found]


TRAIN = ("abracadabra", "banana", "a cab", "x")
HELD_OUT = ("cabana", "brand", "b")
CASES = [("packed", None), ("packed", 0), ("packed", ord("d")), ("windows", None)]


@pytest.fixture(params=[1 << 22, 4], ids=["one chunk", "chunks of 4"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", request.param)


@pytest.fixture(params=[1 << 24, 0], ids=["dense", "sparse"])
def table(request, monkeypatch):
    monkeypatch.setattr(statistics, "_DENSE", request.param)


@pytest.mark.usefixtures("chunked", "table")
@pytest.mark.parametrize(("mode", "separator"), CASES)
def test_figures_equal_sums_over_the_scored_pairs(mode, separator):
    train, held_out = (split_of(*t, separator=separator) for t in (TRAIN, HELD_OUT))
    pairs = pairs_of(held_out, mode)
    both, after = collections.Counter(pairs), collections.Counter(b for _, b in pairs)
    before = collections.Counter(a for a, _ in pairs)
    seen = pairs_of(train, mode)
    seen_both = collections.Counter(seen)
    seen_after = collections.Counter(b for _, b in seen)
    seen_before = collections.Counter(a for a, _ in seen)
    n = len(pairs)
    own = -sum(math.log(after[b] / n) for _, b in pairs) / n
    own_pairs = -sum(math.log(both[a, b] / before[a]) for a, b in pairs) / n
    fitted = -sum(math.log((seen_after[b] + 1) / (len(seen) + 256)) for _, b in pairs)
    fitted_pairs = -sum(
        math.log((seen_both[a, b] + 1) / (seen_before[a] + 256)) for a, b in pairs
    )
    got = ngram_entropy(train, held_out, ByteTokenizer(), mode=mode)
    assert got.unigram == pytest.approx(own, rel=1e-12)
    assert got.bigram == pytest.approx(own_pairs, rel=1e-12)
    assert got.unigram_fitted == pytest.approx(fitted / n, rel=1e-12)
    assert got.bigram_fitted == pytest.approx(fitted_pairs / n, rel=1e-12)
    alone = {"vocab_size": 256, "mode": mode}
    assert unigram_entropy(held_out, **alone) == got.unigram
    assert bigram_entropy(held_out, **alone) == got.bigram


def test_uniform_text_has_the_entropy_of_its_alphabet():
    split = split_of("abcd" * 500 + "a")
    assert unigram_entropy(split, vocab_size=256) == pytest.approx(math.log(4))
    assert bigram_entropy(split, vocab_size=256) == pytest.approx(0.0, abs=1e-12)


def test_a_byte_is_a_token_of_the_byte_tokenizer():
    split = split_of("häuser", num_bytes=7)
    assert bytes_per_token(split, ByteTokenizer()) == 1.0


def test_separators_are_not_text():
    split = split_of("ab\0", "cde\0", separator=0, num_bytes=20)
    assert bytes_per_token(split, ByteTokenizer()) == 4.0


def test_unknown_text_is_decoded_to_be_measured():
    split = split_of("ab\0", "cde\0", separator=0)
    assert bytes_per_token(split, ByteTokenizer()) == 1.0


def test_ids_without_text_have_no_bytes():
    class Ids:
        vocab_size, is_text = 256, False

    assert bytes_per_token(split_of("abc"), Ids()) is None


def test_bits_per_byte_of_a_fair_coin():
    assert bits_per_byte(math.log(2), 0.25) == pytest.approx(4.0)
