"""HeadHunter: which attention heads to perturb, found greedily by an objective.

Source: "Fine-Grained Perturbation Guidance via Attention Head Selection", arXiv
2506.10978, algorithm 1. Differs: the objective is any function of the samples.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.decoding import pictures
from attnjax.decoding.run import LoadedDenoiser
from attnjax.tasks.denoising import perturbing

Pair = tuple[int, int]
# Samples [M, H, W, Ch] and their classes [M] -> a score of each, more is better.
Objective = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search chose, and why.

    Attributes:
        heads: the chosen (layer, head) pairs, best of the first round first.
        rounds: a round: the score of what had been chosen before it together with
            each head of the pool.
    """

    heads: tuple[Pair, ...]
    rounds: tuple[dict[Pair, float], ...]


def search(
    score: Callable[[tuple[Pair, ...]], float],
    pool: Iterable[Pair],
    *,
    per_round: int,
    rounds: int = 1,
    told: Callable[[str], None] = lambda line: None,
) -> Found:
    """Add the `per_round` best heads, each tried beside those chosen before, per round.

    S = {}; repeat: s_e = score(S + {e}) of every e left; S takes the best ones. Equal
    scores go to the first of the pool. Costs a score for each head left in each round.

    Args:
        score: of a set of (layer, head) pairs; more is better.
        pool: the heads to choose from.
        told: is given a line for each round.

    Raises:
        UserError: for a pool that is too small or names a head twice, and scores that
            are not finite.
    """
    pool = tuple(pool)
    if len(set(pool)) < len(pool):
        raise UserError("head_hunter: pool names a head twice. Name each once.")
    if per_round < 1 or rounds < 1 or per_round * rounds > len(pool):
        raise UserError(
            "head_hunter: per_round * rounds must be from 1 to the number of heads in "
            f"the pool; got per_round={per_round}, rounds={rounds}, {len(pool)} heads. "
            "Choose fewer, or widen the pool."
        )
    chosen, tables = (), []
    for number in range(rounds):
        table = {e: float(score((*chosen, e))) for e in pool if e not in chosen}
        bad = [e for e, value in table.items() if not np.isfinite(value)]
        if bad:
            raise UserError(
                f"head_hunter: scores must be finite; got {table[bad[0]]} for layer "
                f"{bad[0][0]}, head {bad[0][1]}. Lower the scale of the guidance."
            )
        best = sorted(table, key=lambda e: -table[e])[:per_round]
        chosen += tuple(best)
        tables.append(table)
        text = perturbing.text_of(best)
        told(f"round {number + 1}/{rounds}: {text}, score {table[best[0]]:.4f}")
    return Found(chosen, tuple(tables))


class Trial:
    """Mean objective of the samples that sets of perturbed heads guide to.

    The same classes and noises for every set, and one compiled program: the set is an
    array. Classifier-free guidance is what the settings say; the paper has none.

    Args:
        denoiser: the loaded run.
        labels: M classes, int.
        objective: of samples and their classes.
        settings: of `LoadedDenoiser.draw`; perturb_scale above 0. perturb_heads gives
            the pool.

    Attributes:
        pool: every (layer, head) pair that may be perturbed.

    Raises:
        UserError: without a perturb_scale, and as `LoadedDenoiser.draw_settings`.
    """

    def __init__(
        self,
        denoiser: LoadedDenoiser,
        labels: Sequence[int],
        objective: Objective,
        **settings: Any,
    ):
        if not settings.get("perturb_scale"):
            raise UserError(
                "head_hunter: perturb_scale must be above 0 in the search; got "
                f"{settings.get('perturb_scale', 0)}. The paper takes 3."
            )
        self.denoiser, self.objective = denoiser, objective
        self.labels = np.asarray(labels, np.int32)
        self.settings = chosen = denoiser.draw_settings(**settings)
        self.perturbation, self.pool = perturbing.choose(
            denoiser.model, target=chosen.perturb, heads=chosen.perturb_heads
        )

    def __call__(self, heads: tuple[Pair, ...]) -> float:
        """The mean score with these heads; none of them: of unguided samples."""
        moved, strength = self.perturbation, self.settings.perturb_strength
        shares = moved.shares(heads, strength) if heads else moved.unmoved()
        run = self.denoiser
        images, _ = pictures.draw_perturbed(
            run.task,
            run.params,
            run.buffers,
            self.labels,
            settings=self.settings,
            perturbation=self.perturbation,
            shares=shares,
        )
        return float(np.mean(self.objective(np.asarray(images), self.labels)))
