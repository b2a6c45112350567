"""Batches of text: a pure function of (seed, step, global batch).

There is no iterator state. Resuming, skipping, and another number of hosts are the
same thing: asking for a step, or for some of its rows.

Every batch is a dict of [B, T] arrays: int32 `tokens`, `targets`, `segment_ids`
(1, 2, ... per row, 0 = padding) and `positions`, float32 `weights` (1 where the
target counts). `packed` cuts shuffled documents into rows, each token once an
epoch; `windows` draws random windows of the concatenated stream, as nanoGPT does.
"""

from collections.abc import Iterator

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data import keyed
from attnjax.data.config import PACKINGS
from attnjax.data.corpus import Split
from attnjax.data.packing import Stream, cut_rows, join_segments, num_rows

Batch = dict[str, np.ndarray]


def batch(
    split: Split,
    *,
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    mode: str = "packed",
    isolate: bool = True,
    rows: slice | None = None,
) -> Batch:
    """The batch of one step, or the part of it that one host needs.

    Args:
        split: where the tokens are.
        seed: any integer; other seeds give other orders.
        step: 0, 1, ...; step s takes rows s B to (s + 1) B of the endless
            sequence of epochs, so a batch may hold the end of one and the start of
            the next.
        batch_size: B, rows of the global batch.
        seq_len: T.
        mode: "packed" or "windows".
        isolate: keep packed documents apart; `windows` always runs through.
        rows: which rows of the global batch to build; None for all.

    Returns: the dict described above, with [len(rows), T] arrays.
    Raises:
        UserError: unknown mode, or a split too short for one window.
    """
    wanted = np.arange(batch_size, dtype=np.int64)[rows or slice(None)]
    if mode == "packed":
        built = _packed(split, seed, step * batch_size + wanted, seq_len)
        return built if isolate else join_segments(built)
    if mode == "windows":
        _require_window(split, seq_len)
        starts = keyed.integers(
            seed,
            keyed.WINDOWS,
            step,
            count=batch_size,
            below=split.num_tokens - seq_len,
        )
        return _windows(split, starts[wanted], seq_len)
    raise _unknown_mode(mode)


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    seq_len: int,
    mode: str = "packed",
    isolate: bool = True,
    rows: slice | None = None,
) -> Iterator[Batch]:
    """Every token of a split once, in stored order and rows that do not overlap.

    `packed` predicts what packed training does; `windows` predicts every token of
    the stream but the first. The last batch is filled with rows of weight 0, so all
    batches have one shape. Arguments, result and errors are those of `batch`.
    """
    if mode not in PACKINGS:
        raise _unknown_mode(mode)
    total = split.num_tokens if mode == "packed" else split.num_tokens - 1
    count = -(-num_rows(total, seq_len) // batch_size)
    stream = Stream.of(split, None)
    for index in range(count):
        wanted = np.arange(batch_size, dtype=np.int64)[rows or slice(None)]
        wanted += index * batch_size
        if mode == "windows":
            yield _windows(split, wanted * seq_len, seq_len)
            continue
        built = cut_rows(split, stream, wanted, seq_len=seq_len)
        yield built if isolate else join_segments(built)


def num_eval_batches(
    split: Split, *, batch_size: int, seq_len: int, mode: str = "packed"
) -> int:
    """How many batches `eval_batches` yields."""
    total = split.num_tokens if mode == "packed" else split.num_tokens - 1
    return -(-num_rows(total, seq_len) // batch_size)


def num_predicted(split: Split, *, mode: str = "packed") -> int:
    """Targets of weight 1 in one pass over a split."""
    if mode == "windows":
        return split.num_tokens - 1
    ends = np.asarray(split.document_offsets[1:]) - 1
    if split.separator is None:
        return split.num_tokens - len(ends)
    already = np.asarray(split.tokens[ends]) == split.separator
    return split.num_tokens - int(already.sum())


def steps_per_epoch(split: Split, *, batch_size: int, seq_len: int) -> float:
    """Steps in which packed training sees every token once."""
    return num_rows(split.num_tokens, seq_len) / batch_size


def _unknown_mode(mode: str) -> UserError:
    return UserError(
        f"data: packing must be one of {', '.join(PACKINGS)}; got packing={mode!r}."
    )


def _require_window(split: Split, seq_len: int) -> None:
    if split.num_tokens <= seq_len:
        raise UserError(
            "data: windows need a split longer than seq_len; got "
            f"{split.num_tokens} tokens in {split.name}, seq_len={seq_len}. "
            "Use a shorter seq_len, more text or data.packing=packed."
        )


def _packed(split: Split, seed: int, ordinals: np.ndarray, seq_len: int) -> Batch:
    """Rows by their ordinal in the endless sequence of epochs."""
    per_epoch = num_rows(split.num_tokens, seq_len)
    epochs, ranks = np.divmod(ordinals, per_epoch)
    whole: Batch = {}
    for epoch in np.unique(epochs) if len(epochs) else [0]:
        stream, order = _epoch(split, seed, int(epoch), per_epoch)
        here = np.flatnonzero(epochs == epoch)
        part = cut_rows(split, stream, order[ranks[here]], seq_len=seq_len)
        if len(here) == len(ordinals):
            return part
        for name, value in part.items():
            if name not in whole:
                whole[name] = np.zeros((len(ordinals), seq_len), value.dtype)
            whole[name][here] = value
    return whole


def _epoch(split: Split, seed: int, epoch: int, per_epoch: int):
    """The order of documents, and of rows, in one epoch."""

    def documents() -> Stream:
        count = split.num_documents
        return Stream.of(split, keyed.permutation(seed, keyed.DOCUMENTS, epoch, count))

    def order() -> np.ndarray:
        return keyed.permutation(seed, keyed.ROWS, epoch, per_epoch)

    stream = split.remember(("documents", seed, epoch), documents)
    return stream, split.remember(("rows", seed, epoch, per_epoch), order)


def _windows(split: Split, starts: np.ndarray, seq_len: int) -> Batch:
    """Windows of the concatenated stream; what lies past its end is padding."""
    running = np.arange(seq_len, dtype=np.int64)
    index = starts[:, None] + np.arange(seq_len + 1)
    last = split.num_tokens - 1
    taken = np.asarray(split.tokens[np.minimum(index, last)], np.int32)
    real = index[:, 1:] <= last
    return {
        "tokens": np.where(real, taken[:, :-1], 0),
        "targets": np.where(real, taken[:, 1:], 0),
        "segment_ids": real.astype(np.int32),
        "positions": np.where(real, running, 0).astype(np.int32),
        "weights": real.astype(np.float32),
    }
