"""What a token mixer is told besides its input, and what it gives back.

One `Context` serves every mixer: a mixer reads the fields it needs. Arrays are
pytree leaves; `train`, `causal`, `mask`, `grid`, `extra_tokens`, `hooks`, `rows` and
`sequence_form` are static.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The surroundings of one mixer call.

    Attributes:
        positions: int32 [B, T], the position of each token in its document (or,
            while decoding, in its sequence).
        segment_ids: int32 [B, T] or None. Tokens attend only within equal ids;
            id 0 is padding.
        prefix_len: int32 [B] or None: tokens before it attend to one another both
            ways.
        memory: [B, S, C] or None, what cross-attention attends to.
        memory_segment_ids: int32 [B, S] or None, for `memory`; 0 is padding.
        embeddings: [B, T, C] or None, the token embeddings that entered the stack.
        residual: [B, T, C] or None, the residual stream that the layer's norm has
            made the input from, for mixers with `reads_residual`.
        streams: extra residual streams by name, each [1, T, C], already normalised
            by the block like the mixer's input; entry p stands at position p of a
            document. Empty while decoding: `init_state` is given them.
        carried: by name, what the layers before this one hand on, [B, T] each; see
            `Carried`.
        condition: [B, C] or None, what layers with a modulation are steered by.
        layer_index: int32 scalar, traced: constants that depend on depth are
            computed from it as arrays.
        prng_key: a key for this layer, or None when nothing is random.
        interventions: operand arrays of the static `hooks`, by hook name.
        causal: whether a token may look only at itself and earlier tokens.
        mask: an extra `kernels` mask (static), combined by "and", or None.
        grid: sizes of the 1-3 D grid that T flattens in row-major order, or None.
        extra_tokens: with a grid, how many leading tokens are not of it (a class
            token, registers): T = extra_tokens + prod(grid), and position p >=
            extra_tokens is place p - extra_tokens of the grid. A mixer that takes
            grids and does not declare `Capabilities.extra_tokens` refuses them; one
            that reads T as a sequence sees them as its first tokens.
        train: whether dropout and batch statistics are on.
        hooks: static, hashable probe and intervention records for this layer.
        rows: how arrays [B, ...] lie on the devices, or None on one device; arrays
            [B, T, ...] where they share tokens too.
        sequence_form: None where every device has whole rows; where they share the
            tokens, how attention is computed: "ring" or "all_to_all".
        places: int32 [1, T], the place in the row of each token, where tokens do not
            lie in order (as `kernels.zigzag` lays them); else None.
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None
    prefix_len: jax.Array | None = None
    memory: jax.Array | None = None
    memory_segment_ids: jax.Array | None = None
    embeddings: jax.Array | None = None
    residual: jax.Array | None = None
    streams: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    carried: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    places: jax.Array | None = None
    condition: jax.Array | None = None
    layer_index: jax.Array | int = 0
    prng_key: jax.Array | None = None
    interventions: dict[str, Any] = dataclasses.field(default_factory=dict)
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    mask: Any = dataclasses.field(default=None, metadata={"static": True})
    grid: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    extra_tokens: int = dataclasses.field(default=0, metadata={"static": True})
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    hooks: tuple = dataclasses.field(default=(), metadata={"static": True})
    rows: jax.sharding.NamedSharding | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    sequence_form: str | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def spread(self, x: jax.Array) -> jax.Array:
        """x [B, T, ...] with its rows (and tokens) where those of the batch are.

        Said at every layer, since the compiler otherwise prefers to lay activations
        out like fully sharded weights, and then sums every product over all devices.
        """
        if self.rows is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.rows)

    def replace(self, **changes) -> "Context":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixerOut:
    """What a mixer returns beside y, as values (never through side effects).

    Attributes:
        losses: scalars by name, added to the training loss by the task with the
            weight that the mixer has already applied, and reported as metrics. The
            stack takes the mean over the layers that report one.
        metrics: scalars by name that are reported in the same way and not trained.
        records: arrays by name, asked for by hooks (weights, scores, gates ...) or
            always cheap scalars that are worth a metric.
        streams: by name, what to add to each extra residual stream; one that is
            not named here passes through the mixer like x, as a sequence of its own.
        carried: by name, new values of `Context.carried`; what is not named here is
            handed on as it came.
    """

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    records: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    streams: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    carried: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Carried:
    """A number a token, [B, T], that layers hand on beside the residual stream, in
    float32 or wider: what a mechanism's `carried(config, dims)` declares by name.

    Attributes:
        start: its value in front of the first layer.
        weighs: where features behind the last layer are multiplied by it: "normed"
            behind the final norm, "residual" in front of it, "none"; "auto" is normed
            in models that make one vector of all tokens and none in others, which
            refuse to be asked for it.
    """

    start: float
    weighs: Literal["auto", "normed", "residual", "none"] = "none"


def carried_starts(
    declared: Mapping[str, Carried], shape: tuple[int, int], dtype: Any
) -> dict[str, jax.Array]:
    """What the first layer finds in `Context.carried` for tokens of shape [B, T] and a
    compute dtype."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {name: jnp.full(shape, one.start, wide) for name, one in declared.items()}


@dataclasses.dataclass(frozen=True)
class Hook:
    """A probe or an intervention at some layers: static and hashable.

    Attributes:
        name: the key of its record or of its operands in `Context.interventions`.
        what: what it reads or changes: "scores", "weights", "heads", "input",
            "output", or a name that a mixer documents; or "hidden", the residual
            stream behind the layer.
        layers: absolute layer indices; None means every layer.
        heads: head indices; None means every head.
        action: "record", or the intervention: "scale", "add", "replace"; of "weights"
            also "blend_identity", "blend_uniform" and others, which move them by a
            number of each head (`mixers/slots/blending.py`).
    """

    name: str
    what: str
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    action: str = "record"
