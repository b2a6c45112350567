import numpy as np
import pytest

from attnjax.data import keyed
from attnjax.data.packing import Stream, cut_rows, join_segments, num_rows


def oracle(split, order, seq_len):
    """All rows of the reordered stream, one token at a time."""
    stream = []  # (id, target, weight, document, place in document)
    offsets = split.document_offsets
    for document in order:
        ids = split.tokens[offsets[document] : offsets[document + 1]].tolist()
        for place, token in enumerate(ids):
            if place + 1 < len(ids):
                target, weight = ids[place + 1], 1.0
            elif split.separator is None:
                target, weight = 0, 0.0
            else:
                target, weight = split.separator, float(token != split.separator)
            stream.append((token, target, weight, document))
    rows = []
    for start in range(0, len(stream), seq_len):
        row, segment, place, before = [], 0, 0, None
        for token, target, weight, document in stream[start : start + seq_len]:
            fresh = document != before
            segment, place = (segment + 1, 0) if fresh else (segment, place + 1)
            before = document
            row.append((token, target, segment, place, weight))
        row += [(0, 0, 0, 0, 0.0)] * (seq_len - len(row))
        rows.append(row)
    names = ("tokens", "targets", "segment_ids", "positions", "weights")
    table = np.array(rows)
    return {name: table[..., i] for i, name in enumerate(names)}


@pytest.mark.parametrize("separator", [None, 250])
@pytest.mark.parametrize("seq_len", [1, 5, 13, 64])
@pytest.mark.parametrize("lengths", [(1,), (31,), (13, 1, 1, 29, 5, 2), (5, 5, 5)])
def test_rows_equal_the_stream_built_token_by_token(
    make_split, lengths, seq_len, separator
):
    split = make_split(*lengths, separator=separator)
    order = keyed.permutation(7, keyed.DOCUMENTS, 0, len(lengths))
    count = num_rows(split.num_tokens, seq_len)
    rows = np.arange(count)
    got = cut_rows(split, Stream.of(split, order), rows, seq_len=seq_len)
    for name, want in oracle(split, order, seq_len).items():
        assert got[name].tolist() == want.tolist(), name


def test_rows_come_in_the_order_asked_for(make_split):
    split = make_split(13, 1, 29, 5)
    stream = Stream.of(split, None)
    whole = cut_rows(split, stream, np.arange(7), seq_len=7)
    some = cut_rows(split, stream, np.array([6, 0, 3, 0]), seq_len=7)
    for name, value in some.items():
        assert value.tolist() == whole[name][[6, 0, 3, 0]].tolist(), name


def test_rows_past_the_end_are_padding(make_split):
    split = make_split(5, 6)
    batch = cut_rows(split, Stream.of(split, None), np.array([2, 3, 99]), seq_len=5)
    assert batch["segment_ids"].tolist() == [[1] + [0] * 4, [0] * 5, [0] * 5]
    assert not batch["tokens"][1:].any() and not batch["weights"][1:].any()


def test_a_separator_already_in_the_text_is_not_predicted_twice(make_split):
    split = make_split(4, 3)
    end = int(split.tokens[3])  # the first document ends in its separator
    tokens = split.tokens.copy()
    split = type(split)(
        tokens=tokens, document_offsets=split.document_offsets, separator=end
    )
    batch = cut_rows(split, Stream.of(split, None), np.array([0]), seq_len=7)
    assert batch["weights"].tolist() == [[1, 1, 1, 0, 1, 1, 1]]
    assert batch["targets"][0, 6] == end


def test_arrays_have_the_promised_types(make_split):
    split = make_split(13, 4)
    batch = cut_rows(split, Stream.of(split, None), np.arange(3), seq_len=5)
    types = {name: value.dtype.name for name, value in batch.items()}
    assert types.pop("weights") == "float32"
    assert set(types.values()) == {"int32"}


def test_joined_documents_share_a_segment_and_keep_their_targets(make_split):
    split = make_split(3, 8)
    apart = cut_rows(split, Stream.of(split, None), np.arange(3), seq_len=5)
    joined = join_segments(apart)
    assert joined["segment_ids"].tolist() == [[1] * 5, [1] * 5, [1, 0, 0, 0, 0]]
    assert joined["positions"].tolist() == [[0, 1, 2, 3, 4]] * 2 + [[0] * 5]
    for name in ("tokens", "targets", "weights"):
        assert joined[name] is apart[name]
