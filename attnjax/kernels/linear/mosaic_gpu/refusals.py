"""What the Hopper kernels of the recurrence cannot compute, and why."""

from attnjax.kernels.linear.request import LinearRequest
from attnjax.kernels.mosaic_gpu.refusals import hopper_only

# Tokens of a chunk: the rows of one wgmma.
CHUNK = 64
# Largest D and E of a kernel: a chunk's tiles and its state share one block's memory.
# Wider heads are taken in parts (wide.py), each of which weighs the pairs again.
MAX_DIM = 128
MAX_WIDTH = 512


def reason(request: LinearRequest) -> str | None:
    """Why the request cannot be computed, or None."""
    found = hopper_only(request.target)
    if found is not None:
        return found
    found = _dtype(request.dtypes) or _dims(request)
    if found is not None:
        return found
    if request.spec.chunk_size != CHUNK:
        size = request.spec.chunk_size
        return f"works on chunks of {CHUNK} tokens, not chunk_size={size}"
    return None


def _dtype(dtypes: tuple[str, str, str]) -> str | None:
    if dtypes == ("bfloat16",) * 3:
        return None
    found = f"needs q, k and v all bfloat16, not {dtypes}"
    if "float16" in dtypes:
        return f"{found}: states are rounded for products, and float16 would overflow"
    return (
        f"{found}: products of wider factors would be rounded to 10 bits (tf32), and "
        "take no transposed tile"
    )


def _dims(request: LinearRequest) -> str | None:
    dims = f"D={request.dim}, E={request.value_dim}"
    if max(request.dim, request.value_dim) > MAX_WIDTH:
        return f"needs D and E of at most {MAX_WIDTH}, not {dims}"
    if request.spec.delta and request.dim > MAX_DIM:
        return (
            f"needs D of at most {MAX_DIM} with the delta rule, in which all rows of a "
            f"state meet, not {dims}"
        )
    return None
