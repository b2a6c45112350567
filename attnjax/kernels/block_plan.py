"""The static layout of a blocked computation: block sizes by shape."""

import dataclasses

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
