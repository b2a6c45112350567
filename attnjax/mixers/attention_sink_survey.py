"""Weight maps that leave a row less than all of its weight, against attention sinks.

With z the scaled and masked scores of a row and P = softmax(z):
    off_by_one  exp(z_i) / (1 + sum exp(z))
    sink_logit  exp(z_i) / (exp(s_h) + sum exp(z)), s_h learned, one a head
    clipped     clip((high - low) P_i + low, 0, 1)
    softpick    relu(exp(z_i) - 1) / (sum |exp(z) - 1| + eps)
    sigmoid     sigmoid(z_i + bias)
and a gate of each value by itself, P (sigmoid(G v) * v).

Source: Su et al., "Attention Sink in Transformers: A Survey on Utilization,
Interpretation, and Mitigation", arXiv 2604.10098; formulas of the original works:
Miller, "Attention Is Off By One", 2023; gpt-oss, arXiv 2508.10925; Bondarenko et al.,
arXiv 2306.12929; Zuhri et al., arXiv 2504.20966; Ramapuram et al., arXiv 2409.04431.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax import kernels, nn
from attnjax.core import schema
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities, Decode, MixerDims, MixerSpec
from attnjax.mixers import attention
from attnjax.mixers.slots import base, sizes
from attnjax.mixers.slots.base import Call, Heads


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one weight map.

    Attributes:
        weight_map: "off_by_one", "sink_logit", "clipped", "softpick", "sigmoid", or
            "softmax" (for a value gate alone).
        low: gamma of "clipped", at most 0: a constant of a run, whatever the length
            at hand; the authors take -0.025 for a BERT of 128 tokens and -12 / length
            of the training blocks for an OPT (none: -0.025).
        high: zeta of "clipped", at least 1.
        bias: added to the scores of "sigmoid"; Ramapuram et al. use -log(length).
        value_gate: values are gated by themselves: sigmoid(G v) * v.
        cross: the layer attends to the memory (as an entry of `output`, this is said
            on the layer).
    """

    weight_map: Literal[
        "off_by_one", "sink_logit", "clipped", "softpick", "sigmoid", "softmax"
    ] = "off_by_one"
    low: float | None = None
    high: float = 1.0
    bias: float = 0.0
    value_gate: bool = False
    cross: bool = False

    def __post_init__(self):
        clips = self.low is not None or self.high != 1
        if self.weight_map != "clipped" and clips:
            raise ValueError(
                "low and high go with weight_map=clipped; got "
                f"weight_map={self.weight_map}, low={self.low}, high={self.high}. "
                "Remove them."
            )
        if self.weight_map != "sigmoid" and self.bias != 0:
            raise ValueError(
                "bias goes with weight_map=sigmoid; got "
                f"weight_map={self.weight_map}, bias={self.bias}. Remove it."
            )
        if self.weight_map == "clipped":
            kernels.Clip(low_of(self), self.high)


def low_of(config: Config) -> float:
    """gamma; the authors' for a BERT of 128 tokens where nothing is set."""
    return -0.025 if config.low is None else config.low


def reference(
    scores: jax.Array, visible: jax.Array, config: Config, sink: jax.Array | None = None
) -> jax.Array:
    """Weights of every row, as the formulas read (no care for large scores).

    Args:
        scores: z, [B, H, T, S].
        visible: bool, broadcastable to it; rows must see a key.
        sink: s [H], for "sink_logit".

    Returns:
        [B, H, T, S].
    """
    e = jnp.where(visible, jnp.exp(scores), 0)
    total = e.sum(-1, keepdims=True)
    if config.weight_map == "off_by_one":
        return e / (1 + total)
    if config.weight_map == "sink_logit":
        return e / (jnp.exp(sink)[:, None, None] + total)
    if config.weight_map == "clipped":
        low = low_of(config)
        return jnp.clip((config.high - low) * e / total + low, 0, 1)
    if config.weight_map == "softpick":
        less = jnp.where(visible, jnp.exp(scores) - 1, 0)
        return jnp.maximum(less, 0) / (jnp.abs(less).sum(-1, keepdims=True) + 1e-8)
    if config.weight_map == "sigmoid":
        return jnp.where(visible, jax.nn.sigmoid(scores + config.bias), 0)
    return e / total


class Slot(base.Slot):
    """One weight map, and perhaps a value gate.

    Parameters: `sink` [H] with "sink_logit"; value_gate [E, E] shared by the heads,
    no bias.
    """

    sequence = True

    def __init__(
        self, config: Config, heads: Heads, dims: MixerDims, *, rngs: nnx.Rngs
    ):
        if config.cross:
            raise UserError(
                "attention_sink_survey: as an option of a layer it has no cross of its "
                "own; got cross=true. Set cross=true on the layer."
            )
        self.config = config
        self.hooks = ("value_gate",) if config.value_gate else ()
        self.gives_shares = config.weight_map != "sigmoid"
        stored = dtype_of(dims.param_dtype)
        self.sink = self.value_gate = None
        if config.weight_map == "sink_logit":
            zeros = jax.nn.initializers.zeros
            sink = nn.param(rngs, (heads.num_heads,), zeros, dtype=stored)
            self.sink = nnx.data(sink)
        if config.value_gate:
            self.value_gate = nnx.data(
                nn.Linear(
                    heads.value_dim,
                    heads.value_dim,
                    dtype=dtype_of(dims.dtype),
                    param_dtype=stored,
                    std=dims.init_std,
                    rngs=rngs,
                )
            )

    @staticmethod
    def weight_map_of(config: Config) -> str | None:
        """Everything but softmax takes its place."""
        return None if config.weight_map == "softmax" else config.weight_map

    @staticmethod
    def parameter_count(config: Config, heads: Heads, dims: MixerDims) -> int:
        """One a head for the sink's logit; E x E for the gate."""
        del dims
        count = heads.num_heads * (config.weight_map == "sink_logit")
        return count + heads.value_dim**2 * config.value_gate

    @staticmethod
    def flops(config: Config, heads: Heads, dims: MixerDims, seq_len: int) -> float:
        """One product with the values of each key head."""
        del dims
        gate = 2.0 * seq_len * heads.num_kv_heads * heads.value_dim**2
        return gate * config.value_gate

    def value(self, x: jax.Array, value: jax.Array, call: Call) -> jax.Array:
        """sigmoid(G v) * v: the key's token alone decides."""
        del x
        if self.value_gate is None:
            return value
        scores = jax.nn.sigmoid(self.value_gate(value))
        return value * call.probe("value_gate", scores, head_axis=2)

    def attend(
        self, x: jax.Array, spec: kernels.AttentionSpec, operands: dict, call: Call
    ) -> tuple[kernels.AttentionSpec, dict]:
        """Put the weight map in softmax's place."""
        del x, call
        config = self.config
        if config.weight_map == "softmax":
            return spec, operands
        if config.weight_map == "clipped":
            clip = kernels.Clip(low_of(config), config.high)
            return dataclasses.replace(spec, reweight=clip), operands
        if self.sink is not None:
            operands = operands | {"sink": self.sink[...]}
        weight_map = {
            "off_by_one": kernels.Softmax(sink="off_by_one"),
            "sink_logit": kernels.Softmax(sink="logit"),
            "softpick": kernels.Softpick(),
            "sigmoid": kernels.Sigmoid(config.bias),
        }[config.weight_map]
        return dataclasses.replace(spec, weight_map=weight_map), operands


def preset(config: Config) -> attention.Config:
    """Attention with this weight map."""
    entry = schema.to_json(dataclasses.replace(config, cross=False))
    return attention.Config(
        cross=config.cross, output=({"type": "attention_sink_survey", **entry},)
    )


SPEC = MixerSpec(
    name="attention_sink_survey",
    title="Weight maps against attention sinks",
    family="softmax",
    paper="Attention Sink in Transformers: A Survey on Utilization, Interpretation, "
    "and Mitigation",
    source="arXiv 2604.10098",
    forms=("parallel", "step"),
    capabilities=Capabilities(
        bidirectional=True, cross=True, prefix=True, sequence=True
    ),
    decode=Decode(exact=True),
    **sizes.counts_of(preset),
    limits=(
        "The surveyed gains are of models trained with the map from the start.",
        "For other options of attention (gates, windows, positions, head counts) name "
        "it in the `output` of an attention layer.",
        "Clipped softmax takes a second pass over the keys.",
        "Learned tokens in front of the input (registers, sink and meta tokens) are "
        "config.model.prefix; learned slots of each layer are those of "
        "attention_sink_emergence.",
    ),
    deviations=(
        "Softpick's eps is added to the sum itself; the authors add it to the sum "
        "shifted by the row's maximum.",
        "The value gate is one E x E map for all heads (the survey leaves it open).",
        "Elastic softmax and integral attention are left out: the survey does not "
        "give their formulas.",
    ),
)

# Settings that the conformance suite runs beside the defaults.
VARIANTS = (
    {"weight_map": "sink_logit", "value_gate": True},
    {"weight_map": "clipped", "low": -0.1, "high": 1.05},
    {"weight_map": "softpick"},
    {"weight_map": "sigmoid", "bias": -1.0},
)
