import numpy as np

from attnjax.data import keyed


def test_random_words_are_fixed_by_philox_itself():
    # Known answer of Philox-4x64 with 10 rounds, counter 0 and key 0, published
    # with Random123 (kat_vectors); NumPy counts up before its first block, so
    # that block is the one of counter -1.
    counter = np.array([2**64 - 1] * 4, np.uint64)
    words = np.random.Philox(key=np.zeros(2, np.uint64), counter=counter).random_raw(4)
    known = [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert words.tolist() == known


def test_permutation_holds_every_number_once():
    order = keyed.permutation(3, keyed.ROWS, 5, 101)
    assert sorted(order.tolist()) == list(range(101))


def test_streams_differ_by_seed_purpose_and_index():
    streams = {
        tuple(keyed.raw(seed, purpose, index, 4).tolist())
        for seed in (0, 1, -1)
        for purpose in (keyed.DOCUMENTS, keyed.ROWS, keyed.WINDOWS)
        for index in (0, 1, 2)
    }
    assert len(streams) == 27


def test_integers_fill_their_range():
    drawn = keyed.integers(0, keyed.WINDOWS, 9, count=7000, below=7)
    counts = np.bincount(drawn, minlength=7)
    assert drawn.min() == 0 and drawn.max() == 6
    assert counts.min() > 850 and counts.max() < 1150


def test_a_longer_request_starts_with_the_shorter_one():
    long = keyed.raw(11, keyed.WINDOWS, 2, 13)
    assert keyed.raw(11, keyed.WINDOWS, 2, 5).tolist() == long[:5].tolist()


def test_a_row_depends_on_its_ordinal_alone():
    many = keyed.rows(5, keyed.AUGMENT, np.arange(300), 6)
    assert many.shape == (300, 6) and len(np.unique(many)) == 1800
    some = [299, 4, 4, 130, 10**9]
    picked = keyed.rows(5, keyed.AUGMENT, np.array(some), 6)
    assert np.array_equal(picked[:4], many[some[:4]])
    alone = keyed.rows(5, keyed.AUGMENT, np.array([10**9]), 6)
    assert np.array_equal(picked[4:], alone)
    assert keyed.rows(5, keyed.AUGMENT, np.arange(0), 6).shape == (0, 6)
    assert not np.isin(keyed.rows(5, keyed.NOISE, np.arange(300), 6), many).any()


def test_unit_numbers_fill_the_half_open_interval():
    ends = keyed.unit(np.array([0, 2**64 - 1], np.uint64))
    assert ends.tolist() == [0.0, 1 - 2.0**-53]
    drawn = keyed.unit(keyed.rows(0, keyed.NOISE, np.arange(500), 8))
    assert abs(drawn.mean() - 0.5) < 0.02 and abs(drawn.var() - 1 / 12) < 0.005
