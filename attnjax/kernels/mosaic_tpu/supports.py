"""What the TPU kernels take, and why not the rest."""

from attnjax.kernels import tiles
from attnjax.kernels.compat import inside_shard_map
from attnjax.kernels.request import Request

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 256


def supports(request: Request) -> str | None:
    """Why the TPU kernels cannot compute the request, or None."""
    checks = (_device, _arrays, _spec)
    return next((reason for check in checks if (reason := check(request))), None)


def _device(request: Request) -> str | None:
    if request.target.platform != "tpu":
        return f"needs platform tpu, not {request.target.platform}"
    if request.target.num_devices > 1 and not inside_shard_map():
        return (
            f"has to sit inside shard_map in a program for "
            f"{request.target.num_devices} devices"
        )
    return None


def _arrays(request: Request) -> str | None:
    for dtype in request.dtypes:
        if dtype not in DTYPES:
            return f"takes bfloat16 and float32, not {dtype}"
    if max(request.head_dim, request.value_dim) > MAX_HEAD_DIM:
        return (
            f"needs D and E <= {MAX_HEAD_DIM}, not D={request.head_dim}, "
            f"E={request.value_dim}"
        )
    return None


def _spec(request: Request) -> str | None:
    if request.spec.reweight is not None:
        name = type(request.spec.reweight).__name__
        return f"takes no second pass over rows, as {name} is"
    known = tiles.declarations(request.spec)
    for name in sorted(request.operand_names):
        if known[name].axes == "*":
            return f"cannot look values up in a table, as operand {name!r} is"
    return None
