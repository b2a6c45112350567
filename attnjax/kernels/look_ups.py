"""Look-ups in tables, as kernels make them: tiles made of a few numbers.

A kernel cannot gather. `inside(spec)` is a spec without tables: a bias by distance
becomes a bias of one tile, a mask by blocks a tile of marks. The kernel makes such a
tile itself: the bias of the diagonals that cross it, the marks of bits that say of a
key which block rows see it. What it reads is laid out here, by XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnjax.kernels.block_masks import BlockLists, BlockMask, block_table
from attnjax.kernels.masks import And, Mask, Or, Tile
from attnjax.kernels.operands import Operand
from attnjax.kernels.relative import RelativeBias
from attnjax.kernels.scores import Bias
from attnjax.kernels.spec import AttentionSpec

BITS = 32


@dataclasses.dataclass(frozen=True)
class Marked(Mask):
    """What a tile of marks says: the form of a mask by blocks inside a kernel."""

    name: str
    positional = True

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The marks, one for each score."""
        return (Operand(self.name, "bhts", "bool"),)

    def visible(self, tile: Tile) -> jax.Array:
        """The marks."""
        return tile.operands[self.name]


@functools.lru_cache(maxsize=256)
def inside(spec: AttentionSpec) -> AttentionSpec:
    """The spec as kernels see it: the same one if it reads no table of ours."""
    mask, count = _without_blocks(spec.mask, 0)
    score = tuple(
        Bias(step.name) if isinstance(step, RelativeBias) else step
        for step in spec.score
    )
    if not count and score == spec.score:
        return spec
    return dataclasses.replace(spec, mask=mask, score=score)


def _without_blocks(mask: Mask, count: int) -> tuple[Mask, int]:
    """The mask with marks in the place of blocks, and how many lists there were."""
    if isinstance(mask, And | Or):
        first, count = _without_blocks(mask.first, count)
        second, count = _without_blocks(mask.second, count)
        return type(mask)(first, second), count
    if isinstance(mask, BlockMask):
        return Marked(mask.operands[0].name), count + 1
    if isinstance(mask, BlockLists):
        return Marked(f"block_lists_{count}"), count + 1
    return mask, count


@functools.lru_cache(maxsize=256)
def masks_by_blocks(spec: AttentionSpec) -> dict[str, BlockMask | BlockLists]:
    """The masks that marks stand for, by the names of the marks."""
    found = {}

    def gather(mask: Mask, other: Mask) -> None:
        if isinstance(other, Marked):
            found[other.name] = mask
        elif isinstance(mask, And | Or):
            gather(mask.first, other.first)
            gather(mask.second, other.second)

    gather(spec.mask, inside(spec).mask)
    return found


@functools.lru_cache(maxsize=256)
def biases_by_distance(spec: AttentionSpec) -> dict[str, RelativeBias]:
    """The biases that read a table of distances, by operand."""
    return {step.name: step for step in spec.score if isinstance(step, RelativeBias)}


def table_of(mask: BlockMask | BlockLists, operands) -> jax.Array:
    """Which blocks of keys a block of queries sees: bool [B|1, H|1, NQ, NK]."""
    if isinstance(mask, BlockLists):
        return jnp.asarray(block_table(mask))[None, None]
    return operands[mask.operands[0].name]


def mark_words(table: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Block rows as bits of the words of a key.

    Args:
        table: bool [B|1, H|1, NQ, NK].
        rows: int [N, n], block rows of each of N blocks of queries; NQ or more: none.
        columns: int [B|1, S], block column of each key; NK or more: none.

    Returns:
        int32 [B|1, H|1, N, W, S]: row m of a block is bit m % 32 of word m // 32.
    """
    num_rows, num_columns = table.shape[2:]
    table = jnp.pad(table, ((0, 0), (0, 0), (0, 1), (0, 1)))
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % BITS)), constant_values=num_rows)
    picked = jnp.take(table, jnp.minimum(rows, num_rows), axis=2)
    shape = (*table.shape[:2], rows.shape[0], -1, BITS, num_columns + 1)
    picked = picked.reshape(shape).astype(jnp.uint32)
    places = jnp.arange(BITS, dtype=jnp.uint32)[:, None]
    words = jnp.sum(picked << places, axis=-2, dtype=jnp.uint32)
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    columns = jnp.minimum(columns, num_columns)
    if columns.shape[0] == 1:
        return jnp.take(words, columns[0], axis=-1)
    words = jnp.broadcast_to(words, (columns.shape[0], *words.shape[1:]))
    return jax.vmap(lambda x, at: jnp.take(x, at, axis=-1))(words, columns)


def diagonals(
    step: RelativeBias, table: jax.Array, first: jax.Array, size: int
) -> jax.Array:
    """A bias by distance along falling distances.

    Args:
        table: [H|1, 2 reach + 1].
        first: int [B|1], the first distance q - k.
        size: how many.

    Returns:
        float32 [B|1, H|1, size]: of distances first, first - 1, ...
    """
    step.check_table(table)
    distances = first[:, None] - jnp.arange(size, dtype=jnp.int32)
    places = jnp.clip(distances, -step.reach, step.reach) + step.reach
    return jnp.swapaxes(jnp.take(table.astype(jnp.float32), places, axis=1), 0, 1)


def divide(n: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """n // by and n % by for 0 <= n < 2^21, by a product: vectors have no division."""
    if by == 1:
        return n, jnp.zeros_like(n)
    whole = ((n.astype(jnp.float32) + 0.5) * (1.0 / by)).astype(jnp.int32)
    return whole, n - whole * by
