"""Tile sizes of the Hopper kernels, by head dimensions, and whether they fit."""

import dataclasses

# What one block may use on Hopper (227 KiB), less room for barriers and the scratch
# space of reductions.
SHARED_MEMORY = 227 * 1024 - 4 * 1024
# Rows of one wgmma, so of one compute warpgroup.
ROWS = 64
COMPUTE_WARPGROUPS = 2
# Rows that one block of threads owns.
BLOCK = ROWS * COMPUTE_WARPGROUPS
MAX_DIM = 256
# Rows of a streamed tile that divide a block.
STEPS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the forward or of one backward kernel.

    A block of threads owns BLOCK rows (queries in the forward and dq
    kernels, keys in the dk/dv kernels) and steps over tiles of `step` rows of the
    other side, `stages` of which are in shared memory at a time.

    Attributes:
        step: rows of the streamed tiles, 64 or 128.
        stages: depth of the ring, at least 1.
        ping_pong: let one warpgroup's softmax run during the other's matmuls.
    """

    step: int = 128
    stages: int = 2
    ping_pong: bool = True

    def __post_init__(self):
        if self.step not in STEPS:
            raise ValueError(f"Tiles: step must be one of {STEPS}; got {self.step}.")
        if self.stages < 1:
            raise ValueError(
                f"Tiles: stages must be at least 1; got stages={self.stages}."
            )


def padded_dim(dim: int) -> int:
    """A head dimension as the kernels see it: whole rows of 128 bytes."""
    return -(-dim // 64) * 64


def forward_bytes(tiles: Tiles, head_dim: int, value_dim: int) -> int:
    """Shared memory of the forward kernel in bytes, 2 bytes an element."""
    fixed = BLOCK * (head_dim + (value_dim if value_dim != head_dim else 0))
    ring = tiles.stages * tiles.step * (head_dim + value_dim)
    return 2 * (fixed + ring) + 4 * BLOCK


def backward_bytes(tiles: Tiles, head_dim: int, value_dim: int) -> int:
    """Shared memory of a backward kernel in bytes: two owned and two streamed tiles,
    and up to six numbers of each row."""
    rows = BLOCK + tiles.stages * tiles.step
    return 2 * rows * (head_dim + value_dim) + 24 * rows


def _fitting(bytes_of, head_dim: int, value_dim: int, steps: tuple[int, ...]) -> Tiles:
    for step in steps:
        for stages in (4, 3, 2):
            tiles = Tiles(step=step, stages=stages)
            if bytes_of(tiles, head_dim, value_dim) <= SHARED_MEMORY:
                return tiles
    return Tiles(step=steps[-1], stages=1)


def forward_tiles(head_dim: int, value_dim: int, *, narrow: bool = False) -> Tiles:
    """The widest step that a warpgroup's registers and the shared memory hold; with
    `narrow` the least.

    A thread holds value_dim / 2 numbers of the output, step / 2 of the scores and
    step / 4 registers of rounded weights; 128 steps beside 256 values spill.
    """
    steps = (64,) if value_dim > 192 or narrow else (128, 64)
    return _fitting(forward_bytes, head_dim, value_dim, steps)


def backward_tiles(head_dim: int, value_dim: int) -> Tiles:
    """Tiles of the backward kernels; at D = E = 256 the ring holds one tile."""
    tiles = _fitting(backward_bytes, head_dim, value_dim, (64,))
    return dataclasses.replace(tiles, ping_pong=False)


def diagonal_bytes(tiles: Tiles, head_dim: int, value_dim: int) -> int:
    """Shared memory of the kernel along diagonals in bytes: all of it is streamed."""
    rows = BLOCK + tiles.step
    return tiles.stages * (2 * rows * (head_dim + value_dim) + 24 * BLOCK)


def diagonal_tiles(tiles: Tiles, head_dim: int, value_dim: int) -> Tiles:
    """Tiles of the dq kernel with as many stages as the kernel along diagonals holds,
    two at most."""
    two = dataclasses.replace(tiles, stages=min(tiles.stages, 2))
    if diagonal_bytes(two, head_dim, value_dim) <= SHARED_MEMORY:
        return two
    return dataclasses.replace(tiles, stages=1)


def joint_dkv(head_dim: int, value_dim: int) -> bool:
    """Whether one kernel can hold the sums of both dk and dv in registers."""
    return head_dim + value_dim <= 256
