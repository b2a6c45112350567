"""How a row of scores becomes a row of weights.

A weight map says which row statistics it needs and gives elementwise formulas; an
implementation supplies the tiling. For scores s of one row
    u = unnormalized(s, shift)           the numerators
    d = summed(s, shift)                 what is summed: u itself unless `split`
    weights = u / (sum of d + exp(sink_logit))   with `needs_sum`, else u
The shift is for maps with `exponential`, which promise u(s, shift) = exp(-shift)
u(s, 0) and the same of d. Going forward it is the row's running maximum (`needs_max`;
at least `floor`), or the constant `bound` where scores are known not to pass it; going
back it is the row's log-sum, which makes u the weights. Other maps get None.

`slope` is du/ds with the shift held, all that a backward pass needs: with r the factor
from u to weights (1 where the shift is the log-sum), dp = do.v,
    ds = r * slope * (dp + d_sum),   d_sum = dlse - sum_e(do * o), without a sum 0
and for a `split` map, with du and dd from `slopes`, ds = r * (du * dp + dd * d_sum).

Formulas use +, *, /, where, exp, log, tanh, logistic and integer powers alone, which
every kernel compiler has; `log_one_plus` is the one that needed care.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnjax.kernels.operands import Operand

# Scores that a float32 exponential of `Softmax(bound=...)` keeps apart from 0.
LARGEST_BOUND = 40.0


class WeightMap:
    """Base of all weight maps."""

    # Whether u and d scale with exp(-shift).
    exponential: bool = False
    # A constant that no score passes, used as the shift; None: the row's maximum.
    bound: float | None = None
    # The least row maximum of an exponential map; None: none.
    floor: float | None = None
    needs_sum: bool = False
    # Whether what is summed is not u: then `summed` and `slopes` say what it is.
    split: bool = False
    # Whether u, d and the slopes are 0 at masked scores, which are hugely negative
    # (-1e30). Where they are not, implementations set them to 0 there.
    vanishes: bool = True
    # The arrays that the map needs: none, or the logit of its sink.
    operands: tuple[Operand, ...] = ()

    @property
    def needs_max(self) -> bool:
        """Whether the shift is the row's running maximum."""
        return self.exponential and self.bound is None

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """u, the shape of s; shift broadcasts against s."""
        raise NotImplementedError

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """du/ds with the shift held, from s and u."""
        raise NotImplementedError

    def summed(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """d of a split map."""
        raise NotImplementedError

    def slopes(
        self, s: jax.Array, shift: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """du/ds and dd/ds of a split map, the shift held."""
        raise NotImplementedError

    def sink_logit(self, operands: dict[str, jax.Array]) -> jax.Array | float | None:
        """The log of what joins each row's sum without a value: [H], a number, or
        None."""
        del operands
        return None

    def bare(self) -> "WeightMap":
        """The map without its sink, for partial results that `merge` joins."""
        return self


@dataclasses.dataclass(frozen=True)
class Softmax(WeightMap):
    """exp(s) / sum exp(s), stable for any finite scores.

    Attributes:
        sink: None; "logit": a learned logit per head joins the sum and has no value
            (operand `sink` float [H], with gradient; gpt-oss); "off_by_one": the
            same with the constant logit 0, exp(s) / (1 + sum exp(s)).
        bound: a number that |s| never passes (a soft cap, unit queries and keys times
            a scale), at most 40: no running maximum is kept. Scores beyond it give
            wrong weights without a word.
    """

    sink: str | None = None
    bound: float | None = None
    exponential = True
    needs_sum = True

    def __post_init__(self):
        if self.sink not in (None, "logit", "off_by_one"):
            raise ValueError(
                "Softmax: sink must be None, 'logit' or 'off_by_one'; got "
                f"sink={self.sink!r}."
            )
        if self.bound is not None and not 0 < self.bound <= LARGEST_BOUND:
            raise ValueError(
                f"Softmax: bound must be > 0 and at most {LARGEST_BOUND}, or float32 "
                f"cannot hold exp(-2 bound); got bound={self.bound}. Leave it out to "
                "find each row's maximum."
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

    def bare(self) -> "Softmax":
        """Softmax without a sink."""
        return dataclasses.replace(self, sink=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Summed(WeightMap):
    """A map whose rows are divided by their sum + eps.

    Attributes:
        eps: added to the sum, >= 0. With 0 a row that is 0 everywhere stays 0.
    """

    eps: float = 1e-8
    needs_sum = True

    def __post_init__(self):
        if not self.eps >= 0:
            raise ValueError(
                f"{type(self).__name__}: eps must be >= 0; got eps={self.eps}."
            )

    def sink_logit(self, operands: dict[str, jax.Array]) -> float | None:
        """log(eps)."""
        del operands
        return math.log(self.eps) if self.needs_sum and self.eps else None

    def bare(self) -> "_Summed":
        """The map with eps = 0."""
        return dataclasses.replace(self, eps=0.0)


@dataclasses.dataclass(frozen=True)
class SoftplusL1(_Summed):
    """softplus(s) / (sum softplus(s) + eps) (LSSA, arXiv 2501.13428)."""

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """softplus(s)."""
        del shift
        return jnp.maximum(s, 0) + log_one_plus(jnp.exp(-jnp.abs(s)))

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """sigmoid(s)."""
        del u
        return jax.nn.sigmoid(s)


@dataclasses.dataclass(frozen=True)
class Polynomial(_Summed):
    """(1 + s + s^2 / 2) / sum of it: exp by its Taylor polynomial, which is at least
    1/2 everywhere."""

    vanishes = False

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """1 + s + s^2 / 2."""
        del shift
        return 1 + s * (1 + s / 2)

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """1 + s."""
        del u
        return 1 + s


@dataclasses.dataclass(frozen=True)
class Softpick(_Summed):
    """relu(exp(s) - 1) / (sum |exp(s) - 1| + eps): rectified softmax, whose rows sum
    to 1 or less and may be 0 everywhere (Zuhri et al., arXiv 2504.20966).

    The authors add eps to the sum shifted by the row maximum m, as eps * exp(m); the
    difference is below rounding wherever m is not near 0.
    """

    exponential = True
    floor = 0.0
    split = True
    vanishes = False

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """relu(exp(s - shift) - exp(-shift))."""
        return jnp.maximum(jnp.exp(s - shift) - jnp.exp(-shift), 0)

    def summed(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """|exp(s - shift) - exp(-shift)|."""
        return jnp.abs(jnp.exp(s - shift) - jnp.exp(-shift))

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """Refused: see `slopes`."""
        raise NotImplementedError("Softpick: a split map has slopes(s, shift).")

    def slopes(
        self, s: jax.Array, shift: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """exp(s - shift) where s > 0; the same times the sign of s."""
        e = jnp.exp(s - shift)
        up = jnp.where(s > 0, e, 0)
        return up, jnp.where(s < 0, -e, up)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MaybeSummed(_Summed):
    """A map whose rows are divided by their sum + eps only when asked.

    Attributes:
        normalise: divide.
    """

    normalise: bool = False

    @property
    def needs_sum(self) -> bool:
        """Whether rows are divided by their sum."""
        return self.normalise


@dataclasses.dataclass(frozen=True)
class Sigmoid(_MaybeSummed):
    """sigmoid(s + bias) (Ramapuram et al., arXiv 2409.04431).

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


@dataclasses.dataclass(frozen=True)
class ReluPower(_MaybeSummed):
    """factor * relu(s)^power (power 1 and factor 1/S: arXiv 2309.08586).

    Attributes:
        power: an integer >= 1.
        factor: multiplies the weights; without a use, and so refused, when they are
            normalised.
    """

    power: int = 1
    factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.power, int) or self.power < 1:
            raise ValueError(
                f"ReluPower: power must be an integer >= 1; got power={self.power!r}."
            )
        if self.normalise and self.factor != 1:
            raise ValueError(
                "ReluPower: factor has no use when weights are normalised; got "
                f"factor={self.factor}. Leave it out."
            )

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """factor * relu(s)^power."""
        del shift
        return self._times(self.factor, jnp.maximum(s, 0) ** self.power)

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """factor * power * relu(s)^(power - 1), 0 for s <= 0."""
        del u
        up = jnp.where(s > 0, jnp.maximum(s, 0) ** (self.power - 1), 0)
        return self._times(self.factor * self.power, up)

    @staticmethod
    def _times(factor: float, x: jax.Array) -> jax.Array:
        return x if factor == 1 else factor * x


@dataclasses.dataclass(frozen=True)
class EluPlusOne(_MaybeSummed):
    """elu(s) + 1: exp(s) below 0 and s + 1 above (arXiv 2410.10781)."""

    def unnormalized(self, s: jax.Array, shift: jax.Array | None) -> jax.Array:
        """exp(min(s, 0)) + max(s, 0)."""
        del shift
        return jnp.exp(jnp.minimum(s, 0)) + jnp.maximum(s, 0)

    def slope(self, s: jax.Array, u: jax.Array) -> jax.Array:
        """exp(min(s, 0))."""
        del s
        return jnp.minimum(u, 1)


def log_one_plus(x: jax.Array) -> jax.Array:
    """log(1 + x) for x in [0, 1], without losing small x.

    Twice the series of artanh at z = x / (2 + x), which is at most 1/3: eight terms
    are exact to 1e-8. float64, which no kernel compiler sees, takes jax's own.
    """
    if x.dtype == jnp.float64:
        return jnp.log1p(x)
    z = x / (2 + x)
    square = z * z
    total = jnp.full_like(z, 1 / 15)
    for odd in (13, 11, 9, 7, 5, 3, 1):
        total = total * square + 1 / odd
    return 2 * z * total
