"""Rows of packed documents, cut from a reordered stream that never exists.

Order the documents of a split, lay them end to end, and cut the stream every T
tokens: row r is tokens [rT, rT + T). A row is a few pieces, each from one document.
Only the documents' cumulative lengths in that order are held; the pieces of a row
are found by binary search, and the tokens are gathered from the split in place.
"""

import dataclasses

import numpy as np

from attnjax.data.corpus import Split


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents in some order, laid end to end.

    Attributes:
        starts: [D] where each document begins in the split.
        ends: [D] where each ends in the stream (cumulative lengths).
    """

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, split: Split, order: np.ndarray | None) -> "Stream":
        """The stream of `split`'s documents in `order`, None as they are stored."""
        offsets = np.asarray(split.document_offsets)
        starts, lengths = offsets[:-1], np.diff(offsets)
        if order is not None:
            starts, lengths = starts[order], lengths[order]
        return cls(starts=starts, ends=np.cumsum(lengths))


def num_rows(num_tokens: int, seq_len: int) -> int:
    """Rows of `seq_len` tokens that hold `num_tokens`; the last may be short."""
    return -(-num_tokens // seq_len)


def cut_rows(
    split: Split, stream: Stream, rows: np.ndarray, *, seq_len: int
) -> dict[str, np.ndarray]:
    """The given rows of a stream, with documents isolated.

    Args:
        split: where the tokens are.
        stream: the order of its documents.
        rows: [B] int64 row numbers; numbers past the end give empty rows.
        seq_len: T.

    Returns:
        tokens: [B, T] int32; 0 in padding.
        targets: [B, T] int32: the next token of the same document, which may be the
            first of another row; after a document's last token the separator.
        segment_ids: [B, T] int32: 1, 2, ... per row; 0 in padding.
        positions: [B, T] int32: from 0 at the first token of a document in a row.
        weights: [B, T] float32: 1 where `targets` is to be predicted, 0 in padding
            and where a document ends and there is no separator.

    Cost: O(B T) plus O(B log D) for the binary search.
    """
    total = int(stream.ends[-1])
    begin = np.minimum(rows * seq_len, total)
    end = np.minimum(begin + seq_len, total)
    first = np.searchsorted(stream.ends, begin, side="right")
    last = np.searchsorted(stream.ends, end, side="left")
    counts = np.where(end > begin, last - first + 1, 0)

    # One entry a piece: its row, its document, its span in the stream.
    row = np.repeat(np.arange(len(rows)), counts)
    ordinal = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    document = first[row] + ordinal
    document_end = stream.ends[document]
    document_begin = np.where(document > 0, stream.ends[document - 1], 0)
    piece_begin = np.maximum(begin[row], document_begin)
    piece_end = np.minimum(end[row], document_end)
    lengths = piece_end - piece_begin

    # One entry a token: where it goes in the row-major batch, where it comes from.
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    goes_to = np.repeat(row * seq_len + piece_begin - begin[row], lengths) + within
    start = stream.starts[document] + piece_begin - document_begin
    comes_from = np.repeat(start, lengths) + within
    finishes = np.cumsum(lengths)[piece_end == document_end] - 1

    tokens = np.asarray(split.tokens[comes_from], np.int32)
    after = np.minimum(comes_from + 1, split.num_tokens - 1)
    targets = np.asarray(split.tokens[after], np.int32)
    weights = np.ones(len(targets), np.float32)
    if split.separator is None:
        targets[finishes], weights[finishes] = 0, 0.0
    else:
        targets[finishes] = split.separator
        # A document that already ends in its separator has nothing to predict.
        weights[finishes] = tokens[finishes] != split.separator
    values = {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.repeat(ordinal + 1, lengths).astype(np.int32),
        "positions": within.astype(np.int32),
        "weights": weights,
    }
    return {
        name: _scatter(value, goes_to, (len(rows), seq_len))
        for name, value in values.items()
    }


def _scatter(value: np.ndarray, goes_to: np.ndarray, shape: tuple) -> np.ndarray:
    if len(value) == shape[0] * shape[1]:  # nothing is padding
        return value.reshape(shape)
    flat = np.zeros(shape[0] * shape[1], value.dtype)
    flat[goes_to] = value
    return flat.reshape(shape)


def join_segments(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Let the documents of a row see each other: one segment, running positions.

    Targets and weights stay, so both settings are scored on the same tokens.
    """
    real = batch["segment_ids"] > 0
    running = np.arange(real.shape[1], dtype=np.int32)
    return {
        **batch,
        "segment_ids": real.astype(np.int32),
        "positions": np.where(real, running, 0).astype(np.int32),
    }
