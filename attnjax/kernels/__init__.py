"""Arrays in, arrays out: attention by a static spec. Imports jax and nothing of ours.

Start at `attention` (dispatch.py); what it computes is an `AttentionSpec` (spec.py)
of a mask (masks.py), score steps (scores.py) and a weight map (weight_maps.py).
`linear_attention` (linear/dispatch.py) is the family of recurrences on a state.
"""

from attnjax.kernels.choices import Choice, watching
from attnjax.kernels.dispatch import IMPLEMENTATIONS, attention, choose, explain
from attnjax.kernels.linear.dispatch import (
    LINEAR_IMPLEMENTATIONS,
    empty_linear_state,
    explain_linear,
    linear_attention,
    linear_attention_step,
)
from attnjax.kernels.linear.spec import LinearSpec
from attnjax.kernels.masks import (
    And,
    Causal,
    Coverage,
    Full,
    Mask,
    MaskFn,
    Or,
    Prefix,
    Segments,
    SlidingWindow,
    Span,
    Tile,
)
from attnjax.kernels.operands import Operand
from attnjax.kernels.request import Request, make_request
from attnjax.kernels.scores import ALiBi, Bias, ScoreFn, ScoreStep, SoftCap
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.target import Target, default_target
from attnjax.kernels.weight_maps import Sigmoid, Softmax, WeightMap

__all__ = [
    "IMPLEMENTATIONS",
    "LINEAR_IMPLEMENTATIONS",
    "ALiBi",
    "And",
    "AttentionSpec",
    "Bias",
    "Causal",
    "Choice",
    "Coverage",
    "Full",
    "LinearSpec",
    "Mask",
    "MaskFn",
    "Operand",
    "Or",
    "Prefix",
    "Request",
    "ScoreFn",
    "ScoreStep",
    "Segments",
    "Sigmoid",
    "SlidingWindow",
    "SoftCap",
    "Softmax",
    "Span",
    "Target",
    "Tile",
    "WeightMap",
    "attention",
    "choose",
    "default_target",
    "empty_linear_state",
    "explain",
    "explain_linear",
    "linear_attention",
    "linear_attention_step",
    "make_request",
    "watching",
]
