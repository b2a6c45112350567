"""What a model without attention knows: entropies of single tokens and of pairs.

All figures are over the targets that count, the same ones as the held-out loss, so
they stand beside it: a model below the bigram entropy of the held-out text itself
has used more than the previous token.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from attnjax.data.corpus import Split

_CHUNK = 1 << 22  # tokens counted at a time
_DENSE = 1 << 24  # pairs counted in a table of this many entries at most
_SAMPLE = 1 << 20  # tokens decoded to measure bytes per token


@dataclasses.dataclass(frozen=True)
class NgramEntropy:
    """Nats per token of a held-out split.

    Attributes:
        unigram: entropy of its own token frequencies: no model that ignores context
            does better.
        bigram: entropy of its own next token given the previous one: the same for
            models that see one token.
        unigram_fitted: cross-entropy under add-one frequencies of the train split.
        bigram_fitted: the same for pairs, add-one within each previous token.
        bytes_per_token: UTF-8 bytes of text per token, None where unknown.
    """

    unigram: float
    bigram: float
    unigram_fitted: float
    bigram_fitted: float
    bytes_per_token: float | None


def ngram_entropy(
    train: Split, held_out: Split, tokenizer: Any, *, mode: str = "packed"
) -> NgramEntropy:
    """All figures of `NgramEntropy`; `mode` is the packing (see `batch`)."""
    size = tokenizer.vocab_size
    train_pairs = _count(train, size, mode)
    pairs = _count(held_out, size, mode)
    return NgramEntropy(
        unigram=_entropy(_targets(pairs, size)),
        bigram=_entropy(pairs[1]) - _entropy(_contexts(pairs, size)),
        unigram_fitted=_fitted_unigram(train_pairs, pairs, size),
        bigram_fitted=_fitted_bigram(train_pairs, pairs, size),
        bytes_per_token=bytes_per_token(held_out, tokenizer),
    )


def unigram_entropy(split: Split, *, vocab_size: int, mode: str = "packed") -> float:
    """Entropy of a split's own target frequencies, nats per token."""
    return _entropy(_targets(_count(split, vocab_size, mode), vocab_size))


def bigram_entropy(split: Split, *, vocab_size: int, mode: str = "packed") -> float:
    """Entropy of a split's targets given the token before, nats per token."""
    pairs = _count(split, vocab_size, mode)
    return _entropy(pairs[1]) - _entropy(_contexts(pairs, vocab_size))


def bytes_per_token(split: Split, tokenizer: Any) -> float | None:
    """UTF-8 bytes of text per text token; separators count as neither.

    Where the split does not know its text, its first tokens are decoded; None if
    the tokenizer only names ids.
    """
    if split.num_bytes is not None:
        separators = 0 if split.separator is None else split.num_documents
        return split.num_bytes / (split.num_tokens - separators)
    if not tokenizer.is_text:
        return None
    ids = np.asarray(split.tokens[: min(_SAMPLE, split.num_tokens)])
    if split.separator is not None:
        ids = ids[ids != split.separator]
    return len(tokenizer.decode(ids).encode("utf-8")) / max(len(ids), 1)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss in bits per byte of text, which tokenizers cannot flatter."""
    return nats_per_token / math.log(2) / bytes_per_token


Counts = tuple[np.ndarray, np.ndarray]  # sorted codes context * V + target, and counts


def _pairs(split: Split, mode: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(contexts, targets) of weight 1, int64, a chunk at a time."""
    ends = np.asarray(split.document_offsets[1:]) - 1
    if mode == "windows":  # the stream has one end
        ends = ends[-1:]
    separator = split.separator if mode == "packed" else None
    for begin in range(0, split.num_tokens, _CHUNK):
        stop = min(begin + _CHUNK, split.num_tokens)
        ids = np.asarray(split.tokens[begin : stop + 1]).astype(np.int64)
        contexts = ids[: stop - begin]
        targets = np.append(ids[1:], -1)[: stop - begin]
        low, high = np.searchsorted(ends, [begin, stop])
        targets[ends[low:high] - begin] = -1 if separator is None else separator
        keep = targets >= 0
        if separator is not None:
            at_end = np.zeros(len(keep), bool)
            at_end[ends[low:high] - begin] = True
            keep &= ~(at_end & (contexts == separator))
        yield contexts[keep], targets[keep]


def _count(split: Split, vocab_size: int, mode: str) -> Counts:
    table = None
    if vocab_size**2 <= _DENSE:
        table = np.zeros(vocab_size**2, np.int64)
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for contexts, targets in _pairs(split, mode):
        here = contexts * vocab_size + targets
        if table is not None:
            table += np.bincount(here, minlength=len(table))
            continue
        found, times = np.unique(here, return_counts=True)
        codes, inverse = np.unique(np.append(codes, found), return_inverse=True)
        merged = np.zeros(len(codes), np.int64)
        np.add.at(merged, inverse, np.append(counts, times))
        counts = merged
    if table is not None:
        codes = np.flatnonzero(table)
        counts = table[codes]
    return codes, counts


def _contexts(pairs: Counts, size: int) -> np.ndarray:
    """[V] how often each token is a context."""
    return np.bincount(pairs[0] // size, weights=pairs[1], minlength=size)


def _targets(pairs: Counts, size: int) -> np.ndarray:
    """[V] how often each token is a target."""
    return np.bincount(pairs[0] % size, weights=pairs[1], minlength=size)


def _entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution that counts give, nats."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    total = seen.sum()
    return float(math.log(total) - (seen * np.log(seen)).sum() / total)


def _fitted_unigram(train: Counts, held_out: Counts, size: int) -> float:
    counts = _targets(train, size)
    logs = np.log(counts + 1.0) - math.log(counts.sum() + size)
    weights = _targets(held_out, size)
    return float(-(weights * logs).sum() / max(weights.sum(), 1))


def _fitted_bigram(train: Counts, held_out: Counts, size: int) -> float:
    codes, counts = train
    places = np.searchsorted(codes, held_out[0])
    inside = np.minimum(places, max(len(codes) - 1, 0))
    known = (places < len(codes)) & (codes[inside] == held_out[0])
    seen = np.where(known, counts[inside], 0)
    context = _contexts(train, size)[held_out[0] // size]
    logs = np.log(seen + 1.0) - np.log(context + size)
    total = held_out[1].sum()
    return float(-(held_out[1] * logs).sum() / max(total, 1))
