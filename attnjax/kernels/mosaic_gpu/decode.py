"""Few queries against a long cache on Hopper: the forward kernel on a folded call.

The query heads of a key/value head are the rows of one block of threads, and the cache
is cut into as many parts as fill the card (fold.py). Each block reads its part of its
key/value head once, through the ring of the forward kernel, where it lies; parts are
joined by their log-sums. Gradients are those of the kernels for many queries.
"""

from attnjax.kernels import fold
from attnjax.kernels.mosaic_gpu.tiles import BLOCK
from attnjax.kernels.request import Request

# Blocks of threads that run at a time on an H100 or H200: one on each of its parts.
MULTIPROCESSORS = 132
# The least share of them that is kept busy, and the fewest keys that a part is worth.
BUSY = 0.9
FEWEST_KEYS = 512
MOST_QUERIES = 16


def num_parts(request: Request) -> int:
    """Parts of the cache that a call is folded into, or 0: then it is not folded."""
    group = request.num_heads // request.num_kv_heads
    few = request.q_len <= MOST_QUERIES and request.q_len * group <= BLOCK
    whole = request.kv_len % BLOCK == 0 and request.kv_len >= FEWEST_KEYS
    tables = any(x.axes == "*" for x in request.spec.operands)
    if not few or not whole or tables or request.spec.reweight is not None:
        return 0
    choices = [
        n
        for n in range(1, request.kv_len // FEWEST_KEYS + 1)
        if (request.kv_len // BLOCK) % n == 0
    ]
    busy = {n: _busy(request.batch * request.num_kv_heads * n) for n in choices}
    enough = [n for n in choices if busy[n] >= BUSY]
    return enough[0] if enough else max(choices, key=busy.get)


def _busy(blocks: int) -> float:
    """Mean share of the card that works until the last block is done."""
    rounds = -(-blocks // MULTIPROCESSORS)
    return blocks / (rounds * MULTIPROCESSORS)


def fold_call(request: Request, qkv, operands) -> fold.Folded | None:
    """The call as the forward kernel takes it, or None."""
    parts = num_parts(request)
    return fold.fold(request, qkv, operands, parts=parts) if parts else None
