"""Formulas that weigh settings before anything is compiled, by hand."""

import dataclasses

import pytest

from attnjax.planning import formulas
from attnjax.planning.formulas import Facts, Split

RATES = {"flops": 1e15, "bandwidth": 4e12, "link": 4e11, "network": 5e10}
FACTS = Facts(
    params=7_000_000, head=1_000_000, tables=2, layers=5, width=512, mlp=2048,
    heads=8, kv_heads=8, vocab=1953, batch=64, seq_len=128, flops=1e12,
    loss_tokens=10**9, state_bytes=84_000_000, item=2, rates=RATES, node=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def without_latency(monkeypatch):
    monkeypatch.setattr(formulas, "_HOP", 0.0)


def _network(facts, *sizes):
    return sum(facts._messages(Split(*sizes, "none", 1)))


def test_fully_sharded_weights_are_gathered_twice_and_their_gradients_scattered():
    # 5 M in layers, forward and backward, and 1 M in the head; then 6 M of gradients.
    sent = 2 * (2 * 5e6 + 1e6) + 2 * 6e6
    assert _network(FACTS, 1, 8, 1) == pytest.approx(sent * 7 / 8 / 4e11)


def test_copies_sum_gradients_and_the_token_table_in_float32():
    sent = 2 * (2 * 6e6 + 4 * 1e6)
    assert _network(FACTS, 4, 1, 1) == pytest.approx(sent * 3 / 4 / 4e11)


def test_a_tied_table_is_head_and_table_at_once():
    tied = dataclasses.replace(FACTS, tables=1, params=6_000_000)
    assert _network(tied, 1, 8, 1) == pytest.approx(_network(FACTS, 1, 8, 1))


def test_groups_of_whole_nodes_share_the_way_between_nodes():
    facts = dataclasses.replace(FACTS, rates=RATES | {"link": 1e12})
    sent = 2 * (2 * 5e6 + 1e6) + 2 * 6e6
    assert _network(facts, 1, 64, 1) == pytest.approx(sent * 7 / 8 / 8 / 5e10)
    # Copies of a sharded model: one member of a group in each of 8 nodes.
    copies = 2 * 2 * 6e6 / 8 * 7 / 8 / 5e10
    added = _network(facts, 8, 8, 1) - _network(facts, 1, 8, 1)
    assert added == pytest.approx(copies)


def test_every_message_to_the_next_device_takes_its_time(monkeypatch):
    before = _network(FACTS, 1, 8, 1), _network(FACTS, 8, 1, 1)
    monkeypatch.setattr(formulas, "_HOP", 1e-3)
    after = _network(FACTS, 1, 8, 1), _network(FACTS, 8, 1, 1)
    assert after[0] - before[0] == pytest.approx(3 * 5 * 7e-3)
    assert after[1] - before[1] == pytest.approx(2 * 7e-3)


def test_a_chip_without_nodes_has_one_interconnect():
    slice_ = dataclasses.replace(FACTS, node=None)
    sent = 2 * (2 * 5e6 + 1e6) + 2 * 6e6
    assert _network(slice_, 1, 64, 1) == pytest.approx(sent * 63 / 64 / 4e11)


def test_shards_micro_batches_and_remat_need_less_memory():
    base = FACTS.memory(Split(8, 1, 1, "none", 1))
    assert FACTS.memory(Split(1, 8, 1, "none", 1)) < base
    assert FACTS.memory(Split(8, 1, 1, "none", 8)) < base
    kept = [FACTS.memory(Split(8, 1, 1, r, 1)) for r in ("none", "dots", "full")]
    assert kept == sorted(kept, reverse=True)


def test_the_logits_count_as_far_as_they_exist_at_one_time():
    # Large enough to outweigh what a layer needs.
    many = dataclasses.replace(FACTS, vocab=100_000)
    few = dataclasses.replace(many, loss_tokens=4000)
    split, tokens = Split(1, 1, 1, "full", 1), 64 * 128
    spared = many.memory(split) - few.memory(split)
    assert spared == pytest.approx((tokens - 4000) * 100_000 * 6)


def test_the_slowest_of_products_memory_and_network_leads():
    split = Split(1, 8, 1, "none", 1)
    slow = dataclasses.replace(FACTS, rates=RATES | {"flops": 1e12})
    products = 3 * 1e12 * 64 / 8 / 1e12
    assert products <= slow.seconds(split) - 0.1 * products < 1.1 * products
