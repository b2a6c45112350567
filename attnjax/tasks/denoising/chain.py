"""Gaussian chains: noise schedules, their tables in float64, and respaced chains."""

import dataclasses
import itertools

import numpy as np

# Ho et al. (arXiv 2006.11239, section 4), for 1000 steps.
FIRST_BETA, LAST_BETA, BETA_STEPS = 1e-4, 0.02, 1000
# Nichol and Dhariwal (arXiv 2102.09672, equation 17).
COSINE_OFFSET, LARGEST_BETA = 0.008, 0.999


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The tables of x_0 -> x_1 -> ... over K steps, numpy [K]; step 0 is the first.

    With a_k = `alpha_bar`, b_k = `beta`, and a_{-1} = 1:
    q(x_k | x_0) = N(sqrt(a_k) x_0, 1 - a_k), and q(x_{k-1} | x_k, x_0) has the mean
    data_weight x_0 + noised_weight x_k and the variance b_k (1 - a_{k-1}) / (1 - a_k).
    Source: Ho et al., arXiv 2006.11239, equations 4 to 7.

    Attributes:
        times: int32, the time of each step in the chain that was trained.
        alpha_bar, alpha_bar_before, beta, data_weight, noised_weight: float64.
        log_beta: log b_k.
        posterior_log_variance: log of the posterior's variance. That of step 0 is zero
            and stands in for step 1's (Nichol and Dhariwal, arXiv 2102.09672).
    """

    times: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_before: np.ndarray
    beta: np.ndarray
    data_weight: np.ndarray
    noised_weight: np.ndarray
    log_beta: np.ndarray
    posterior_log_variance: np.ndarray

    def __len__(self):
        """Number of steps."""
        return len(self.times)


def betas(schedule: str, steps: int) -> np.ndarray:
    """float64 [steps], the variance that each step adds.

    linear: 1e-4 to 0.02 for 1000 steps, scaled by 1000/steps for another number.
    cosine: alpha_bar(u) = cos((u + s) / (1 + s) pi / 2)^2, s = 0.008, betas <= 0.999.
    Source: Nichol and Dhariwal, arXiv 2102.09672, section 3.2, and their code.

    Raises:
        ValueError: for a linear schedule of so few steps that a beta reaches 1.
    """
    if schedule == "cosine":
        share = np.arange(steps + 1, dtype=np.float64) / steps
        angle = (share + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2
        kept = np.cos(angle) ** 2
        return np.minimum(1 - kept[1:] / kept[:-1], LARGEST_BETA)
    scale = BETA_STEPS / steps
    if scale * LAST_BETA >= 1:
        raise ValueError(
            f"steps must be more than {round(LAST_BETA * BETA_STEPS)} for the linear "
            f"schedule, whose betas grow as {BETA_STEPS}/steps; got steps={steps}. "
            "Take schedule=cosine."
        )
    return np.linspace(scale * FIRST_BETA, scale * LAST_BETA, steps, dtype=np.float64)


def chain(beta: np.ndarray, times: np.ndarray | None = None) -> Chain:
    """The tables of a chain from its betas [K], K >= 2; `times` default to 0..K-1."""
    kept = np.cumprod(1 - beta)
    before = np.append(1.0, kept[:-1])
    variance = beta * (1 - before) / (1 - kept)
    return Chain(
        times=np.arange(len(beta), dtype=np.int32) if times is None else times,
        alpha_bar=kept,
        alpha_bar_before=before,
        beta=beta,
        data_weight=beta * np.sqrt(before) / (1 - kept),
        noised_weight=(1 - before) * np.sqrt(1 - beta) / (1 - kept),
        log_beta=np.log(beta),
        posterior_log_variance=np.log(np.append(variance[1], variance[1:])),
    )


def spaced_times(steps: int, num_steps: int) -> np.ndarray:
    """int32 [num_steps] of 0..steps-1, evenly spread, the first and the last included.

    Positions are running sums of the stride, rounded to the nearest (halves to even),
    as in the code of Nichol and Dhariwal that DiT samples with.
    """
    stride = (steps - 1) / (num_steps - 1)
    places = itertools.accumulate(itertools.repeat(stride, num_steps - 1), initial=0.0)
    return np.array([round(place) for place in places], np.int32)


def respaced(full: Chain, num_steps: int) -> Chain:
    """The chain over `num_steps` of the times of `full`, with the same alpha_bar there.

    Its betas are 1 - a_k / a_{k-1} over the times that are kept, and its posterior is
    that of the longer steps (Nichol and Dhariwal, arXiv 2102.09672, section 4).
    """
    if num_steps == len(full):
        return full
    times = spaced_times(len(full), num_steps)
    kept = full.alpha_bar[times]
    return chain(1 - kept / np.append(1.0, kept[:-1]), times)
