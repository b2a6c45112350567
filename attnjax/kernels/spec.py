"""The static description of one attention computation."""

import dataclasses

from attnjax.kernels.epilogue import EpilogueStep
from attnjax.kernels.masks import Full, Mask
from attnjax.kernels.operands import Operand, merge_declarations
from attnjax.kernels.reweight import Reweight
from attnjax.kernels.scores import ScoreStep
from attnjax.kernels.weight_maps import Softmax, WeightMap

EVERYTHING = Full()
PLAIN_SOFTMAX = Softmax()


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """o = epilogue(reweight(weight_map(score(scale * q.k^T), mask)) v): static and
    hashable.

    Attributes:
        mask: which keys a query sees.
        scale: factor on q.k; None means 1/sqrt(D).
        score: steps applied to the scaled products in order; one step alone may be
            given without a tuple.
        weight_map: how scores become weights.
        return_lse: also return the log of each row's sum [B, T, H] (of exp for
            softmax; the sink's term included), with its gradient, so that results
            over disjoint sets of keys can be merged: see `merge`.
        reweight: what happens to finished rows of weights, which takes a second pass
            over the keys; None for nothing.
        epilogue: steps applied to the output rows in order; one step alone may be
            given without a tuple.
        dropout_rate: only 0. Dropout of weights is not built: say it and be told.
    """

    mask: Mask = EVERYTHING
    scale: float | None = None
    score: tuple[ScoreStep, ...] = ()
    weight_map: WeightMap = PLAIN_SOFTMAX
    return_lse: bool = False
    reweight: Reweight | None = None
    epilogue: tuple[EpilogueStep, ...] = ()
    dropout_rate: float = 0.0

    def __post_init__(self):
        self._check_type("mask", self.mask, Mask)
        self._check_type("weight_map", self.weight_map, WeightMap)
        self._check_steps("score", ScoreStep)
        self._check_steps("epilogue", EpilogueStep)
        if self.reweight is not None:
            self._check_type("reweight", self.reweight, Reweight)
        self._check_order()
        self._check_sum()
        if self.dropout_rate != 0:
            raise NotImplementedError(
                "AttentionSpec: dropout of attention weights is not built (every "
                "implementation would have to repeat one stream of random bits in its "
                f"backward pass); got dropout_rate={self.dropout_rate}. Drop features "
                "of the output instead, outside."
            )
        hash(self)
        merge_declarations([self.operands])

    def _check_steps(self, name: str, wanted: type) -> None:
        if isinstance(getattr(self, name), wanted):
            object.__setattr__(self, name, (getattr(self, name),))
        steps = getattr(self, name)
        if not isinstance(steps, tuple):
            self._check_type(name, steps, wanted)
        for step in steps:
            self._check_type(name, step, wanted)

    def _check_order(self) -> None:
        late = [step for step in self.score[1:] if step.first]
        if late:
            raise ValueError(
                f"AttentionSpec: {type(late[0]).__name__} must be the first score "
                f"step; got score={self.score}."
            )

    def _check_sum(self) -> None:
        if self.return_lse and not self.weight_map.needs_sum:
            raise ValueError(
                "AttentionSpec: return_lse needs a weight map that is normalised by a "
                f"sum; got weight_map={self.weight_map}. Its outputs add up without "
                "one."
            )
        if self.return_lse and self.reweight is not None:
            raise ValueError(
                "AttentionSpec: return_lse has no use with reweight, whose results "
                f"over parts of the keys cannot be merged; got {self.reweight}."
            )

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
        if self.reweight is not None:
            parts.append(self.reweight.operands)
        return merge_declarations([*parts, self.epilogue_operands])

    @property
    def score_operands(self) -> tuple[Operand, ...]:
        """Declarations of the arrays that the score steps need."""
        return merge_declarations([step.operands for step in self.score])

    @property
    def epilogue_operands(self) -> tuple[Operand, ...]:
        """Declarations of the arrays that the epilogue needs."""
        return merge_declarations([step.operands for step in self.epilogue])


# Plain bidirectional softmax attention.
PLAIN = AttentionSpec()
