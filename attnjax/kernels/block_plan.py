"""Which tiles of a blocked computation are computed, and which of them need a mask."""

import dataclasses
import functools

import numpy as np

from attnjax.kernels.masks import Coverage, Span
from attnjax.kernels.request import Request

# Largest number of scores [B, H, T, S] that are computed as one tile, and largest
# number of scores of one tile otherwise: about what stays in a core's cache.
ONE_TILE_SCORES = 2**21
TILE_SCORES = 2**19


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Static layout of one blocked computation; the static argument of its VJP.

    Attributes:
        request: the call.
        block_q, block_k: tokens in a block of queries and of keys.
    """

    request: Request
    block_q: int
    block_k: int

    @property
    def num_q(self) -> int:
        """Blocks of queries; the last one may be padded."""
        return -(-self.request.q_len // self.block_q)

    @property
    def num_k(self) -> int:
        """Blocks of keys; the last one may be padded."""
        return -(-self.request.kv_len // self.block_k)

    @property
    def one_tile(self) -> bool:
        """Whether a single tile covers everything."""
        return self.num_q == self.num_k == 1

    @property
    def padded_keys(self) -> bool:
        """Whether the last block of keys has padding."""
        return self.num_k * self.block_k != self.request.kv_len


@dataclasses.dataclass(frozen=True, eq=False)
class TileTable:
    """For each block of queries, the blocks of keys that it meets.

    Attributes:
        full, partial: int32 [num_q, n], block indices, padded with 0.
        num_full, num_partial: int32 [num_q], how many of a row count.
    """

    full: np.ndarray
    num_full: np.ndarray
    partial: np.ndarray
    num_partial: np.ndarray


def plan_blocks(request: Request, block_sizes: tuple[int, int] | None) -> BlockPlan:
    """Choose block sizes, or take the given ones (cut to T and S)."""
    t, s = request.q_len, request.kv_len
    if block_sizes is None:
        block_sizes = _choose(request)
    return BlockPlan(request, min(block_sizes[0], t), min(block_sizes[1], s))


def _choose(request: Request) -> tuple[int, int]:
    t, s = request.q_len, request.kv_len
    rows = request.batch * request.num_heads
    if rows * t * s <= ONE_TILE_SCORES or max(t, s) <= 128:
        return t, s
    return 128, 512


@functools.lru_cache(maxsize=256)
def tile_table(plan: BlockPlan) -> TileTable:
    """Sort the tiles of a plan into skipped, full and partial ones."""
    request = plan.request
    mask = request.spec.mask
    known = request.static_positions or not mask.positional
    guarded = "kv_mask" in request.operand_names
    rows: list[tuple[list[int], list[int]]] = []
    for i in range(plan.num_q):
        full, partial = [], []
        for j in range(plan.num_k):
            cover = mask.coverage(_span(plan, i, j)) if known else Coverage.PARTIAL
            cut = guarded or (plan.padded_keys and j == plan.num_k - 1)
            if cover == Coverage.FULL and not cut:
                full.append(j)
            elif cover != Coverage.EMPTY:
                partial.append(j)
        rows.append((full, partial))
    return TileTable(
        *_as_table([full for full, _ in rows]),
        *_as_table([partial for _, partial in rows]),
    )


def _span(plan: BlockPlan, i: int, j: int) -> Span:
    """Positions of tile (i, j), without padding."""
    return Span(
        q_first=i * plan.block_q,
        q_last=min((i + 1) * plan.block_q, plan.request.q_len) - 1,
        k_first=j * plan.block_k,
        k_last=min((j + 1) * plan.block_k, plan.request.kv_len) - 1,
    )


def _as_table(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(row) for row in rows], np.int32)
    table = np.zeros((len(rows), max(1, counts.max())), np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table, counts
