"""Randomness as a pure function of its key.

Only the raw output of Philox-4x64 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011) is used, because it is fixed by its definition, while NumPy may
change how its `Generator` turns it into permutations and integers.
"""

import numpy as np

_WORD = (1 << 64) - 1

# What a stream of random numbers is for; keeps equal (seed, index) apart.
DOCUMENTS, ROWS, WINDOWS = 1, 2, 3


def raw(seed: int, purpose: int, index: int, count: int) -> np.ndarray:
    """[count] uint64 that depend on (seed, purpose, index) and nothing else."""
    key = np.array([seed & _WORD, purpose], np.uint64)
    # Word 2 of the counter: streams of neighbouring indices are 2^128 apart.
    counter = np.array([0, 0, index, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def permutation(seed: int, purpose: int, index: int, count: int) -> np.ndarray:
    """[count] int64: the numbers below `count` in keyed random order."""
    return np.argsort(raw(seed, purpose, index, count), kind="stable")


def integers(seed: int, purpose: int, index: int, *, count: int, below: int):
    """[count] int64, uniform in [0, below) up to a bias of below / 2^64."""
    return (raw(seed, purpose, index, count) % np.uint64(below)).astype(np.int64)
