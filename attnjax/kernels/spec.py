"""The static description of one attention computation."""

import dataclasses

from attnjax.kernels.masks import Full, Mask
from attnjax.kernels.operands import Operand, merge_declarations
from attnjax.kernels.scores import ScoreStep
from attnjax.kernels.weight_maps import Softmax, WeightMap

EVERYTHING = Full()
PLAIN_SOFTMAX = Softmax()


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """o = weight_map(score(scale * q.k^T), mask) v: static and hashable.

    Attributes:
        mask: which keys a query sees.
        scale: factor on q.k; None means 1/sqrt(D).
        score: steps applied to the scaled products in order; one step alone may be
            given without a tuple.
        weight_map: how scores become weights.
        return_lse: also return log-sum-exp [B, T, H] of each row (the sink's term
            included), with its gradient, so that results over disjoint sets of keys
            can be merged.
    """

    mask: Mask = EVERYTHING
    scale: float | None = None
    score: tuple[ScoreStep, ...] = ()
    weight_map: WeightMap = PLAIN_SOFTMAX
    return_lse: bool = False

    def __post_init__(self):
        if isinstance(self.score, ScoreStep):
            object.__setattr__(self, "score", (self.score,))
        self._check_type("mask", self.mask, Mask)
        self._check_type("weight_map", self.weight_map, WeightMap)
        if not isinstance(self.score, tuple):
            self._check_type("score", self.score, ScoreStep)
        for step in self.score:
            self._check_type("score", step, ScoreStep)
        if self.return_lse and not self.weight_map.needs_sum:
            raise ValueError(
                "AttentionSpec: return_lse needs a weight map that is normalised by a "
                f"sum; got weight_map={self.weight_map}. Its outputs add up without "
                "one."
            )
        hash(self)
        merge_declarations([self.operands])

    def _check_type(self, name: str, value, wanted: type) -> None:
        if not isinstance(value, wanted):
            raise TypeError(
                f"AttentionSpec: {name} must be a {wanted.__name__}; got "
                f"{name}={value!r}."
            )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Declarations of every array that this spec needs."""
        parts = [self.mask.operands, self.weight_map.operands, self.score_operands]
        return merge_declarations(parts)

    @property
    def score_operands(self) -> tuple[Operand, ...]:
        """Declarations of the arrays that the score steps need."""
        return merge_declarations([step.operands for step in self.score])


# Plain bidirectional softmax attention.
PLAIN = AttentionSpec()
