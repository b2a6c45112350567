import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.data import (
    batch,
    eval_batches,
    num_eval_batches,
    num_predicted,
    steps_per_epoch,
)

LENGTHS = (13, 1, 29, 5, 2, 47, 3, 11)
MODES = ["packed", "windows"]


def same(left, right):
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_depends_on_seed_and_step_alone(make_split, mode):
    def ask(split, seed, step):
        return batch(split, seed=seed, step=step, batch_size=3, seq_len=7, mode=mode)

    used = make_split(*LENGTHS)
    for step in (9, 0, 4):
        ask(used, 1, step)
    assert same(ask(used, 1, 5), ask(make_split(*LENGTHS), 1, 5))
    assert not same(ask(used, 1, 5), ask(used, 1, 6))
    assert not same(ask(used, 1, 5), ask(used, 2, 5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_together_hold_the_global_batch(make_split, mode, hosts):
    split = make_split(*LENGTHS)
    fixed = {"seed": 3, "step": 8, "batch_size": 6, "seq_len": 5, "mode": mode}
    whole = batch(split, **fixed)
    share = 6 // hosts
    parts = [
        batch(split, **fixed, rows=slice(host * share, (host + 1) * share))
        for host in range(hosts)
    ]
    joined = {name: np.concatenate([p[name] for p in parts]) for name in whole}
    assert same(whole, joined)


def test_any_slice_of_the_global_batch_can_be_asked_for(make_split):
    split = make_split(*LENGTHS)
    fixed = {"seed": 3, "step": 4, "batch_size": 9, "seq_len": 5}
    whole = batch(split, **fixed)
    for rows in (slice(None, None, -2), slice(4, 4), slice(8, None)):
        part = batch(split, **fixed, rows=rows)
        assert same(part, {name: value[rows] for name, value in whole.items()})


def test_an_epoch_holds_every_token_once(make_split):
    split = make_split(*LENGTHS)
    assert split.num_tokens == 111
    # 16 rows of 7 tokens an epoch; batches of 5 do not divide it.
    got = [batch(split, seed=0, step=s, batch_size=5, seq_len=7) for s in range(16)]
    rows = {name: np.concatenate([b[name] for b in got]) for name in got[0]}
    for epoch in range(5):
        here = slice(16 * epoch, 16 * (epoch + 1))
        seen = rows["tokens"][here][rows["segment_ids"][here] > 0]
        assert sorted(seen) == sorted(split.tokens.tolist())
        assert rows["weights"][here].sum() == num_predicted(split)


def test_epochs_shuffle_documents_and_rows(make_split):
    split = make_split(*LENGTHS)
    first, second = (
        batch(split, seed=0, step=step, batch_size=16, seq_len=7) for step in (0, 1)
    )
    assert {tuple(r) for r in first["tokens"]} != {tuple(r) for r in second["tokens"]}
    # The short last row of the stream does not always come last.
    padded = [
        int(
            np.flatnonzero(
                batch(split, seed=0, step=s, batch_size=16, seq_len=7)["segment_ids"][
                    :, -1
                ]
                == 0
            )[0]
        )
        for s in range(6)
    ]
    assert len(set(padded)) > 1


def test_a_split_shorter_than_a_batch_is_repeated(make_split):
    split = make_split(5, 3)
    got = batch(split, seed=0, step=0, batch_size=7, seq_len=8)
    assert got["weights"].sum() == 7 * num_predicted(split)


def test_windows_are_pieces_of_the_stream_and_shift_targets(make_split):
    split = make_split(*LENGTHS)
    got = batch(split, seed=0, step=3, batch_size=50, seq_len=9, mode="windows")
    text = split.tokens.tolist()
    stream = [tuple(text[i : i + 10]) for i in range(len(text) - 9)]
    for tokens, targets in zip(got["tokens"], got["targets"], strict=True):
        assert (*tokens.tolist(), targets[-1]) in stream
        assert tokens[1:].tolist() == targets[:-1].tolist()
    assert (got["segment_ids"] == 1).all() and (got["weights"] == 1).all()
    assert (got["positions"] == np.arange(9)).all()


def test_windows_start_anywhere_they_fit(make_split):
    split = make_split(12)
    starts = set()
    for step in range(40):
        got = batch(split, seed=0, step=step, batch_size=2, seq_len=9, mode="windows")
        starts.update(got["tokens"][:, 0].tolist())
    # nanoGPT draws from [0, N - T): the last target is the stream's last token.
    assert starts == set(split.tokens[:3].tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("separator", [None, 250])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_evaluation_predicts_every_token_once(make_split, mode, separator, batch_size):
    split = make_split(*LENGTHS, separator=separator, name="eval")
    size = {"batch_size": batch_size, "seq_len": 7, "mode": mode}
    got = list(eval_batches(split, **size))
    assert len(got) == num_eval_batches(split, **size)
    assert {b["tokens"].shape for b in got} == {(batch_size, 7)}
    rows = {name: np.concatenate([b[name] for b in got]) for name in got[0]}
    real = rows["segment_ids"] > 0
    if mode == "windows":
        expected = 110
        assert rows["tokens"][real].tolist() == split.tokens[:-1].tolist()
        assert rows["targets"][real].tolist() == split.tokens[1:].tolist()
    else:
        expected = 111 - 8 if separator is None else 111
        assert rows["tokens"][real].tolist() == split.tokens.tolist()
    assert rows["weights"].sum() == num_predicted(split, mode=mode) == expected
    assert not rows["weights"][~real].any()


def test_hosts_together_hold_the_evaluation(make_split):
    split = make_split(*LENGTHS)
    size = {"batch_size": 4, "seq_len": 7}
    whole = list(eval_batches(split, **size))
    halves = [
        list(eval_batches(split, **size, rows=rows))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    for one, left, right in zip(whole, *halves, strict=True):
        joined = {k: np.concatenate([left[k], right[k]]) for k in one}
        assert same(one, joined)


def test_joined_documents_are_batched_as_one_segment(make_split):
    split = make_split(*LENGTHS)
    fixed = {"batch_size": 5, "seq_len": 7}
    train = batch(split, seed=0, step=0, isolate=False, **fixed)
    evaluation = next(eval_batches(split, isolate=False, **fixed))
    for got in (train, evaluation):
        assert set(got["segment_ids"].ravel()) <= {0, 1}


def test_an_epoch_is_counted_in_steps(make_split):
    assert steps_per_epoch(make_split(10, 11), batch_size=2, seq_len=5) == 2.5


def test_an_unknown_packing_is_refused(make_split):
    message = r"packing must be one of packed, windows; got packing='rows'"
    split = make_split(5)
    with pytest.raises(UserError, match=message):
        batch(split, seed=0, step=0, batch_size=1, seq_len=2, mode="rows")
    with pytest.raises(UserError, match=message):
        next(eval_batches(split, batch_size=1, seq_len=2, mode="rows"))


def test_a_split_too_short_for_a_window_is_refused(make_split):
    message = r"windows need a split longer than seq_len; got 5 tokens in train"
    with pytest.raises(UserError, match=message):
        batch(make_split(5), seed=0, step=0, batch_size=1, seq_len=5, mode="windows")
