"""How a step of decoding is laid out: rows, columns, parts, and operands.

Row r of the tile is query r // H of head r % H; column c is key c // K of key/value
head c % K. An operand is laid out by the axes along which it really varies:
    row     not s: [B|1, T H, 1]
    column  s alone: [B|1, 1, S K]
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels import look_ups, tiles, tuned
from attnjax.kernels.block_plan import BlockPlan
from attnjax.kernels.masks import Tile
from attnjax.kernels.mosaic_tpu.blocks import LANES
from attnjax.kernels.operands import as_rank4
from attnjax.kernels.request import Request

Arrays = Mapping[str, jax.Array]

MAX_ROWS = 256
# Columns of a tile, the bytes that two copies of its keys and values may take of the
# 16 MiB of VMEM, and the scores that a tile may have: the body holds a dozen of them.
MOST_COLUMNS = 4096
MOST_BYTES = 6 * 2**20
MOST_SCORES = 2**18
# Chips of two cores that share a grid.
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The static layout of a step of decoding.

    Attributes:
        request: the call, without its epilogue.
        block: keys of a block of the cache.
        parts: shares of the cache that are gathered by themselves.
    """

    request: Request
    block: int
    parts: int = 1

    @property
    def rows(self) -> int:
        """T H."""
        return self.request.q_len * self.request.num_heads

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.block * self.request.num_kv_heads

    @property
    def blocks(self) -> BlockPlan:
        """The cut into blocks of keys."""
        return BlockPlan(self.request, self.request.q_len, self.block)


def choose(request: Request) -> DecodePlan:
    """Blocks and parts as measured on the device; or blocks that fill the memory's
    pipeline, and a part for each core."""
    measured = tuned.sizes_of("mosaic_tpu", request)
    if measured is not None:
        return DecodePlan(request, min(measured[0], request.kv_len), measured[1])
    kv, itemsize = request.num_kv_heads, 2 if _narrow(request) else 4
    features = sum(
        -(-n // LANES) * LANES for n in (request.head_dim, request.value_dim)
    )
    most = min(
        MOST_COLUMNS,
        MOST_BYTES // (2 * itemsize * features),
        MOST_SCORES // (request.q_len * request.num_heads),
    )
    block = 2 ** int(math.log2(max(1, most // kv)))
    # Whole registers of columns, for operands that lie along them.
    block = max(block, LANES // math.gcd(kv, LANES))
    cores = 2 if request.target.device_kind in TWO_CORES else 1
    parts = cores if request.batch % cores else 1
    return DecodePlan(request, min(block, request.kv_len), parts)


def _narrow(request: Request) -> bool:
    return set(request.dtypes) == {"bfloat16"}


def problem(request: Request) -> str | None:
    """Why the kernel for fewer than 8 queries cannot take the request, or None."""
    few = f"with T={request.q_len}, below 8,"
    if request.q_len * request.num_heads > MAX_ROWS:
        return f"{few} takes T H <= {MAX_ROWS}, not H={request.num_heads}"
    if not _lies_by_rows(request):
        return (
            f"{few} reads the cache where it lies, which needs D and E of whole 128s, "
            "and K = 1 or whole 8s (or 2 or 4 where D = E = 128), not "
            f"D={request.head_dim}, E={request.value_dim}, K={request.num_kv_heads}"
        )
    if request.spec.reweight is not None:
        name = type(request.spec.reweight).__name__
        return f"{few} takes no second pass over rows, as {name} is"
    known = tiles.declarations(request.spec)
    shapes = tiles.of_tiles(request.spec, dict(request.operand_shapes))
    for name, shape in shapes.items():
        varies = {a for a, n in zip(known[name].axes, shape, strict=False) if n > 1}
        if "s" in varies and varies & set("ht"):
            return (
                f"{few} takes no operand that varies over keys and over queries or "
                f"heads, as {name!r} does"
            )
    return None


def _lies_by_rows(request: Request) -> bool:
    """Whether [B, S, K, D] and [B, S K, D] are the same bytes in the layout that the
    compiler gives to arguments: it packs short axes, and the rows of wide heads."""
    dims, kv = (request.head_dim, request.value_dim), request.num_kv_heads
    if any(dim % LANES for dim in dims):
        return False
    return kv == 1 or kv % 8 == 0 or (kv in (2, 4) and set(dims) == {LANES})


def arrange(plan: DecodePlan, operands: Arrays) -> dict[str, jax.Array]:
    """Operands in the layout of their forms, int32 or float32."""
    known = tiles.declarations(plan.request.spec)
    return {
        name: _arrange(plan, as_rank4(x, known[name].axes))
        for name, x in operands.items()
    }


def _arrange(plan: DecodePlan, x: jax.Array) -> jax.Array:
    request = plan.request
    whole = not jnp.issubdtype(x.dtype, jnp.floating)
    x = x.astype(jnp.int32 if whole else jnp.float32)
    b, _, _, s = x.shape
    if s > 1:
        x = jnp.repeat(x.reshape(b, 1, s), request.num_kv_heads, axis=2)
        return x
    x = jnp.broadcast_to(x[..., 0], (b, request.num_heads, request.q_len))
    return x.swapaxes(1, 2).reshape(b, plan.rows, 1)


def read_tile(
    plan: DecodePlan, refs: Mapping, b, j
) -> tuple[Tile, jax.Array, jax.Array]:
    """The tile of rank 2 of block j; whether a row and a column are of one head, or
    None if all are; and whether a column's key exists.

    Args:
        refs: blocks of the operands.
    """
    request = plan.request
    known = tiles.declarations(request.spec)
    values = {
        name: ref[...] != 0 if known[name].kind == "bool" else ref[...]
        for name, ref in refs.items()
    }
    row = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, plan.columns), 1)
    query, head = look_ups.divide(row, request.num_heads)
    key, kv_head = look_ups.divide(column, request.num_kv_heads)
    key = key + j * plan.block
    own = None
    if request.num_kv_heads > 1:
        own = (
            look_ups.divide(head, request.num_heads // request.num_kv_heads)[0]
            == kv_head
        )
    tile = Tile(
        b=b,
        h=head,
        q=values.pop("q_positions", query),
        k=values.pop("k_positions", key),
        operands=values,
    )
    return tile, own, key < request.kv_len
