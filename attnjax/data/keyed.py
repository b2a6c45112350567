"""Randomness as a pure function of its key.

Only the raw output of Philox-4x64 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011) is used, because it is fixed by its definition, while NumPy may
change how its `Generator` turns it into permutations and integers.
"""

import numpy as np

_WORD = (1 << 64) - 1

# What a stream of random numbers is for; keeps equal (seed, index) apart.
DOCUMENTS, ROWS, WINDOWS = 1, 2, 3
IMAGES, AUGMENT, HELD_OUT, GLYPHS, NOISE, START = 4, 5, 6, 7, 8, 9
LATENTS, HELD_OUT_LATENTS = 10, 11

_GAP = 64  # rows that are rather drawn and dropped than a stream begun anew


def raw(seed: int, purpose: int, index: int, count: int) -> np.ndarray:
    """[count] uint64 that depend on (seed, purpose, index) and nothing else."""
    key = np.array([seed & _WORD, purpose], np.uint64)
    # Word 2 of the counter: streams of neighbouring indices are 2^128 apart.
    counter = np.array([0, 0, index, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def rows(seed: int, purpose: int, ordinals: np.ndarray, count: int) -> np.ndarray:
    """[n, count] uint64: row i depends on (seed, purpose, ordinals[i], count) alone.

    Rows are neighbouring pieces of one stream, so near ordinals cost one call. This
    stream and those of `raw` share no numbers where their purposes differ.

    Args:
        ordinals: [n] integers in [0, 2^56), in any order.
        count: below 2^8 blocks of four words, or less with smaller ordinals.
    """
    ordinals = np.asarray(ordinals, np.int64)
    blocks = -(-count // 4)
    drawn = np.empty((len(ordinals), count), np.uint64)
    order = np.argsort(ordinals, kind="stable")
    cuts = np.flatnonzero(np.diff(ordinals[order]) > _GAP) + 1
    key = np.array([seed & _WORD, purpose], np.uint64)
    for run in np.split(order, cuts) if len(order) else ():
        first, last = int(ordinals[run[0]]), int(ordinals[run[-1]])
        counter = np.array([first * blocks, 0, 0, 0], np.uint64)
        bits = np.random.Philox(key=key, counter=counter)
        words = bits.random_raw((last - first + 1) * blocks * 4)
        drawn[run] = words.reshape(-1, blocks * 4)[ordinals[run] - first, :count]
    return drawn


def unit(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) of uint64 words, from their upper 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, purpose: int, index: int, count: int) -> np.ndarray:
    """[count] int64: the numbers below `count` in keyed random order."""
    return np.argsort(raw(seed, purpose, index, count), kind="stable")


def integers(seed: int, purpose: int, index: int, *, count: int, below: int):
    """[count] int64, uniform in [0, below) up to a bias of below / 2^64."""
    return (raw(seed, purpose, index, count) % np.uint64(below)).astype(np.int64)
