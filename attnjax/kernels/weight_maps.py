"""How a row of scores becomes a row of weights.

A weight map states which row statistics it needs and gives elementwise formulas; an
implementation supplies the tiling. With u = `unnormalized(s, shift)`:
  needs_max:  u = exp(s - shift), where shift is the row's running maximum going
              forward and its log-sum going back;
  needs_sum:  weights are u / (sum of u [+ the sink's term]);
  neither:    weights are u.
`slope` is du/ds with the shift held, which is all that a backward pass needs: with r
the factor from u to weights (1 over the row's sum),
    ds = slope * r * (dp - needs_sum * (delta - dlse)),   delta = sum_e(do * o).
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnjax.kernels.operands import Operand


class WeightMap:
    """Base of all weight maps."""

    needs_max: bool = False
    needs_sum: bool = False
    # The array that the map needs: none, or the logit of its sink.
    operands: tuple[Operand, ...] = ()

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """u; 0 where s is hugely negative (masked), unless the shift is too."""
        raise NotImplementedError

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """du/ds with the shift held, from s and u; 0 where u is 0 by masking."""
        raise NotImplementedError

    def sink_logit(self, operands: dict[str, jax.Array]) -> jax.Array | float | None:
        """A logit that joins each row's sum without a value, [H] or a number."""
        del operands
        return None


@dataclasses.dataclass(frozen=True)
class Softmax(WeightMap):
    """exp(s) / sum exp(s), stable for any finite scores.

    Attributes:
        sink: None; "logit": a learned logit per head joins the sum and has no value
            (operand `sink` float [H], with gradient; gpt-oss); "off_by_one": the
            same with the constant logit 0, exp(s) / (1 + sum exp(s)).
    """

    sink: str | None = None
    needs_max = True
    needs_sum = True

    def __post_init__(self):
        if self.sink not in (None, "logit", "off_by_one"):
            raise ValueError(
                "Softmax: sink must be None, 'logit' or 'off_by_one'; got "
                f"sink={self.sink!r}."
            )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The sink's logit, when it is learned."""
        if self.sink == "logit":
            return (Operand("sink", "h", "float", trains=True),)
        return ()

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """exp(s - shift)."""
        return jnp.exp(s - shift)

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """u: the derivative of exp is itself."""
        del s
        return u

    def sink_logit(self, operands: dict[str, jax.Array]) -> jax.Array | float | None:
        """The operand, 0, or None without a sink."""
        if self.sink == "logit":
            return operands["sink"]
        return 0.0 if self.sink == "off_by_one" else None


@dataclasses.dataclass(frozen=True)
class Sigmoid(WeightMap):
    """sigmoid(s + bias), no normalisation (Ramapuram et al., arXiv 2409.04431).

    Attributes:
        bias: added to every score; the paper uses -log(number of keys). A learned
            offset is a `ScoreFn` or `Bias` with an operand instead.
    """

    bias: float = 0.0

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """sigmoid(s + bias)."""
        del shift
        return jax.nn.sigmoid(s + self.bias)

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """u (1 - u)."""
        del s
        return u * (1 - u)
