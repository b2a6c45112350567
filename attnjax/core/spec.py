"""What a mechanism declares about itself, and what the model tells a mixer."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a mixer can do. The conformance suite tests what is declared and that
    the rest is refused with a clear error.

    Attributes:
        causal: as a causal mixer (token t sees tokens up to t).
        bidirectional: with `ctx.causal=False`.
        cross: with `ctx.memory`.
        decode: has `init_state` and `step`.
        grid: the grid ranks it accepts (1, 2, 3), empty if it needs no grid.
        needs_grid: refuses a plain sequence.
        extra_tokens: with a grid, honours `ctx.extra_tokens`; without it the mixer
            must be given exactly the grid.
        segments: honours `ctx.segment_ids` (packed documents, padding).
        prefix: honours `ctx.prefix_len`.
        sequence: honours `ctx.sequence_form` and `ctx.places`: in the full pass tokens
            meet in `kernels.attention` alone, so devices may share them, in any order.
        sequence_in_order: devices may share tokens that lie in order, one piece of a
            row each: of the forms, "all_to_all" alone.
    """

    causal: bool = True
    bidirectional: bool = False
    cross: bool = False
    decode: bool = True
    grid: tuple[int, ...] = ()
    needs_grid: bool = False
    extra_tokens: bool = False
    segments: bool = True
    prefix: bool = False
    sequence: bool = False
    sequence_in_order: bool = False


@dataclasses.dataclass(frozen=True)
class Decode:
    """How decoding relates to the full forward pass.

    Attributes:
        exact: decoding in any cuts equals the full pass, with `options` set.
        options: config values under which it is exact (empty: the defaults).
        reason: why it differs under other options, for people.
    """

    exact: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    reason: str = ""


# Of a mechanism that sees a whole grid of 1 to 3 axes at once, and tokens in front.
ON_GRID = Capabilities(
    causal=False,
    bidirectional=True,
    decode=False,
    grid=(1, 2, 3),
    needs_grid=True,
    extra_tokens=True,
    segments=False,
)
SEES_BOTH_WAYS = Decode(exact=False, reason="sees both ways")


def no_state(config: Any, dims: "MixerDims", max_len: int) -> int:
    """The state size of a mechanism that does not decode."""
    del config, dims, max_len
    return 0


@dataclasses.dataclass(frozen=True)
class MixerSpec:
    """The catalog entry of a mechanism.

    Attributes:
        name: the catalog name; equals the file's name.
        title: the mechanism's name in words.
        family: "softmax", "linear", "sparse", "gating", "vision", ...
        paper: title of the paper, "" for textbook mechanisms.
        source: arXiv id or other reference.
        forms: names of the implemented forms, e.g. ("parallel", "recurrent").
        capabilities: what it can do.
        decode: how decoding relates to the full pass.
        limits: what it cannot do or where it loses, one sentence each.
        deviations: where we differ from the paper or the authors' code.
        lacks: (config) -> {name of a capability: why}, those that settings take away,
            in the words of the options; None when they take none.
        parameter_count: (config, dims) -> number of parameters of one layer.
        state_size: (config, dims, max_len) -> elements of the decode state of one
            layer for one sequence.
        flops: (config, dims, seq_len) -> forward multiply-add FLOPs (2 a MAC) of
            one layer for one sequence of seq_len tokens, projections included.
    """

    name: str
    title: str
    family: str
    paper: str
    source: str
    forms: tuple[str, ...]
    capabilities: Capabilities
    decode: Decode
    parameter_count: Callable[[Any, "MixerDims"], int]
    state_size: Callable[[Any, "MixerDims", int], int]
    flops: Callable[[Any, "MixerDims", int], float]
    limits: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    lacks: Callable[[Any], dict[str, str]] | None = None

    def of(self, config) -> "MixerSpec":
        """The entry of a mechanism with these settings: less what they take away."""
        if self.lacks is None:
            return self
        gone = dict.fromkeys(self.lacks(config), False)
        can = dataclasses.replace(self.capabilities, **gone)
        return dataclasses.replace(self, capabilities=can)


@dataclasses.dataclass(frozen=True)
class MixerDims:
    """What the model tells each of its mixers. Static and hashable.

    Attributes:
        embed_dim: C.
        num_heads: H.
        num_kv_heads: K (H for plain multi-head attention).
        head_dim: D.
        num_layers: depth of the whole model.
        max_len: longest sequence the model is configured for, tokens; those that it
            puts in front included.
        prefix_tokens: learned tokens that the model puts in front of every row. They
            stand at the first positions of its documents; windows keep seeing them.
        grid: sizes of the grid that the model's tokens lie on, behind its
            prefix_tokens; None for sequences.
        rope: the model's rotary settings (an `nn.Rope`; on a grid an
            `nn.AxialRope`), or None.
        norm: name of the norm class of the model ("rms" or "layer").
        norm_eps: its epsilon.
        zero_centered_norm: whether scales of norms are stored less 1.
        use_bias: whether linear maps have biases.
        init_std: standard deviation of weight initialisation.
        out_init_std: the same for maps that write to the residual stream.
        dropout: dropout rate in [0, 1) on the mixer's output.
        dtype: compute dtype name.
        param_dtype: storage dtype name.
        kernel: `implementation` for kernels.attention.
        target: a `kernels.Target`, or None for the default backend.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int = 1
    max_len: int = 1024
    prefix_tokens: int = 0
    grid: tuple[int, ...] | None = None
    rope: Any = None
    qk_norm: bool = False
    norm: str = "rms"
    norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    use_bias: bool = False
    init_std: float = 0.02
    out_init_std: float = 0.02
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    kernel: str = "auto"
    target: Any = None
