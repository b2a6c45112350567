"""Timing several programs against one another on a machine that others use too.

Programs take turns in short rounds, and what is compared is the ratio within a round:
what slows the machine for a while slows every program of those rounds.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Samples:
    """Times of one program, one entry a round.

    Attributes:
        wall: seconds a call.
        cpu: processor seconds a call, all threads of this process together.
    """

    wall: np.ndarray
    cpu: np.ndarray

    @property
    def median(self) -> float:
        """Median wall seconds a call."""
        return float(np.median(self.wall))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times longer one program takes than another, paired by round.

    Attributes:
        median: median over rounds.
        low, high: bootstrap 95 % interval of that median.
    """

    median: float
    low: float
    high: float


def interleave(
    programs: Mapping[str, Callable[[int], None]], *, rounds: int, calls: int
) -> dict[str, Samples]:
    """Time programs in alternating rounds, each in its turn first.

    Args:
        programs: by name, a function that makes n calls and waits for their results.
        rounds: rounds, each with one sample of every program.
        calls: calls a sample; one more goes before it, untimed, so that the threads
            and caches of the program before it do not count.
    """
    names = list(programs)
    wall = {name: [] for name in names}
    cpu = {name: [] for name in names}
    for program in programs.values():
        program(1)
    for index in range(rounds):
        for place in range(len(names)):
            name = names[(index + place) % len(names)]
            programs[name](1)
            start = time.perf_counter(), time.process_time()
            programs[name](calls)
            wall[name].append((time.perf_counter() - start[0]) / calls)
            cpu[name].append((time.process_time() - start[1]) / calls)
    return {name: Samples(np.array(wall[name]), np.array(cpu[name])) for name in names}


def ratio(
    times: Sequence[float], base: Sequence[float], *, resamples: int = 4000
) -> Ratio:
    """times / base, round by round: the median and its interval.

    Source: Efron, Annals of Statistics 7 (1979): percentile bootstrap of the median.
    """
    pairs = np.asarray(times) / np.asarray(base)
    draws = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    low, high = np.percentile(np.median(pairs[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(pairs)), float(low), float(high))


def load_average() -> float | None:
    """Programs running on this machine over the last minute; None where unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def print_load(load: float | None) -> None:
    """Warn when other programs were running at the start of a measurement."""
    if load is not None and load > 0.5:
        print(
            f"note: {load:.1f} other programs were running at the start; times are "
            "theirs too. Processor time and ratios suffer less."
        )
