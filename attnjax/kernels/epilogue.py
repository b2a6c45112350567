"""What happens to finished output rows inside the kernel: gates, scales, norms.

An epilogue step is static and hashable; a spec holds a tuple of steps, applied in
order to o = weights v. `apply(o, arrays)` works on the last axis E alone and
otherwise elementwise: o is any block [..., E] of rows, and the step's operands come
cut so that they broadcast against it ([B, T, H, E] with 1 in the axes they lack, or
one head's [t, E], [t, 1], [1, E] and [1, 1]). Gradients are those of `jax.vjp` of
`apply`, from the rows before it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from attnjax.kernels.operands import Operand

OUTPUT_AXES = "bthe"
Arrays = Mapping[str, jax.Array]


class EpilogueStep:
    """Base of all epilogue steps."""

    # The arrays that the step needs; axes among b, t, h, e.
    operands: tuple[Operand, ...] = ()

    def apply(self, o: jax.Array, arrays: Arrays) -> jax.Array:
        """New rows, same shape and dtype as `o`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class OutputGate(EpilogueStep):
    """o * sigmoid(gate), or o * gate (arXiv 2505.06708, position G1).

    Operand: `output_gate` float, [B, T, H, E] with per="element", [B, T, H] with
    per="head"; with gradient.

    Attributes:
        per: "element" or "head".
        activation: "sigmoid", or "none" for a gate that is ready to multiply.
    """

    per: str = "element"
    activation: str = "sigmoid"

    def __post_init__(self):
        for name, known in (
            ("per", ("element", "head")),
            ("activation", ("sigmoid", "none")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"OutputGate: {name} must be {known[0]!r} or {known[1]!r}; got "
                    f"{name}={value!r}."
                )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The gate."""
        axes = "bthe" if self.per == "element" else "bth"
        return (Operand("output_gate", axes, "float", trains=True),)

    def apply(self, o: jax.Array, arrays: Arrays) -> jax.Array:
        """o * activation(gate)."""
        gate = arrays["output_gate"].astype(o.dtype)
        return o * (jax.nn.sigmoid(gate) if self.activation == "sigmoid" else gate)


@dataclasses.dataclass(frozen=True)
class HeadScale(EpilogueStep):
    """o * scale[h]. Operand: `head_scale` float [H], with gradient."""

    operands = (Operand("head_scale", "h", "float", trains=True),)

    def apply(self, o: jax.Array, arrays: Arrays) -> jax.Array:
        """o * scale."""
        return o * arrays["head_scale"].astype(o.dtype)


@dataclasses.dataclass(frozen=True)
class HeadRMSNorm(EpilogueStep):
    """o / sqrt(mean_e o^2 + eps) * weight: each head's rows normalised.

    Operand: `head_norm` float [H, E] (1 in an axis that it shares), with gradient.

    Attributes:
        eps: added to the mean square, > 0: rows that see nothing stay 0.
    """

    eps: float = 1e-6
    operands = (Operand("head_norm", "he", "float", trains=True),)

    def __post_init__(self):
        if not self.eps > 0:
            raise ValueError(f"HeadRMSNorm: eps must be > 0; got eps={self.eps}.")

    def apply(self, o: jax.Array, arrays: Arrays) -> jax.Array:
        """o * rsqrt(mean square + eps) * weight."""
        square = jnp.mean(o * o, axis=-1, keepdims=True)
        scaled = o * jax.lax.rsqrt(square + self.eps)
        return scaled * arrays["head_norm"].astype(o.dtype)


def run_steps(
    steps: Sequence[EpilogueStep], o: jax.Array, operands: Arrays
) -> jax.Array:
    """All steps on whole outputs [B, T, H, E], operands in their own axes."""
    for step in steps:
        arrays = {
            operand.name: spread(operands[operand.name], operand.axes)
            for operand in step.operands
        }
        o = step.apply(o, arrays)
    return o


def spread(array: jax.Array, axes: str) -> jax.Array:
    """Insert axes of size 1 so that `array` broadcasts against [B, T, H, E]."""
    missing = [i for i, letter in enumerate(OUTPUT_AXES) if letter not in axes]
    return jnp.expand_dims(array, missing)
