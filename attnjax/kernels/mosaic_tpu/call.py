"""What every kernel of the family shares: its grid, and how it is called."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.compat import type_like
from attnjax.kernels.mosaic_tpu import layout, steps
from attnjax.kernels.mosaic_tpu.layout import Place

Arrays = Mapping[str, jax.Array]


def quotient(x: jax.Array, y: int) -> jax.Array:
    """x // y for x >= 0: the operator also lowers the sign, which needs a device."""
    return x if y == 1 else jax.lax.div(x, jnp.int32(y))


def remainder(x: jax.Array, y: int) -> jax.Array:
    """x % y for x >= 0."""
    return jax.lax.rem(x, jnp.int32(y))


@dataclasses.dataclass(frozen=True)
class Walk:
    """A grid of (batch, heads, steps, inner) over the tiles of a call.

    Attributes:
        plan: block sizes.
        words: steps [B or 1, heads or 1, n].
        over: what a row of steps gathers for. "queries": a block of queries and one
            head; "keys": a block of keys and a key/value head, its query heads
            innermost; "tiles": one tile, the batch rows and heads that share it
            innermost.
        pairs: for "keys", whether heads have steps of their own: a column is then a
            query head and a block of queries (`steps.by_keys`).
        shares: for "tiles", whether one tile serves all batch rows, and all heads.
        interpret: parameters of Pallas' TPU interpreter, or False.
    """

    plan: BlockPlan
    words: steps.Words
    over: str = "queries"
    pairs: bool = False
    shares: tuple[bool, bool] = (False, False)
    interpret: object = False

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        request = self.plan.request
        return request.num_heads // request.num_kv_heads

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Sizes of the grid."""
        request, n = self.plan.request, self.words.shape[2]
        b, h = request.batch, request.num_heads
        if self.over == "keys":
            return (b, request.num_kv_heads, n, 1 if self.pairs else self.group)
        outer = [1 if s else n for s, n in zip(self.shares, (b, h), strict=True)]
        return (*outer, n, b * h // math.prod(outer))

    def _row_and_head(self, grid):
        """Batch row and query head of a grid index."""
        if self.over == "keys":
            return grid[0], grid[1] * self.group + grid[3]
        b, h = grid[:2]
        heads = self.plan.request.num_heads if self.shares[1] else 1
        return (
            quotient(grid[3], heads) if self.shares[0] else b,
            remainder(grid[3], heads) if self.shares[1] else h,
        )

    def _word(self, grid, words_ref) -> jax.Array:
        num_b, num_h, n = self.words.shape
        b, h = self._row_and_head(grid)
        start = n * num_h * b if num_b > 1 else 0
        if num_h > 1:
            start += n * (grid[1] if self.over == "keys" else h)
        return words_ref[start + grid[2]]

    def place(self, *grid_and_words) -> Place:
        """Where grid indices and the words' ref lead."""
        *grid, words_ref = grid_and_words
        word = self._word(grid, words_ref)
        i, j = steps.row_of(word), steps.column_of(word)
        b, h = self._row_and_head(grid)
        if self.over == "keys":
            i, j = j, i
            if self.pairs:
                h = grid[1] * self.group + quotient(i, self.plan.num_q)
                i = remainder(i, self.plan.num_q)
        return Place(b, h, i, j)

    def here(self, words_ref) -> tuple[Place, jax.Array, jax.Array, jax.Array]:
        """Inside a kernel: the place, its kind, and whether a row begins or ends."""
        grid = [pl.program_id(axis) for axis in range(4)]
        word = self._word(grid, words_ref)
        first, last = (word & steps.FIRST) != 0, (word & steps.LAST) != 0
        inner = self.grid[3]
        if inner > 1:
            first = first & (grid[3] == 0)
            last = last & (grid[3] == inner - 1)
        return self.place(*grid, words_ref), steps.kind_of(word), first, last

    def spec(self, sizes: tuple[int, int], along: str) -> pl.BlockSpec:
        """How a padded array [B, heads, *, *] is cut.

        Args:
            sizes: of the last two axes of a block.
            along: where blocks lie: "q" for [B, H, T, *], "k" for [B, K, S, *] and
                "t" for [B, H, 1, T].
        """

        def index(*grid):
            at = self.place(*grid)
            return {
                "q": (at.b, at.h, at.i, 0),
                "k": (at.b, quotient(at.h, self.group), at.j, 0),
                "t": (at.b, at.h, 0, at.i),
            }[along]

        return pl.BlockSpec((None, None, *sizes), index)

    def operand_specs(self, arranged: Arrays) -> dict[str, pl.BlockSpec]:
        """How arranged operands are cut."""
        return {
            name: layout.operand_spec(self.plan, name, x.shape, self.place)
            for name, x in arranged.items()
        }

    def visit(self, kind: jax.Array, body: Callable[[bool], None]) -> None:
        """Run `body(masked)` unless the tile is empty; only bodies that can occur."""
        for wanted in (steps.FULL, steps.PARTIAL):
            if isinstance(self.words, jax.Array) or wanted in steps.kind_of(self.words):
                masked = wanted == steps.PARTIAL
                pl.when(kind == wanted)(lambda masked=masked: body(masked))


def call(walk: Walk, kernel, inputs, in_specs, outputs, out_specs, scratch, features):
    """Run a kernel over a walk.

    Args:
        kernel: (walk, words_ref, inputs' refs, outputs' refs, scratch refs) -> None;
            its name is the profile's. Refs come in dictionaries.
        inputs, outputs: arrays, and shapes with dtypes, by name.
        in_specs, out_specs: block specs by name.
        scratch: float32 shapes by name.
        features: multiplications for each score, for the compiler's estimates.
    """
    outputs = {
        name: type_like(x.shape, x.dtype, inputs["q"]) for name, x in outputs.items()
    }
    scores = math.prod(walk.grid) * walk.plan.block_q * walk.plan.block_k
    moved = jax.tree.leaves((inputs, outputs))
    return pl.pallas_call(
        lambda *refs: kernel(walk, *refs),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=walk.grid,
            in_specs=[in_specs],
            out_specs=out_specs,
            scratch_shapes=[
                {name: pltpu.VMEM(size, jnp.float32) for name, size in scratch.items()}
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        name=f"attention{kernel.__name__}",
        interpret=walk.interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * features,
            transcendentals=scores,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        ),
    )(jnp.reshape(jnp.asarray(walk.words), -1), inputs)
