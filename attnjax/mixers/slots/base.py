"""What a mechanism implements to become an option of a slot of `Attention`.

A mechanism's file exports `Slot`, a subclass of the class below, built from the
file's own `Config`. Attention lists options as `output=({"type": NAME, ...}, ...)`
and calls their hooks in that order; a hook that is not overridden is the identity.
"""

import dataclasses

import jax
from flax import nnx

from attnjax.core.context import Context, Hook, MixerOut
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.kernels import AttentionSpec
from attnjax.mixers.slots import probes


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes of the heads at one place of an attention layer.

    Attributes:
        num_heads: H, query heads.
        num_kv_heads: K, key/value heads.
        head_dim: D.
        value_dim: E.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


_READ = "read by a slot: "  # In front of the names of hooks of the layer's own.


class Call:
    """One call of a mixer: what slots read, and where they leave what they report.

    Made inside the call and gone with it: losses and records leave as values.

    Attributes:
        ctx: the surroundings; with the hooks that record what slots read.
        is_step: whether this is a decoding step.
        losses: weighted scalars by name.
        metrics: scalars by name that are reported and not trained.
        records: arrays by name.
        carried: what the layer hands on instead of `ctx.carried`, by name.
        notes: what a slot keeps for its later hooks in this call, by its `id`.
    """

    def __init__(
        self, ctx: Context, *, is_step: bool = False, reads: tuple[str, ...] = ()
    ):
        own = tuple(Hook(_READ + what, what) for what in reads)
        self.ctx = ctx.replace(hooks=(*ctx.hooks, *own)) if own else ctx
        self.is_step = is_step
        self.losses: dict[str, jax.Array] = {}
        self.metrics: dict[str, jax.Array] = {}
        self.records: dict[str, jax.Array] = {}
        self.carried: dict[str, jax.Array] = {}
        self.notes: dict[int, jax.Array] = {}

    def intervene(
        self, what: str, array: jax.Array, *, head_axis=None, rows=None
    ) -> jax.Array:
        """`array` after the interventions on `what`; `rows`: see `probes.intervene`."""
        return probes.intervene(self.ctx, what, array, head_axis=head_axis, rows=rows)

    def record(self, what: str, array: jax.Array, *, head_axis=None) -> None:
        """Keep `array` for the hooks that read `what`."""
        self.records |= probes.records(self.ctx, what, array, head_axis=head_axis)

    def probe(
        self, what: str, array: jax.Array, *, head_axis=None, rows=None
    ) -> jax.Array:
        """Intervene, then record; returns the array to go on with."""
        array = self.intervene(what, array, head_axis=head_axis, rows=rows)
        self.record(what, array, head_axis=head_axis)
        return array

    def read(self, what: str) -> jax.Array:
        """What the layer recorded of `what`, of those that `Slot.reads` names.

        Raises:
            UserError: in a mixer that did not ask its options what they read.
        """
        if _READ + what not in self.records:
            raise UserError(
                f"attention: an option of output reads the layer's {what}, which this "
                "mixer does not give it. Leave the option out of this layer."
            )
        return self.records[_READ + what]

    def out(self) -> MixerOut:
        """What the mixer returns beside y."""
        asked = {k: v for k, v in self.records.items() if not k.startswith(_READ)}
        return MixerOut(
            losses=self.losses,
            metrics=self.metrics,
            records=asked,
            carried=self.carried,
        )


class Slot(nnx.Module):
    """An option of a slot of `Attention`.

    Args of the constructor: the file's `Config`, the `Heads` before it, the model's
    `MixerDims`, and `rngs`. In every hook `x` is the mixer's input [B, T, C] (after
    the block's norm); for keys and values it is what they are made from (the memory
    in cross-attention). Keys and values are cached after the hooks.
    """

    # Names that `Hook.what` may use to read or change what this slot computes.
    hooks: tuple[str, ...] = ()
    # Whether a row of weights is still divided by its sum, or by more.
    gives_shares: bool = True
    # Whether `enter` changes the layer's input.
    enters: bool = False
    # Whether tokens meet in the kernel alone, so that devices may share them, in any
    # order (`Capabilities.sequence`).
    sequence: bool = False

    @staticmethod
    def heads_after(config, heads: Heads) -> Heads:
        """Sizes of the heads that `heads` returns, for the options after it."""
        del config
        return heads

    @staticmethod
    def weight_map_of(config) -> str | None:
        """Its name if `attend` puts another weight map in softmax's place: a layer
        has one weight map, so two are refused."""
        del config
        return None

    @staticmethod
    def parameter_count(config, heads: Heads, dims: MixerDims) -> int:
        """Number of parameters of this slot."""
        raise NotImplementedError

    @staticmethod
    def flops(config, heads: Heads, dims: MixerDims, seq_len: int) -> float:
        """FLOPs of matrix products of this slot for one sequence."""
        raise NotImplementedError

    def reads(self, ctx: Context) -> tuple[str, ...]:
        """What of the layer's own hooks ("weights", ...) `heads` and `output` read by
        `call.read`. With scores or weights the layer computes all of them, [B, H, T,
        S], instead of calling a kernel."""
        del ctx
        return ()

    def enter(self, x: jax.Array, call: Call) -> jax.Array:
        """The layer's input [B, T, C] as the block has it before its norm, changed for
        all that this layer makes of it. In parts of a layer it is normed already, and
        a decoding step does not enter."""
        del call
        return x

    def query(self, x: jax.Array, query: jax.Array, call: Call) -> jax.Array:
        """[B, T, H, D] as projected, before norm and positions."""
        del x, call
        return query

    def key(self, x: jax.Array, key: jax.Array, call: Call) -> jax.Array:
        """[B, S, K, D] as projected, before norm and positions."""
        del x, call
        return key

    def value(self, x: jax.Array, value: jax.Array, call: Call) -> jax.Array:
        """[B, S, K, E] as projected."""
        del x, call
        return value

    def attend(
        self, x: jax.Array, spec: AttentionSpec, operands: dict, call: Call
    ) -> tuple[AttentionSpec, dict]:
        """Change what the kernel computes: scores, weight map, mask, and the arrays
        that they need."""
        del x, call
        return spec, operands

    def heads(self, x: jax.Array, heads: jax.Array, call: Call) -> jax.Array:
        """[B, T, H, E], before the heads are joined and projected."""
        del x, call
        return heads

    def output(self, x: jax.Array, y: jax.Array, call: Call) -> jax.Array:
        """[B, T, C], after the output projection."""
        del x, call
        return y
