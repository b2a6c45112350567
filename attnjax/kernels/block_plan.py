"""The static layout of a blocked computation: block sizes by shape."""

import dataclasses

from attnjax.kernels.request import Request

# One tile is taken up to SMALL_LENGTH, for as many scores [B, H, T, S] as LARGE_TILE,
# and for any shape with no more scores than SMALL_TILE.
SMALL_LENGTH = 256
LARGE_TILE = 2**23
SMALL_TILE = 2**19
# Block sizes that are weighed against one another otherwise, largest first. A tile of
# up to CACHED scores stays in a core's cache; a masked score costs more than one
# that needs no mask, and each tile costs as much as TILE_OVERHEAD scores. Measured
# on two x86 cores; `python -m attnjax.bench kernels` shows what they amount to.
CANDIDATES = ((256, 128), (128, 128), (64, 64))
CACHED = 3 * 2**17
MASKED_COST = 1.4
TILE_OVERHEAD = 16_000
MOST_TILES = 2**17
# So many queries against more than a block of keys are decoding, in blocks of keys as
# long as these.
FEW_QUERIES = 16
DECODE_BLOCK = 256


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
        """Whether a single tile covers everything, and is computed as one."""
        return self.num_q == self.num_k == 1 and self.request.spec.reweight is None

    @property
    def decodes(self) -> bool:
        """Whether few queries meet a long cache, which is read where it lies."""
        few = self.num_q == 1 and self.request.q_len <= FEW_QUERIES
        return few and self.num_k > 1 and self.request.spec.reweight is None

    @property
    def padded_keys(self) -> bool:
        """Whether the last block of keys has padding."""
        return self.num_k * self.block_k != self.request.kv_len
