"""Positions on a grid of tokens: sines and cosines, tables, rotary angles."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.errors import UserError
from attnjax.nn.positions import Rope, rope_frequencies


@dataclasses.dataclass(frozen=True)
class AxialRope(Rope):
    """Rotary positions on a grid: each axis turns an equal share of the pairs.

    Of the R/2 rotated pairs the first share turns by the coordinate along the first
    axis, the next by that along the second, ...; each share has the frequencies of a
    head of its own size. R is the largest multiple of twice the number of axes within
    `fraction` of the head; the entries behind it are not turned.

    Source: Heo et al., arXiv 2403.13298, section 3.1 (RoPE-Axial).

    Attributes:
        grid: lengths of the axes; tokens are its places in row-major order.
        extra_tokens: leading tokens that are not of the grid; they are not turned.
    """

    grid: tuple[int, ...] = ()
    extra_tokens: int = 0

    def rotated_dim(self, head_dim: int) -> int:
        """How many of `head_dim` entries are rotated."""
        whole = 2 * len(self.grid)
        return whole * int(head_dim * self.fraction / whole)

    def angles(
        self, positions: jax.Array, head_dim: int, dtype
    ) -> tuple[jax.Array, float]:
        """[B, T, R/2] in radians, and the temperature of query and key.

        Args:
            positions: int [B, T] (or [1, T]); `extra_tokens` is the grid's first place.
            head_dim: D.
            dtype: of the angles.

        Raises:
            UserError: when no axis has a pair to turn.
        """
        axes = len(self.grid)
        share = self.rotated_dim(head_dim) // axes
        if not share:
            raise UserError(
                f"rope: must rotate a pair of entries for each of {axes} axes; got "
                f"head_dim={head_dim}, fraction={self.fraction}. Raise one of them, or "
                "use other positions."
            )
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(Rope)}
        own = Rope(**plain | {"fraction": 1.0})
        frequency, temperature = rope_frequencies(share, own)
        places = self.coordinates(positions).astype(dtype)
        angle = places[..., None] * jnp.asarray(frequency, dtype)
        return angle.reshape(*positions.shape, -1), temperature

    def coordinates(self, positions: jax.Array) -> jax.Array:
        """int [B, T] -> int [B, T, axes]; zeros for the extra tokens."""
        place = jnp.maximum(positions - self.extra_tokens, 0)
        found = []
        for length in reversed(self.grid[1:]):
            found.append(place % length)
            place = place // length
        return jnp.stack([place, *reversed(found)], axis=-1)


def rope_on_grid(
    rope: Rope | None, grid: tuple[int, ...] | None, extra_tokens: int
) -> Rope | None:
    """Rotary settings for tokens that lie on `grid`; as they are without a grid."""
    if rope is None or grid is None or isinstance(rope, AxialRope):
        return rope
    plain = {f.name: getattr(rope, f.name) for f in dataclasses.fields(Rope)}
    return AxialRope(**plain, grid=tuple(grid), extra_tokens=extra_tokens)


def sincos_2d(
    grid: tuple[int, int],
    dim: int,
    *,
    trained: tuple[int, int] | None = None,
    temperature: float = 10000.0,
    reaches_end: bool = True,
) -> np.ndarray:
    """Fixed positions of a grid, float64 [h * w, C]: sin and cos of the column, then of
    the row, at C / 4 frequencies from 1 down to 1 / temperature.

    Source: Chen, Xie and He, arXiv 2104.02057 (released code of MoCo v3); Beyer et al.,
    arXiv 2205.01580. With reaches_end=False: Peebles and Xie, arXiv 2212.09748.

    Args:
        grid: rows and columns.
        dim: C, a multiple of 4, at least 8.
        trained: the grid that the positions were trained on: its area is covered by
            the places of `grid` (pixel centres), at fractional coordinates.
        temperature: of the lowest frequency.
        reaches_end: whether the last frequency is 1 / temperature, or the one that
            would follow it.
    """
    ends = zip(grid, trained or grid, strict=True)
    rows, columns = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in ends)
    return sincos_at(
        rows, columns, dim, temperature=temperature, reaches_end=reaches_end
    )


def sincos_at(
    rows: np.ndarray,
    columns: np.ndarray,
    dim: int,
    *,
    temperature: float = 10000.0,
    reaches_end: bool = True,
) -> np.ndarray:
    """`sincos_2d` of the places where these rows and columns cross, float64 [h * w, C].

    Args:
        rows, columns: coordinates [h] and [w].
        dim, temperature, reaches_end: as there.
    """
    if dim % 4 or dim < 8:
        raise ValueError(
            f"sincos_2d: dim must be a multiple of 4 and at least 8; got dim={dim}."
        )
    count = dim // 4
    frequency = temperature ** (-np.arange(count) / (count - reaches_end))
    row, column = np.meshgrid(rows, columns, indexing="ij")
    angle = [place.reshape(-1, 1) * frequency for place in (column, row)]
    return np.concatenate([f(a) for a in angle for f in (np.sin, np.cos)], axis=1)


def resample_table(
    table: jax.Array, source: tuple[int, ...], target: tuple[int, ...]
) -> jax.Array:
    """Learned positions [prod(source), C] at the places of another grid.

    Cubic interpolation between pixel centres (Keys' kernel, a = -1/2; smoothed first
    where the grid shrinks), in float32 or wider. Source: Dosovitskiy et al., arXiv
    2010.11929, section 3.2.

    Returns:
        [prod(target), C] in the dtype of `table`; `table` itself for an equal grid.
    """
    source, target = tuple(source), tuple(target)
    if len(table) != math.prod(source):
        raise ValueError(
            f"resample_table: table must have a row for each place of source; got "
            f"{len(table)} rows, source={source}."
        )
    if source == target:
        return table
    wide = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    image = wide.reshape(*source, -1)
    sized = jax.image.resize(image, (*target, image.shape[-1]), method="cubic")
    return sized.reshape(-1, image.shape[-1]).astype(table.dtype)
