"""The static layout of a blocked computation: block sizes by shape."""

import dataclasses

from attnjax.kernels.request import Request

# One tile is taken up to this many scores [B, H, T, S], or up to this length.
ONE_TILE_SCORES = 2**21
SMALL_LENGTH = 128


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
    if rows * t * s <= ONE_TILE_SCORES or max(t, s) <= SMALL_LENGTH:
        return t, s
    return 256, 256
