"""Rotary positions (RoPE) with their scalings, and ALiBi slopes."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position settings.

    Source: Su et al., arXiv 2104.09864, eq. 34; the pairing of entry i with
    entry i + D/2 is that of GPT-NeoX and Llama.

    Attributes:
        theta: base of the geometric frequencies.
        fraction: share of head_dim that is rotated, in (0, 1].
        scaling: "none"; "linear" (positions divided by `factor`, arXiv 2306.15595);
            "ntk" (theta grown so that the lowest frequency shrinks by `factor`);
            "llama3" (long wavelengths divided by `factor`, short ones kept, a ramp
            between); "yarn" (arXiv 2309.00071, eq. 19-23, with its 0.1 ln(factor) + 1
            temperature on query and key).
        factor: how much longer than `original_len` the context may be.
        original_len: context length of pre-training, tokens.
        low_freq, high_freq: llama3's bounds, in rotations within `original_len`.
        beta_fast, beta_slow: yarn's bounds, in rotations within `original_len`.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Literal["none", "linear", "ntk", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_len: int = 2048
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1]; got {self.fraction}.")
        if not self.theta > 0:
            raise ValueError(f"theta must be positive; got {self.theta}.")
        if not self.factor >= 1:
            raise ValueError(
                f"factor must be at least 1; got {self.factor}. A context of twice "
                "original_len has factor=2."
            )
        if self.original_len < 1:
            raise ValueError(
                f"original_len must be at least 1; got {self.original_len}."
            )
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"factor does nothing with scaling=none; got factor={self.factor}. Set "
                "scaling to linear, ntk, llama3 or yarn."
            )
        if self.scaling == "llama3" and not self.high_freq > self.low_freq:
            raise ValueError(
                f"high_freq must exceed low_freq; got low_freq={self.low_freq}, "
                f"high_freq={self.high_freq}."
            )
        if self.scaling == "yarn" and not self.beta_fast > self.beta_slow:
            raise ValueError(
                f"beta_fast must exceed beta_slow; got beta_fast={self.beta_fast}, "
                f"beta_slow={self.beta_slow}."
            )

    def rotated_dim(self, head_dim: int) -> int:
        """How many of `head_dim` entries are rotated (even)."""
        return 2 * int(head_dim * self.fraction / 2)

    @property
    def temperature(self) -> float:
        """Factor on query and key, 1 except for yarn."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" else 1.0

    def angles(
        self, positions: jax.Array, head_dim: int, dtype
    ) -> tuple[jax.Array, float]:
        """[B, T, R/2] in radians, and the temperature of query and key.

        Args:
            positions: int [B, T], or [1, T] for all rows.
            head_dim: D, of which R entries are rotated.
            dtype: of the angles.
        """
        frequency, temperature = rope_frequencies(head_dim, self)
        angle = positions[..., None].astype(dtype) * jnp.asarray(frequency, dtype)
        return angle, temperature


def rope_frequencies(head_dim: int, rope: Rope) -> tuple[np.ndarray, float]:
    """Angular frequencies in radians per token, float64 [R/2], and the temperature.

    The temperature multiplies query and key (1 except for yarn).

    Raises:
        UserError: when no pair of entries is left to rotate.
    """
    rotated = rope.rotated_dim(head_dim)
    if rotated < 2:
        raise UserError(
            f"rope: must rotate at least one pair of entries; got head_dim={head_dim}, "
            f"fraction={rope.fraction}. Raise one of them, or use positions=none."
        )
    if rope.scaling == "ntk" and rotated < 4:
        raise UserError(
            "rope: scaling=ntk needs more than one rotated pair; got "
            f"head_dim={head_dim}, fraction={rope.fraction}. Use scaling=linear."
        )
    theta = rope.theta
    if rope.scaling == "ntk":
        theta = theta * rope.factor ** (rotated / (rotated - 2))
    frequency = theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    rotations = rope.original_len * frequency / (2 * math.pi)
    if rope.scaling == "linear":
        return frequency / rope.factor, 1.0
    if rope.scaling == "llama3":
        keep = (rotations - rope.low_freq) / (rope.high_freq - rope.low_freq)
        keep = np.clip(keep, 0.0, 1.0)
        return frequency * (keep + (1 - keep) / rope.factor), 1.0
    if rope.scaling == "yarn":
        return _yarn(frequency, rotated, rope), rope.temperature
    return frequency, 1.0


def _yarn(frequency: np.ndarray, rotated: int, rope: Rope) -> np.ndarray:
    def index_of(rotations: float) -> float:
        wavelength = rope.original_len / (rotations * 2 * math.pi)
        return rotated * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(index_of(rope.beta_fast)), 0)
    high = min(math.ceil(index_of(rope.beta_slow)), rotated - 1)
    ramp = (np.arange(rotated // 2) - low) / max(high - low, 0.001)
    keep = 1.0 - np.clip(ramp, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / rope.factor)


def apply_rope(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotate the pairs (i, i + R/2) of x by position times frequency.

    Args:
        x: [B, T, H, D].
        positions: int [B, T], or [1, T] for all rows.
        rope: the settings; an `AxialRope` rotates by places of a grid.

    Returns:
        [B, T, H, D] in the dtype of x; angles and rotation in float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle, temperature = rope.angles(positions, x.shape[-1], wide)
    rotated = 2 * angle.shape[-1]
    cos = (jnp.cos(angle) * temperature)[:, :, None, :]
    sin = (jnp.sin(angle) * temperature)[:, :, None, :]
    first, second, rest = jnp.split(x.astype(wide), [rotated // 2, rotated], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    if rest.shape[-1]:
        turned.append(rest)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes of ALiBi, float32 [H]: 2^(-8 i / H) for a power of two, else interleaved.

    Source: Press, Smith and Lewis, arXiv 2108.12409, section 3.
    """

    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = powers(whole)
    if whole < num_heads:
        slopes += powers(2 * whole)[0::2][: num_heads - whole]
    return np.asarray(slopes, np.float32)
